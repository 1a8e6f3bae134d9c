"""LLaMA-Factory's training YAML -> a recipe. What it leaves out is as LLaMA-Factory has it, not as the recipes here do.

Source: LLaMA-Factory 0.9.5, src/llamafactory/hparams. Texts are rendered by the base's own chat template, as they are served.
"""

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from finetune.arguments import ELSEWHERE
from finetune.recipe import Recipe, recipe_of
from finetune.rows_factory import INFO
from finetune.schemas import Method
from finetune.training_names import training_names
from ingest.errors import InvalidError, NotFoundError

METHODS: dict[str, Method] = {"sft": "sft", "dpo": "dpo", "kto": "kto", "rm": "reward"}  # by stage
_STAGES = {"pt": "pre-training", "ppo": "PPO, which has a recipe of its own here: graft tune ppo"}
_LOSSES = ("sigmoid", "hinge", "ipo")  # of DPO, that TRL has by the same name
_ATTENTION = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
_RENAMED = {"warmup_ratio": "warmup_steps", "evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu"}
_SCIENTIFIC = re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+")  # YAML takes 1e-4 for a string

# Read below.
_READ_NAMES = """
model_name_or_path adapter_name_or_path flash_attn pure_bf16 quantization_bit quantization_method double_quantization
stage do_train finetuning_type freeze_trainable_layers lora_rank lora_alpha lora_dropout lora_target use_dora use_rslora
pref_beta pref_loss pref_ftx kto_chosen_weight kto_rejected_weight dataset eval_dataset dataset_dir template cutoff_len
max_samples val_size early_stopping_steps disable_gradient_checkpointing output_dir
"""
# What they ask for is done anyway, or is nothing that a run here depends on.
_IDLE_NAMES = """
trust_remote_code overwrite_cache overwrite_output_dir preprocessing_num_workers preprocessing_batch_size plot_loss
include_effective_tokens_per_second print_param_status use_fast_tokenizer low_cpu_mem_usage cache_dir use_reentrant_gc
upcast_layernorm ignore_pad_token_for_loss logging_dir save_safetensors compute_accuracy enable_thinking media_dir
"""
# Supported at these values alone, which are LLaMA-Factory's own defaults.
_ONLY: dict[str, tuple[Any, ...]] = {
    "train_on_prompt": (False,), "mask_history": (False,), "streaming": (False,), "mix_strategy": ("concat",),
    "interleave_probs": (None,), "neat_packing": (False,), "tool_format": (None,), "tokenized_path": (None,),
    "eval_on_each_dataset": (False,), "disable_shuffling": (False,), "freeze_trainable_modules": ("all",),
    "freeze_extra_modules": (None,), "additional_target": (None,), "create_new_adapter": (False,),
    "loraplus_lr_ratio": (None,), "pissa_init": (False,), "use_llama_pro": (False,), "use_galore": (False,),
    "use_apollo": (False,), "use_badam": (False,), "use_adam_mini": (False,), "use_muon": (False,),
    "use_dft_loss": (False,), "use_swanlab": (False,), "use_unsloth": (False,), "use_unsloth_gc": (False,),
    "enable_liger_kernel": (False,), "shift_attn": (False,), "mixture_of_depths": (None,), "rope_scaling": (None,),
    "resize_vocab": (False,), "split_special_tokens": (False,), "add_tokens": (None,), "add_special_tokens": (None,),
    "train_from_scratch": (False,), "model_revision": ("main",), "quantization_type": ("nf4",),
    "quantization_device_map": (None,), "ref_model": (None,), "dpo_label_smoothing": (0, 0.0), "pref_bco_weight": (0, 0.0),
    "predict_with_generate": (False,), "do_predict": (False,), "resume_from_checkpoint": (None, False),
}  # fmt: skip

_READ, _NO_EFFECT = frozenset(_READ_NAMES.split()), frozenset(_IDLE_NAMES.split())


class FromFactory(NamedTuple):
    """`out`: where the file wants the adapter; `notes`: what of it has no effect here, in words."""

    recipe: Recipe
    out: Path | None
    notes: tuple[str, ...]


class _Said:
    """The file's keys, with what is wrong with their values, so that all of it is told at once."""

    def __init__(self, keys: Mapping[str, Any]) -> None:
        self.keys = dict(keys)
        self.wrong: list[str] = []

    def get(self, key: str, default: Any, fits: Callable[[Any], bool], wanted: str) -> Any:
        value = self.keys.get(key)
        if value is None:
            return default
        if not fits(value):
            self.wrong.append(f"{key}: {value!r} is not {wanted}")
            return default
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self.get(key, default, lambda one: isinstance(one, str) and bool(one.strip()), "a text")
        return value if value is None else str(value)

    def one_of(self, key: str, default: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
        wanted = f"one of {', '.join(known)}"
        return str(self.get(key, default, lambda one: isinstance(one, str) and one in known, wanted))

    def whole(self, key: str, default: int | None, least: int = 1) -> Any:
        return self.get(key, default, lambda one: _is_whole(one) and one >= least, f"a whole number from {least} on")

    def number(self, key: str, default: float) -> Any:
        return self.get(key, default, lambda one: _is_whole(one) or isinstance(one, float), "a number")

    def yes(self, key: str, default: bool = False) -> bool:
        return bool(self.get(key, default, lambda one: isinstance(one, bool), "true or false"))

    def names(self, key: str) -> tuple[str, ...]:
        """A text with commas, or a list."""
        value = self.keys.get(key)
        parts = value.split(",") if isinstance(value, str) else value
        if value is None:
            return ()
        if not isinstance(parts, list) or not all(isinstance(one, str) and one.strip() for one in parts):
            self.wrong.append(f"{key}: {value!r} is neither names with commas between them nor a list of names")
            return ()
        return tuple(one.strip() for one in parts)


def read_llamafactory(path: Path, ignore_unknown: bool = False) -> FromFactory:
    """`ignore_unknown`: keys that mean nothing here are left out, and noted. Raises NotFoundError, and InvalidError with all that
    is wrong.
    """
    said = _Said(_load(path))
    method = _method(said)
    unknown = _unknown(said.keys, method)
    if unknown and not ignore_unknown:
        said.wrong += unknown
    content: dict[str, Any] = {
        "name": path.stem,
        "method": method,
        "model": _model(said),
        "trained": _trained(said),
        "data": _data(said),
        "training": _training(said, method),
    }
    out = said.text("output_dir")
    if said.wrong:
        hint = "; --ignore-unknown goes on without those that are not known" if unknown and not ignore_unknown else ""
        raise InvalidError(f"{str(path)!r} does not fit{hint}:" + "".join(f"\n  {one}" for one in said.wrong))
    notes = (*_notes(said.keys), *(f"ignored: {one}" for one in unknown))
    return FromFactory(recipe_of(content), Path(out) if out else None, notes)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFoundError(f"LLaMA-Factory's file {str(path)!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidError(f"{str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InvalidError(f"{str(path)!r} is no LLaMA-Factory recipe: it has to be keys with values, as stage: sft")
    return {str(key): _value(value) for key, value in content.items()}


def _value(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


def _method(said: _Said) -> Method:
    stage = said.keys.get("stage", "sft")
    if isinstance(stage, str) and stage in METHODS:
        return METHODS[stage]
    named = f" ({_STAGES[stage]})" if isinstance(stage, str) and stage in _STAGES else ""
    said.wrong.append(f"stage: {stage!r}{named} is not read; there are {', '.join(METHODS)}")
    return "sft"


def _model(said: _Said) -> dict[str, Any]:
    base = said.text("model_name_or_path")
    if base is None:
        said.wrong.append("model_name_or_path is missing")
    attention = _ATTENTION[said.one_of("flash_attn", "auto", _ATTENTION)]
    dtype = "bfloat16" if said.yes("pure_bf16") else "auto"
    return {"base": base, "dtype": dtype, "attn_implementation": attention}


def _trained(said: _Said) -> dict[str, Any]:
    """Raises nothing: what is wrong is noted."""
    kind = said.one_of("finetuning_type", "lora", ("lora", "freeze", "full"))
    bits = said.get("quantization_bit", None, lambda one: one in (4, 8), "4 or 8, what bitsandbytes has")
    said.one_of("quantization_method", "bitsandbytes", ("bitsandbytes", "bnb"))
    if bits and kind != "lora":
        said.wrong.append(f"quantization_bit: {bits} goes with finetuning_type: lora, not {kind}")
    if kind == "full":
        return {"weights": "full"}
    if kind == "freeze":
        count = said.get("freeze_trainable_layers", 2, lambda one: _is_whole(one) and one != 0, "a number of layers")
        return {"weights": "layers", "layers": tuple(range(-count, 0) if count > 0 else range(-count))}
    rank = said.whole("lora_rank", 8)
    targets = said.names("lora_target")
    found: dict[str, Any] = {
        "weights": "qlora" if bits else "lora",
        "r": rank,
        "lora_alpha": said.whole("lora_alpha", 2 * rank),
        "lora_dropout": said.number("lora_dropout", 0.0),
        "target_modules": "all-linear" if targets in ((), ("all",)) else targets,
        "use_dora": said.yes("use_dora"),
        "use_rslora": said.yes("use_rslora"),
    }
    if bits:
        found |= {"bits": bits, "double_quant": said.yes("double_quantization", True)}
    adapters = said.names("adapter_name_or_path")
    if len(adapters) > 1:
        said.wrong.append(f"adapter_name_or_path: {len(adapters)} adapters are named, and training goes on from one")
    return found | ({"parent": adapters[0]} if adapters else {})


def _data(said: _Said) -> dict[str, Any]:
    if not said.yes("do_train", True):
        said.wrong.append("do_train: false leaves nothing to do")
    folder, names = said.text("dataset_dir", "data"), said.names("dataset")
    if not names:
        said.wrong.append("dataset is missing")
    if folder == "ONLINE" or str(folder).startswith("REMOTE:"):
        said.wrong.append(f"dataset_dir: {folder!r} is on a hub, and nothing is fetched: give a folder with {INFO}")
    most = said.whole("max_samples", None)
    share = said.number("val_size", 0.0)
    if not 0 <= share < 1:
        said.wrong.append(f"val_size: {share!r} is no share: give a number from 0 to below 1")
    compared = said.names("eval_dataset")
    return {
        "data": _spec(folder, names, most if len(names) > 1 else None),
        "eval_data": _spec(folder, compared, most) if compared else None,
        "held_out": share if 0 <= share < 1 else 0.0,
        "max_rows": most if len(names) == 1 else None,
        "patience": said.whole("early_stopping_steps", 0, least=0),
    }


def _spec(folder: str | None, names: tuple[str, ...], most: int | None) -> str:
    """`most`: of each of the data sets, the first so many rows."""
    cut = f"[:{most}]" if most else ""
    return f"{Path(folder or '.') / INFO}#{','.join(f'{name}{cut}' for name in names)}"


def _training(said: _Said, method: Method) -> dict[str, Any]:
    known = training_names(method) - _READ - _NO_EFFECT - _ONLY.keys() - ELSEWHERE.keys()
    found: dict[str, Any] = {"learning_rate": 5e-5, "max_length": said.whole("cutoff_len", 2048)}
    for key, value in said.keys.items():
        name = _RENAMED.get(key, key)
        if name in known and value is not None and not (key == "warmup_ratio" and said.keys.get("warmup_steps")):
            found[name] = value
    if said.yes("disable_gradient_checkpointing"):
        found["gradient_checkpointing"] = False
    if method in ("sft", "reward"):
        return found
    found["beta"] = said.number("pref_beta", 0.1)
    weight = said.number("pref_ftx", 0.0)
    if method == "dpo":
        loss = said.one_of("pref_loss", "sigmoid", _LOSSES)
        found |= {"loss_type": [loss, "sft"], "loss_weights": [1.0, weight]} if weight else {"loss_type": [loss]}
    else:
        if weight:
            said.wrong.append(f"pref_ftx: {weight!r} goes with stage: dpo; TRL's KTO has no supervised part")
        found["desirable_weight"] = said.number("kto_chosen_weight", 1.0)
        found["undesirable_weight"] = said.number("kto_rejected_weight", 1.0)
    return found


def _unknown(keys: Mapping[str, Any], method: Method) -> list[str]:
    """What of the keys means nothing here, each with the one that it may have been meant for."""
    known = sorted(training_names(method) | _READ | _NO_EFFECT | _ONLY.keys() | _RENAMED.keys())
    found = []
    for key, value in keys.items():
        if key in _ONLY and value not in _ONLY[key] and value is not None:
            found.append(f"{key}: {value!r} is not supported; only {_ONLY[key][0]!r} is")
        elif key not in known:
            near = get_close_matches(key, known, n=1)
            found.append(f"{key} is not known" + (f"; is {near[0]} meant?" if near else ""))
    return found


def _notes(keys: Mapping[str, Any]) -> list[str]:
    found = []
    if template := keys.get("template"):
        found.append(f"template: {template!r} is not used: the base's own chat template is, as in serving")
    if idle := [key for key in keys if key in _NO_EFFECT]:
        found.append(f"without effect here: {', '.join(idle)}")
    for key in keys:
        if key in ELSEWHERE and key not in _READ | _NO_EFFECT | _ONLY.keys() and keys[key] not in (None, False, "none"):
            found.append(f"{key}: {keys[key]!r} is not taken over; {ELSEWHERE[key]}")
    kind = keys.get("finetuning_type", "lora")
    if kind != "lora" and (
        idle := [key for key in keys if key.startswith("lora_") or key in ("use_dora", "use_rslora")]
    ):
        found.append(f"without effect with finetuning_type: {kind}: {', '.join(idle)}")
    return found


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
