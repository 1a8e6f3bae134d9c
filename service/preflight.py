"""Takes a PEFT LoRA folder in: copies what counts of it, and finds every fault before the engine sees it.

What is checked is the copy, so that nobody changes a file between the check and the load. Nothing is unpickled or run.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ingest.errors import InvalidError
from ingest.files import write_whole
from service.base_model import HUB_NAME, BaseModel, chat_template, vocabulary
from service.lora_file import Pair, WeightsError, misfits, pairs, read_header, sha256, unfit_values

CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "manifest.json"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")
# How the tokenizer of the training is seen; compared, and not kept.
COMPARED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SMALL_FILE = 64 * 2**20  # bytes, of any file but the weights
SHOWN = 5  # examples of one fault
# PEFT's options that change nothing of what a trained LoRA computes, or that the engine reads.
UNDERSTOOD = frozenset(
    {
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config"),
        *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
        *("layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config"),
        *("megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
        *("runtime_config", "target_modules", "task_type", "use_rslora"),
    }
)
REFUSED = {
    "use_dora": "DoRA: the engine has no DoRA; merge it into a LoRA, or train without it",
    "modules_to_save": "whole modules are trained besides the LoRA (modules_to_save), which the engine does not load",
    "lora_bias": "lora_bias: the engine adds no biases",
    "alora_invocation_tokens": "an activated LoRA (aLoRA), which the engine does not serve",
    "layer_replication": "layer_replication: the engine does not repeat layers",
    "use_bdlora": "a block-diagonal LoRA, which the engine does not serve",
    "use_qalora": "QALoRA, which the engine does not serve",
    "trainable_token_indices": "trained tokens (trainable_token_indices), which the engine does not load",
    "target_parameters": "trained parameters (target_parameters), which the engine does not load",
}
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})  # others change the base's own weights
LITERAL = re.compile(r"\^?[\w.]+")


class Fault(NamedTuple):
    name: str
    message: str


class AdapterRefusedError(InvalidError):
    """A folder cannot be served; `faults` are all that were found."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("the adapter is refused: " + "; ".join(f"{fault.name}: {fault.message}" for fault in faults))
        self.faults = tuple(faults)


class Limits(NamedTuple):
    roots: tuple[Path, ...]
    rank: int
    megabytes: int


class Examined(NamedTuple):
    """`digest`: of weights, configuration and base. `config` lacks the base's path, which depends on the engine."""

    digest: str
    config: dict[str, Any]
    rank: int
    target_modules: tuple[str, ...]
    size: int  # bytes
    manifest: dict[str, Any] | None


def take_in(folder: Path, copy: Path, base: BaseModel, limits: Limits) -> Examined:
    """Copies the adapter into the empty folder `copy` and examines it. Raises AdapterRefusedError; OSError for a full disk."""
    faults = list(_copied(folder, copy, limits))
    if any(fault.name in {"root", "path"} for fault in faults):
        raise AdapterRefusedError(faults)
    config: dict[str, Any] = {}
    manifest: dict[str, Any] | None = None
    if (copy / CONFIG).is_file():
        try:
            config = _object(copy / CONFIG)
            faults += _config_faults(config, folder, base, limits)
        except ValueError as error:
            faults.append(Fault(CONFIG, f"is no JSON object: {error}"))
    if (copy / MANIFEST).is_file():
        try:
            manifest = _object(copy / MANIFEST)
            faults += _manifest_faults(manifest)
        except ValueError as error:
            faults.append(Fault(MANIFEST, f"is no JSON object: {error}"))
    found: dict[str, Pair] = {}
    if (copy / WEIGHTS).is_file():
        try:
            found, more = _weights_faults(copy / WEIGHTS, config, base, limits)
            faults += more
        except WeightsError as error:
            faults.append(Fault("safetensors", f"{WEIGHTS} {error}"))
    faults += _training_faults(copy, base)
    if faults:
        raise AdapterRefusedError(faults)
    for name in COMPARED:
        (copy / name).unlink(missing_ok=True)
    kept = {key: value for key, value in config.items() if key != "base_model_name_or_path"}
    modules = tuple(sorted({module.rpartition(".")[2] for module in found}))
    rank = max(pair.a.shape[0] for pair in found.values() if pair.a)
    return Examined(digest_of(copy, base), kept, rank, modules, (copy / WEIGHTS).stat().st_size, manifest)


def digest_of(folder: Path, base: BaseModel) -> str:
    """-> what an adapter is known by: of its weights, its configuration and its base. Raises ValueError, OSError."""
    kept = {key: value for key, value in _object(folder / CONFIG).items() if key != "base_model_name_or_path"}
    said = json.dumps(kept, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(f"{sha256(folder / WEIGHTS)}\n{said}\n{base.identity}".encode()).hexdigest()


def write_config(folder: Path, config: dict[str, Any], root: str) -> None:
    """The engine's resolver loads a folder only when its base is named as the engine's own model."""
    named = {**config, "base_model_name_or_path": root}
    write_whole(folder / CONFIG, json.dumps(named, indent=1, ensure_ascii=False))


def _copied(folder: Path, copy: Path, limits: Limits) -> Iterator[Fault]:
    roots = [os.path.realpath(root) for root in limits.roots]
    if not _below(os.path.realpath(folder), roots):
        allowed = ", ".join(map(str, limits.roots)) or "none"
        yield Fault("root", f"{str(folder)!r} is outside SERVICE_ADAPTER_ROOTS ({allowed})")
        return
    if not folder.is_dir():
        yield Fault("path", f"{str(folder)!r} is no folder")
        return
    for name in (CONFIG, WEIGHTS, MANIFEST, *COMPARED):
        limit = limits.megabytes * 2**20 if name == WEIGHTS else SMALL_FILE
        try:
            fault = _copy(folder / name, copy / name, roots, limit)
        except FileNotFoundError:
            if name == CONFIG:
                yield Fault(CONFIG, f"there is no {CONFIG}, which says what the LoRA is")
            elif name == WEIGHTS:
                pickle = next((one for one in PICKLES if (folder / one).exists()), None)
                held = f"; {pickle} is a pickle, which could run code: save it as safetensors" if pickle else ""
                yield Fault("safetensors", f"there is no {WEIGHTS}{held}")
            continue
        if fault:
            yield fault


def _copy(source: Path, target: Path, roots: list[str], limit: int) -> Fault | None:
    """Opens first and looks then, at what was opened: no link is swapped in between."""
    descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as held:
        status = os.fstat(descriptor)
        if not _below(os.readlink(f"/proc/self/fd/{descriptor}"), roots):
            return Fault("symlink", f"{source.name} leads out of SERVICE_ADAPTER_ROOTS")
        if not stat.S_ISREG(status.st_mode):
            return Fault("path", f"{source.name} is no regular file")
        if status.st_size > limit:
            named = "SERVICE_MAX_ADAPTER_MB" if source.name == WEIGHTS else "the limit"
            return Fault("size", f"{source.name} has {status.st_size / 2**20:.1f} MB, over {named} ({limit // 2**20})")
        left = limit + 1
        with target.open("wb") as out:
            while piece := held.read(min(2**20, left)):
                out.write(piece)
                left -= len(piece)
            out.flush()
            os.fsync(out.fileno())
    return None if left else Fault("size", f"{source.name} grew over the limit while it was read")


def _below(path: str, roots: Sequence[str]) -> bool:
    return any((path + "/").startswith(root.rstrip("/") + "/") for root in roots)


def _object(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(held, dict):
        raise ValueError("it holds something else")
    return held


def _config_faults(config: dict[str, Any], folder: Path, base: BaseModel, limits: Limits) -> Iterator[Fault]:
    kind = config.get("peft_type")
    if kind != "LORA":
        yield Fault("peft_type", f"{kind!r} is not LORA, the one kind that the engine serves")
    if config.get("task_type") not in {None, "CAUSAL_LM"}:
        yield Fault("task_type", f"{config['task_type']!r} is not CAUSAL_LM")
    for option, message in REFUSED.items():
        if config.get(option):
            yield Fault(option, message)
    if config.get("bias", "none") != "none":
        yield Fault("bias", f"{config['bias']!r}: the engine adds no biases; train with bias='none'")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in PLAIN_INITS:
        yield Fault(
            "init_lora_weights", f"{start!r} changes the base's own weights; convert it to a plain LoRA with PEFT"
        )
    if kind == "LORA":
        for option in sorted(set(config) - UNDERSTOOD - set(REFUSED)):
            if config[option] not in (None, False, [], {}, ""):
                yield Fault(
                    "option", f"{option} is set, and may change what the LoRA computes in a way that is not served"
                )
    yield from _number_faults(config, limits)
    given = config.get("base_model_name_or_path")
    if (
        isinstance(given, str)
        and base.hub_name
        and HUB_NAME.fullmatch(given)
        and not (folder.parent / given).exists()
        and given.lower() != base.hub_name.lower()
    ):
        yield Fault("base", f"it was trained on {given!r}; the engine serves {base.hub_name!r}")


def _manifest_faults(manifest: dict[str, Any]) -> Iterator[Fault]:
    """What the training itself knows that the engine cannot load."""
    if manifest.get("servable") is False:
        why = manifest.get("why_not")
        yield Fault(
            "servable", why if isinstance(why, str) and why else "its manifest says that the engine cannot load it"
        )


def _number_faults(config: dict[str, Any], limits: Limits) -> Iterator[Fault]:
    patterns = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict) or not all(LITERAL.fullmatch(key) for key in pattern):
            yield Fault(name, "its keys must be plain module names")
            return
    for name, rank in (("r", config.get("r", 8)), *patterns["rank_pattern"].items()):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            yield Fault("rank", f"{name} is {rank!r}; a rank is a whole number from 1")
        elif rank > limits.rank:
            yield Fault("rank", f"{name} is {rank}, over SERVICE_MAX_LORA_RANK ({limits.rank})")
    for name, alpha in (("lora_alpha", config.get("lora_alpha", 8)), *patterns["alpha_pattern"].items()):
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
            yield Fault("lora_alpha", f"{name} is {alpha!r}; it must be a finite number")


def _weights_faults(
    file: Path, config: dict[str, Any], base: BaseModel, limits: Limits
) -> tuple[dict[str, Pair], list[Fault]]:
    header = read_header(file)
    found, strange = pairs(header)
    wrong = [("name", f"{name} is no LoRA matrix") for name in strange]
    if not found:
        wrong.append(("safetensors", f"{WEIGHTS} holds no LoRA matrix"))
    wrong += misfits(found, base.shapes, bool(config.get("fan_in_fan_out")))
    wrong += _rank_misfits(found, config, limits)
    wrong += unfit_values(file, header)
    return found, _few_of_each(wrong)


def _rank_misfits(found: dict[str, Pair], config: dict[str, Any], limits: Limits) -> Iterator[tuple[str, str]]:
    """Where the matrices have another rank than the configuration gives them: PEFT and the engine would scale them wrongly."""
    pattern = config.get("rank_pattern") or {}
    literal = isinstance(pattern, dict) and all(LITERAL.fullmatch(key) for key in pattern)
    for module, pair in found.items():
        if pair.a is None or not pair.a.shape:
            continue
        wanted = config.get("r", 8)
        if literal:
            wanted = next((rank for key, rank in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), wanted)
        if pair.a.shape[0] > limits.rank:
            yield "rank", f"{module} has rank {pair.a.shape[0]}, over SERVICE_MAX_LORA_RANK ({limits.rank})"
        elif pair.a.shape[0] != wanted:
            yield "rank", f"{module} has rank {pair.a.shape[0]}, the configuration says {wanted}"


def _few_of_each(wrong: list[tuple[str, str]]) -> list[Fault]:
    """A fault that all the layers share is told by a few of them."""
    counts: dict[str, int] = {}
    faults = []
    for name, message in wrong:
        counts[name] = counts.get(name, 0) + 1
        if counts[name] <= SHOWN:
            faults.append(Fault(name, message))
    faults += [Fault(name, f"and {count - SHOWN} more like this") for name, count in counts.items() if count > SHOWN]
    return faults


def _training_faults(copy: Path, base: BaseModel) -> Iterator[Fault]:
    """Where the folder carries the tokenizer or the template that it was trained with, they must be the base's."""
    if base.folder is None:
        return
    try:
        given, served = vocabulary(copy), vocabulary(base.folder)
        if given is not None and served is not None and given != served:
            yield Fault("tokenizer", "the folder's tokenizer.json is not the base's: it was trained on another model")
        template, own = chat_template(copy), chat_template(base.folder)
    except ValueError as error:
        yield Fault("tokenizer", str(error))
        return
    if template is not None and own is not None and _bare(template) != _bare(own):
        yield Fault(
            "chat_template",
            "the folder's chat template is not the base's, so that questions would be laid out otherwise than in training; "
            "if both render the same, take it out of the folder",
        )


def _bare(template: str) -> str:
    """Without the marks that trainers set around the answer."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template).strip()
