"""Which weights train: from a base's folder to a model with gradients where the recipe says, and from that to a folder and back.

Knows nothing of rows, losses or trainers. A model is transformers' own, or PEFT's around it.
"""

import json
import logging
import math
import os
import warnings
from pathlib import Path
from typing import Any

from finetune.model_folder import write_model
from finetune.recipe import Trained
from ingest.errors import InvalidError, NotFoundError, SettingsError
from service.base_model import read_base
from service.preflight import CONFIG as PEFT_CONFIG
from service.preflight import WEIGHTS as PEFT_WEIGHTS

WHOLE = frozenset({"full", "layers"})
HEAD = "score"  # the module of transformers that gives one number
# IA3 scales keys, values, and what enters the last matrix of the MLP; PEFT's table leaves out llama's younger relatives.
IA3_TARGETS, IA3_FEEDFORWARD = ("k_proj", "v_proj", "down_proj"), "down_proj"


def load_base(folder: Path, trained: Trained, dtype: str, attn: str | None = None, scores: bool = False) -> Any:
    """-> the model that `apply` takes. `dtype`: "float32", "bfloat16" or "float16", of what is frozen and of the products.
    `scores`: with a new head that gives a conversation one number, in place of the one that gives words.

    What trains as a whole is kept in float32, since most steps of a fine-tuning are too small for bfloat16's 8 bits: its
    trainer computes in another type by autocast. Raises NotFoundError, InvalidError, SettingsError.
    """
    if trained.weights != "qlora":
        held = "float32" if trained.weights in WHOLE else dtype
        return _load(folder, held, scores, attn_implementation=attn)
    import torch
    from transformers import BitsAndBytesConfig

    if trained.bits == 4:
        quantized = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=trained.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    else:
        quantized = BitsAndBytesConfig(load_in_8bit=True)
    where = {"": int(os.environ.get("LOCAL_RANK", "0"))} if torch.cuda.is_available() else None
    model = _load(folder, dtype, scores, attn_implementation=attn, quantization_config=quantized, device_map=where)
    return _without_packed_inference(model)


def load_plain(folder: Path, dtype: str, scores: bool = False) -> Any:
    """-> a model as it is, never quantised, that answers, or with `scores` has a new head. Raises as `load_base`."""
    return _load(folder, dtype, scores).eval()


def apply(model: Any, trained: Trained) -> Any:
    """-> the model in which what `trained` names requires gradients, and nothing else. Raises InvalidError.

    A quantised base keeps its embeddings and norms in the type that it computes in: PEFT's `prepare_model_for_kbit_training`
    would double their memory and make every hidden state float32.
    """
    model.requires_grad_(trained.weights == "full")
    match trained.weights:
        case "layers":
            _train_layers(model, trained.layers)
        case "lora" | "qlora":
            model = _low_rank(model, trained, hasattr(model, HEAD))
        case "ia3":
            model = _ia3(model, trained)
        case "bottleneck":
            from finetune import bottleneck

            model = bottleneck.insert(model, trained.bottleneck)
    return model


def counts(model: Any) -> tuple[int, int]:
    """-> (parameters that train, all of them); one of a 4-bit base counts as one."""
    sizes = [(_size(weight), weight.requires_grad) for weight in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def save(model: Any, trained: Trained, out: Path, base_folder: Path) -> None:
    """Writes what was trained into `out`: an adapter as PEFT has it, bottleneck adapters, or a whole model's folder.

    A whole model keeps its trained weights in float32, so that small changes are not rounded away; its configuration names
    the base's own data type, which is what it is loaded in by default.
    """
    out.mkdir(parents=True, exist_ok=True)
    if trained.weights in WHOLE:
        write_model(model, out, base_folder)
    elif trained.weights == "bottleneck":
        from finetune import bottleneck

        bottleneck.save(model, out, base_name(base_folder))
    else:
        for config in model.peft_config.values():
            config.base_model_name_or_path = base_name(base_folder)
        card = out / "README.md"
        held = card.exists()
        model.save_pretrained(str(out), save_embedding_layers=False)
        if not held:
            card.unlink(missing_ok=True)  # PEFT's, with nothing filled in


def load_tuned(folder: Path, base_folder: Path, dtype: str) -> Any:
    """-> the model that `save` wrote, on a base that is not quantised. Raises NotFoundError, InvalidError."""
    if (folder / PEFT_CONFIG).is_file():
        return put_adapter(load_plain(base_folder, dtype), folder)
    if (folder / "bottleneck_config.json").is_file():
        from finetune import bottleneck

        return bottleneck.load(load_plain(base_folder, dtype), folder).eval()
    if (folder / "config.json").is_file():
        given, wanted = read_base(str(folder.absolute()), None), read_base(str(base_folder.absolute()), None)
        if given.shapes != wanted.shapes:
            raise InvalidError(
                f"the model in {str(folder)!r} is not one of {wanted.identity!r}: its matrices have other names or shapes"
            )
        return load_plain(folder, dtype)
    raise InvalidError(
        f"{str(folder)!r} holds nothing that graft trained: no adapter_config.json, bottleneck_config.json or config.json"
    )


def put_scores(model: Any, folder: Path) -> Any:
    """-> PEFT's model around one with a new head, with the LoRA and the head in `folder`. Raises InvalidError."""
    return _with_adapter(model, folder)


def put_adapter(model: Any, folder: Path) -> Any:
    """-> PEFT's model around `model`, with the LoRA or IA3 adapter in `folder`. Raises InvalidError."""
    kind = _peft_type(folder)
    _refuse_scores(folder)
    if kind not in {"LORA", "IA3"}:
        raise InvalidError(f"the adapter in {str(folder)!r} is {kind!r}; graft trains LORA and IA3")
    if not (folder / PEFT_WEIGHTS).is_file():
        raise InvalidError(f"the adapter in {str(folder)!r} has no {PEFT_WEIGHTS}; pickled weights are not loaded")
    return _with_adapter(model, folder)


def why_not_servable(trained: Trained) -> str | None:
    """Why the engine cannot load the folder that `save` writes; None where it can: a LoRA, or a whole model as a model."""
    match trained.weights:
        case "bottleneck":
            return "the engine has no bottleneck adapters, and they cannot be converted: train a LoRA to serve it"
        case "ia3":
            return "the engine has no IA3: `graft export FOLDER --as lora --out DIR` makes it a LoRA"
    if trained.use_dora:
        return "the engine has no DoRA: `graft export FOLDER --as merged --out DIR` makes it a model"
    return None


def base_name(folder: Path) -> str:
    """What an adapter's configuration says of its base: the hub name where it is known, else the folder."""
    return read_base(str(folder.absolute()), None).hub_name or str(folder.absolute())


def _load(folder: Path, dtype: str, scores: bool = False, **options: Any) -> Any:
    import torch

    _quiet()
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"there is no model in {str(folder)!r}: it has no config.json")
    given = {name: value for name, value in options.items() if value is not None} | (
        {"num_labels": 1} if scores else {}
    )
    try:
        model, found = kind.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **given,
        )
    except ImportError as error:
        raise SettingsError(f"the model in {str(folder)!r} needs a package that is not installed: {error}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidError(f"the model in {str(folder)!r} cannot be loaded: {error}") from error
    if missing := set(found["missing_keys"]) - (
        {f"{HEAD}.weight"} if scores else set()
    ):  # which the library would make up, at random
        raise InvalidError(f"the model in {str(folder)!r} lacks {len(missing)} of its weights, as {min(missing)!r}")
    return model


def _quiet() -> None:
    """Without a bar for each load, and without a line for each 8-bit product on a CPU and for a kernel that is not used here."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    # PEFT calls what transformers has renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def _without_packed_inference(model: Any) -> Any:
    """On a CPU with bfloat16, bitsandbytes packs 4-bit weights anew at the first evaluation, for a product in bfloat16 that has
    no gradient: training goes on after it, and the gradients of all lower layers are wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _train_layers(model: Any, numbers: tuple[int, ...]) -> None:
    from finetune.bottleneck import decoder_layers

    layers = decoder_layers(model)
    for number in numbers:
        if not -len(layers) <= number < len(layers):
            raise InvalidError(f"layers = {number!r}: the model has {len(layers)}, from 0 to {len(layers) - 1}")
        layers[number].requires_grad_(True)


def _low_rank(model: Any, trained: Trained, scores: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    if trained.parent is not None:
        return _go_on(model, trained, trained.parent, scores)
    config = LoraConfig(
        r=trained.r,
        lora_alpha=trained.lora_alpha,
        lora_dropout=trained.lora_dropout,
        target_modules=_targets(trained),
        use_dora=trained.use_dora,
        use_rslora=trained.use_rslora,
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
        modules_to_save=[HEAD] if scores else None,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InvalidError(f"target_modules = {trained.target_modules!r} do not fit the model: {error}") from error


def _go_on(model: Any, trained: Trained, parent: Path, scores: bool) -> Any:
    """What makes the matrices what they are is the parent's; the recipe may say it again, but nothing else. With `scores`
    the parent is a reward model, or an adapter of a model that writes, which gets a head.
    """
    if _peft_type(parent) != "LORA":
        raise InvalidError(f"parent = {str(parent)!r} is no LoRA adapter; name a folder with an {PEFT_CONFIG} of one")
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(parent))
    held = {name: getattr(config, name) for name in ("r", "lora_alpha", "use_dora", "use_rslora")}
    if isinstance(trained.target_modules, tuple):
        held["target_modules"] = tuple(sorted(config.target_modules))
    for name, value in held.items():
        asked = getattr(trained, name)
        asked = tuple(sorted(asked)) if isinstance(asked, tuple) else asked
        if name in trained.model_fields_set and asked != value:
            raise InvalidError(f"{name} = {asked!r}, but the parent {str(parent)!r} has {value!r}: set that")
    config.lora_dropout = trained.lora_dropout
    config.base_model_name_or_path = model.name_or_path  # by a hub name PEFT asks the hub at each checkpoint
    if not scores:
        _refuse_scores(parent)
    elif config.task_type != "SEQ_CLS":
        return _with_new_head(model, parent, config)
    return _with_adapter(model, parent, config=config, is_trainable=True)


def _ia3(model: Any, trained: Trained) -> Any:
    from peft import IA3Config, get_peft_model
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD

    last = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    known = set(IA3_TARGETS) <= last
    feedforward = [IA3_FEEDFORWARD] if known else FEEDFORWARD.get(model.config.model_type, [])
    targets: Any = _targets(trained)
    if "target_modules" not in trained.model_fields_set:
        targets = list(IA3_TARGETS) if known else None
    elif isinstance(targets, list):
        feedforward = [name for name in feedforward if name in targets]
    try:
        config = IA3Config(target_modules=targets, feedforward_modules=feedforward, task_type="CAUSAL_LM")
        return get_peft_model(model, config)
    except ValueError as error:
        raise InvalidError(f"target_modules = {trained.target_modules!r} do not fit the model: {error}") from error


def _with_new_head(model: Any, folder: Path, config: Any) -> Any:
    """-> the adapter in `folder`, of a model that writes, around one that scores, whose head is to train as well."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", [HEAD], False
    head = {f"base_model.model.{HEAD}.weight": getattr(model, HEAD).weight.detach().clone()}
    try:
        weights = load_file(folder / PEFT_WEIGHTS)
        tuned = get_peft_model(model, config)
        if other := (head | weights).keys() ^ get_peft_model_state_dict(tuned, save_embedding_layers=False).keys():
            raise ValueError(f"{min(other)!r} is only in one of them")
        set_peft_model_state_dict(tuned, head | weights)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InvalidError(f"the adapter in {str(folder)!r} does not fit the base: {error}") from error
    return tuned


def _with_adapter(model: Any, folder: Path, **options: Any) -> Any:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(folder / PEFT_WEIGHTS), framework="numpy") as file:
            given = set(file.keys())
        tuned = PeftModel.from_pretrained(model, str(folder), **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InvalidError(f"the adapter in {str(folder)!r} does not fit the base: {error}") from error
    if other := given ^ set(get_peft_model_state_dict(tuned, save_embedding_layers=False)):
        raise InvalidError(
            f"the adapter in {str(folder)!r} does not fit the base: {min(other)!r} is only in one of them"
        )
    return tuned


def _refuse_scores(folder: Path) -> None:
    """Raises InvalidError."""
    if _peft_config(folder).get("task_type") == "SEQ_CLS":
        raise InvalidError(
            f"{str(folder)!r} holds a reward model, which scores answers and writes none: name another adapter"
        )


def _peft_type(folder: Path) -> str | None:
    return _peft_config(folder).get("peft_type")


def _peft_config(folder: Path) -> dict[str, Any]:
    try:
        held = json.loads((folder / PEFT_CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise InvalidError(f"{str(folder / PEFT_CONFIG)!r} cannot be read: {error}") from error
    return held if isinstance(held, dict) else {}


def _targets(trained: Trained) -> str | list[str]:
    return trained.target_modules if isinstance(trained.target_modules, str) else list(trained.target_modules)


def _size(weight: Any) -> int:
    quantized = getattr(weight, "quant_state", None)
    return math.prod(quantized.shape) if quantized is not None else weight.numel()
