"""Makes what was trained into what the engine loads: a model's folder, or a plain LoRA.

A folder appears whole, under its name, or not at all; what the engine could not load is refused with the reason.
"""

import json
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from finetune import runs
from finetune.bottleneck import CONFIG as BOTTLENECK_CONFIG
from finetune.export_difference import Difference, difference, fixed_prompts, logits_of
from finetune.export_low_rank import Approximated, Fit, LeftOut, changed, refuse_left_out, write_low_rank
from finetune.methods import load_base, load_plain, load_tuned, put_adapter
from finetune.model_folder import DType, stored_dtype, write_model
from finetune.recipe import Trained
from finetune.schemas import Manifest
from ingest.errors import ConflictError, InvalidError
from ingest.schemas import Frozen
from service.base_model import read_base
from service.preflight import CONFIG as PEFT_CONFIG
from service.settings import ServiceSettings

Kind = Literal["merged", "lora"]
RANKS: tuple[int, ...] = get_args(ServiceSettings.model_fields["max_lora_rank"].annotation)  # what vLLM takes
Prompts = list[list[int]]


class Asked(NamedTuple):
    """None for what is chosen by what was trained. `served_rank`: the largest that this service's engine takes."""

    kind: Kind | None = None
    rank: int | None = None
    dtype: DType | None = None
    lossy: bool = False
    served_rank: int = 64


class Exported(Frozen):
    """`difference`: of what was written, loaded anew, from what was trained; `bare`: of the untuned base from that.

    `unquantized`: of a QLoRA on the base as the engine serves it from the same on the base that it was trained on, in 4 or
    8 bits. `rank`, `kept`, `modules` and `left_out` of a LoRA: see `finetune.export_low_rank`.
    """

    kind: Kind
    out: str
    dtype: DType
    size: int  # bytes
    difference: Difference
    bare: Difference
    unquantized: Difference | None = None
    rank: int | None = None
    kept: float | None = None
    modules: tuple[Fit, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    seconds: float = 0.0


def export(folder: Path, out: Path, base: Path, asked: Asked) -> Exported:
    """`folder`: as `graft tune` left it. `base`: the model that it was trained on. Raises NotFoundError, InvalidError,
    ConflictError where `out` is there.
    """
    started = time.monotonic()
    manifest = runs.read_manifest(folder)
    kind = _kind(folder, manifest, asked)
    _refuse(folder, base, manifest, kind, asked)
    prompts = fixed_prompts(base, manifest.prompt_version)
    with _staged(out) as staging:
        write = _merged if kind == "merged" else _low_rank
        found = write(folder, base, manifest, asked, prompts, staging)
        size = sum(file.stat().st_size for file in staging.glob("*.safetensors"))
        seconds = round(time.monotonic() - started, 1)
        found = found.model_copy(update={"out": str(out), "size": size, "seconds": seconds})
        runs.finish(staging, _manifest(manifest, found))
    return found


def _kind(folder: Path, manifest: Manifest, asked: Asked) -> Kind:
    """A low-rank adapter is merged; IA3 and a whole model become a LoRA."""
    return asked.kind or ("merged" if _peft(folder).get("peft_type") == "LORA" else "lora")


def _refuse(folder: Path, base: Path, manifest: Manifest, kind: Kind, asked: Asked) -> None:
    """What can be known before anything is loaded. Raises InvalidError."""
    if (folder / BOTTLENECK_CONFIG).is_file():
        raise InvalidError(f"{str(folder)!r}: {manifest.why_not or 'the engine has no bottleneck adapters'}")
    if manifest.method == "reward":
        raise InvalidError(f"{str(folder)!r}: {manifest.why_not}")
    if (given := read_base(str(base.absolute()), None).identity) != manifest.base:
        raise InvalidError(
            f"{str(folder)!r} was trained on {manifest.base!r}, and the model in {str(base)!r} is {given!r}: name the right "
            "one with --base DIR"
        )
    config = _peft(folder)
    if kind == "merged":
        if asked.rank is not None:
            raise InvalidError(f"--rank {asked.rank} is of a LoRA; a merged model has none")
        if not config and asked.dtype is None:
            raise InvalidError(f"{str(folder)!r} is a model already: give --dtype for another data type, or --as lora")
        return
    if asked.rank is not None and not 1 <= asked.rank <= RANKS[-1]:
        raise InvalidError(f"--rank {asked.rank}: the engine takes ranks from 1 to {RANKS[-1]}")
    plain = config.get("peft_type") == "LORA" and not config.get("use_dora")
    if plain and asked.rank is None and asked.dtype is None:
        raise InvalidError(
            f"{str(folder)!r} is a LoRA already: `graft adapters add {folder}`, or make it smaller with --rank or --dtype"
        )


def _merged(folder: Path, base: Path, manifest: Manifest, asked: Asked, prompts: Prompts, out: Path) -> Exported:
    """The base that a QLoRA was trained on is the one that it is merged into: what its 4 bits stand for."""
    quantized = _quantized(folder, manifest)
    unquantized = None
    if quantized:
        trained = put_adapter(load_base(base, quantized, "float32"), folder)
        wanted = logits_of(trained, prompts)
        unquantized = difference(logits_of(load_tuned(folder, base, "float32"), prompts), wanted)
        trained = put_adapter(load_base(base, quantized, "float32").dequantize(), folder)
    else:
        trained = load_tuned(folder, base, "float32")
        wanted = logits_of(trained, prompts)
    dtype = asked.dtype or stored_dtype(base)
    write_model(_whole(trained), out, base, dtype)
    del trained
    given = logits_of(load_plain(out, "float32"), prompts)
    bare = difference(logits_of(load_plain(base, "float32"), prompts), wanted)
    return Exported(
        kind="merged", out="", dtype=dtype, size=0, difference=difference(given, wanted), bare=bare, unquantized=unquantized
    )  # fmt: skip


def _low_rank(folder: Path, base: Path, manifest: Manifest, asked: Asked, prompts: Prompts, out: Path) -> Exported:
    plain = load_plain(base, "float32")
    bare = logits_of(plain, prompts)
    tuned = load_tuned(folder, base, "float32")
    wanted = logits_of(tuned, prompts)
    tuned = _whole(tuned)
    found = changed(tuned, plain)
    refuse_left_out(found, folder, asked.lossy)
    config = _peft(folder)
    own = config.get("r") if config.get("peft_type") == "LORA" and not config.get("use_dora") else None
    rank, dtype = asked.rank or own or asked.served_rank, asked.dtype or "float32"
    made: Approximated = write_low_rank(tuned, plain, found, rank, dtype, out, base)
    del tuned
    given = logits_of(put_adapter(plain, out), prompts)
    return Exported(
        kind="lora", out="", dtype=dtype, size=0, difference=difference(given, wanted), bare=difference(bare, wanted),
        rank=made.rank, kept=made.kept, modules=made.fits, left_out=made.left_out,
    )  # fmt: skip


def _whole(tuned: Any) -> Any:
    """-> transformers' own model, an adapter merged into it."""
    return tuned.merge_and_unload(safe_merge=True) if hasattr(tuned, "merge_and_unload") else tuned


def _quantized(folder: Path, manifest: Manifest) -> Trained | None:
    """How the base was loaded that the adapter was trained on, where it was quantised."""
    if manifest.weights != "qlora" or manifest.exported or not _peft(folder):
        return None
    held = manifest.recipe.get("trained", {})
    return Trained.model_validate(
        {"weights": "qlora"} | {name: held[name] for name in ("bits", "double_quant") if name in held}
    )


def _manifest(manifest: Manifest, found: Exported) -> Manifest:
    """The training's, with what became of it. A check was of other weights."""
    said = {"mean_logit_difference": found.difference.mean, "largest_logit_difference": found.difference.largest}
    said |= {"same_likeliest_token": found.difference.same, "bare_mean_logit_difference": found.bare.mean}
    if found.kind == "lora":
        said |= {"rank": float(found.rank or 0), "kept": found.kept or 0.0, "left_out": float(len(found.left_out))}
    metrics = manifest.metrics | {f"export_{name}": value for name, value in said.items()}
    return manifest.model_copy(
        update={"metrics": metrics, "servable": True, "why_not": None, "checked": None, "exported": found.kind}
    )


def _peft(folder: Path) -> dict[str, Any]:
    """-> PEFT's configuration; empty for what is none of its adapters. Raises InvalidError."""
    try:
        held = json.loads((folder / PEFT_CONFIG).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InvalidError(f"{str(folder / PEFT_CONFIG)!r} is no JSON: {error}") from error
    return held if isinstance(held, dict) else {}


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """-> a folder that becomes `out` when all is written. Raises ConflictError, InvalidError."""
    if out.exists():
        raise ConflictError(f"{str(out)!r} is there already: name another folder with --out DIR, or delete it")
    staging = out.absolute().parent / f".unfinished-{out.name}-{uuid.uuid4().hex[:8]}"
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise InvalidError(
            f"the folder {str(out)!r} cannot be made ({error.strerror}); give another with --out DIR"
        ) from error
    try:
        yield staging
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
