"""An encoder (Devlin et al., 2019) as something to train: from safetensors, or out of the ONNX file that the CPU runtimes read.

The bundled models travel as ONNX with eight-bit weights. Their values are read through OpenVINO, made float32 again, and put
where their names say; matrices whose names an export has dropped go where the bias that follows them in the graph says. What
comes out is compared with the file itself.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.errors import InvalidError, SettingsError
from ingest.model_files import onnx_file, read_tokenizer
from ingest.runtime import model_inputs, session

KNOWN = ("bert", "roberta", "xlm-roberta")  # architectures that `encoder_onnx` writes
LEAST_ALIKE = 0.95  # cosine of what was read to what the file gives; eight-bit activations alone leave .98 and more
HEAD_SIZES = (32, 64)
MOST_WEIGHTS = 2**29 - 2**20  # four bytes each, in a file of less than 2 GiB
HEAD = re.compile(r"(^|\.)(pooler|classifier)\.")
TABLES = (
    "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight",
    "embeddings.token_type_embeddings.weight",
    "encoder.layer.0.intermediate.dense.bias",
)
PROBES = (
    "The impeller of the pump is made of white iron.",
    "How many days of annual leave does an employee have?",
    "A short one",
)
Array = NDArray[Any]


def load_encoder(folder: Path, with_head: bool = False) -> Any:
    """-> a transformers model in float32: the bare encoder, or with a head of one logit. Raises InvalidError, SettingsError."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoModelForSequenceClassification
    from transformers.utils.logging import disable_progress_bar

    from finetune.train import quiet

    quiet()
    disable_progress_bar()
    if not any(folder.glob("*.safetensors")):
        return _from_onnx(folder, with_head).train()
    if (found_type := _model_type(folder)) not in KNOWN:
        raise InvalidError(
            f"the model in {str(folder)!r} is a {found_type!r}; what can be tuned and exported is {', '.join(KNOWN)}"
        )
    kind = AutoModelForSequenceClassification if with_head else AutoModel
    options: dict[str, Any] = {"num_labels": 1} if with_head else {"add_pooling_layer": False}
    try:
        model, found = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise InvalidError(f"the model in {str(folder)!r} cannot be loaded: {error}") from error
    missing = [
        name for name in found["missing_keys"] if not (with_head and HEAD.search(name))
    ]  # a new one begins at random
    if missing:
        raise InvalidError(f"the model in {str(folder)!r} lacks {len(missing)} of its weights, as {min(missing)!r}")
    if (size := sum(one.numel() for one in model.parameters())) > MOST_WEIGHTS:
        raise InvalidError(
            f"the model in {str(folder)!r} has {size:,} weights, and an ONNX file holds {MOST_WEIGHTS:,} at most: take a smaller "
            "one"
        )
    return model.train()


def _model_type(folder: Path) -> str | None:
    found = _configuration(folder).get("model_type")
    return None if found is None else str(found)


def _configuration(folder: Path) -> dict[str, Any]:
    try:
        held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidError(f"the model in {str(folder)!r} has no config.json that can be read: {error}") from error
    return held if isinstance(held, dict) else {}


def _from_onnx(folder: Path, with_head: bool) -> Any:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    file = onnx_file(folder)
    if file is None or file.suffix != ".onnx":
        raise SettingsError(
            f"{str(folder)!r} has neither safetensors nor an ONNX file: name a model's folder with --base"
        )
    found = _parameters(file)
    lacking = [name for name in TABLES if name not in found]
    if lacking:
        raise InvalidError(
            f"the ONNX file in {str(folder)!r} is no BERT with names that are known: it has no {lacking[0]!r}; name a folder "
            "with safetensors with --base"
        )
    wanted = "classifier.weight" in found
    if wanted != with_head:
        raise InvalidError(
            f"the model in {str(folder)!r} is {'a reranker' if wanted else 'an embedder'}: name one of the other kind"
        )
    alike, best = -1.0, None
    for size in HEAD_SIZES:
        config = BertConfig(**_shape(found, size, folder), num_labels=1)
        model = BertForSequenceClassification(config) if with_head else BertModel(config, add_pooling_layer=False)
        _fill(model, found, folder)
        likeness = _likeness(model.eval(), folder, file)
        if likeness > alike:
            alike, best = likeness, model
    if alike < LEAST_ALIKE:
        raise InvalidError(
            f"the weights of {str(file)!r} could not be read: what they give is only {alike:.3f} like what the file gives; "
            "name a folder with safetensors with --base"
        )
    return best


def _parameters(file: Path) -> dict[str, Array]:
    """-> float32 arrays by the name that transformers has for them, without the model's prefix."""
    import openvino

    try:
        nodes = openvino.Core().read_model(str(file)).get_ordered_ops()
    except RuntimeError as error:
        raise InvalidError(f"the ONNX file {str(file)!r} cannot be read: {error}") from error
    constants = {node.get_friendly_name(): node for node in nodes if node.get_type_name() == "Constant"}
    found: dict[str, Array] = {}
    for name, node in constants.items():
        plain = name.removesuffix("_quantized")
        product = _after(node, "MatMul") if len(node.get_output_shape(0)) == 2 else None
        if plain.endswith((".weight", ".bias")):
            values = _floats(plain, node, constants)
        elif product is not None and (bias := _bias_after(node)):
            values, plain = _floats(plain, node, constants), f"{bias.removesuffix('.bias')}.weight"
        else:
            continue
        is_turned = product is not None and not product.get_attributes()["transpose_b"]  # as x @ W, not x @ W.T
        found[short_name(plain)] = values.T if is_turned else values
    return found


def short_name(name: str) -> str:
    """-> without the prefix that a model with a head, or a library around it, puts before it."""
    return re.sub(r"^(bert|roberta|model|0\.auto_model|auto_model)\.", "", name)


def _floats(plain: str, node: Any, constants: dict[str, Any]) -> Array:
    values = np.asarray(node.get_data())
    scale = constants.get(f"{plain}_scale")
    if scale is None:
        return values.astype(np.float32)
    zero = constants.get(f"{plain}_zero_point")
    offset = np.asarray(zero.get_data()).astype(np.float32) if zero is not None else np.float32(0)
    return (values.astype(np.float32) - offset) * np.asarray(scale.get_data(), np.float32)


def _after(node: Any, kind: str) -> Any | None:
    """-> the first node of this kind that its values go through, within a few steps."""
    seen = [node]
    for _ in range(8):
        seen = [target.get_node() for one in seen for target in one.output(0).get_target_inputs()]
        for one in seen:
            if one.get_type_name() == kind:
                return one
    return None


def _bias_after(node: Any) -> str | None:
    """-> the name of the bias that is added to the product with this matrix."""
    added = _after(node, "Add")
    names = [added.input_value(at).get_node().get_friendly_name() for at in range(2)] if added is not None else []
    return next((name for name in names if name.endswith(".bias")), None)


def _shape(found: dict[str, Array], head: int, folder: Path) -> dict[str, Any]:
    """-> fields of a BertConfig: what the weights say, and of the rest what the folder says."""
    words, width = found["embeddings.word_embeddings.weight"].shape
    said: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        held = _configuration(folder)
        said = {name: held[name] for name in ("layer_norm_eps", "hidden_act", "pad_token_id") if name in held}
    return {
        **said,
        "vocab_size": words,
        "hidden_size": width,
        "num_attention_heads": max(1, width // head),
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in found if name.startswith("encoder.layer.")),
        "intermediate_size": found["encoder.layer.0.intermediate.dense.bias"].size,
        "max_position_embeddings": len(found["embeddings.position_embeddings.weight"]),
        "type_vocab_size": len(found["embeddings.token_type_embeddings.weight"]),
    }


def _fill(model: Any, found: dict[str, Array], folder: Path) -> None:
    import torch

    for name, parameter in model.named_parameters():
        values = found.get(short_name(name))
        if values is None or values.shape != tuple(parameter.shape):
            raise InvalidError(
                f"the ONNX file in {str(folder)!r} has no weights for {name!r}: name a folder with safetensors with --base"
            )
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)))


def _likeness(model: Any, folder: Path, file: Path) -> float:
    """The least cosine of the first token's states, or one less the largest difference of a head's probabilities."""
    texts = [read_tokenizer(folder).encode(text) for text in PROBES]
    inputs = model_inputs(texts)
    given = session(file, "onnxruntime", 1)(inputs)
    made = forward(model, inputs)
    if given.ndim == 3:
        given, made = given[:, 0], made[:, 0]
        products = (given * made).sum(1) / (np.linalg.norm(given, axis=1) * np.linalg.norm(made, axis=1))
        return float(products.min())
    return float(1 - np.abs(1 / (1 + np.exp(-given)) - 1 / (1 + np.exp(-made))).max())


def forward(model: Any, inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
    """-> hidden states (texts, tokens, width), or logits (texts, 1), as torch computes them."""
    import torch

    given = {key: torch.from_numpy(value) for key, value in inputs.items()}
    if model.config.model_type != "bert":
        del given["token_type_ids"]
    with torch.no_grad():
        result = model(**given)
    return np.asarray((result.logits if hasattr(result, "logits") else result.last_hidden_state).numpy(), np.float32)


def copy_tokenizer(
    source: Path, target: Path, names: Sequence[str] = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
) -> None:
    import shutil

    for name in (*names, "special_tokens_map.json", "LICENSE", "NOTICE"):
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
