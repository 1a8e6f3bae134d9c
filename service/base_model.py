"""What is known of the model that the engine serves: its names, the shapes of its matrices, its tokenizer and template.

Adapters are compared with it. Reads files only; the engine is asked elsewhere.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from ingest.errors import SettingsError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SAMPLES, SAMPLE_BYTES = 16, 4096  # of each weights file, for its fingerprint


class BaseModel(NamedTuple):
    """`identity` stays the same wherever the weights lie: the hub name where it is known, else a fingerprint of them.

    `root` is what the engine was started with; `shapes`: module -> (out, in) of every matrix, None for one stored packed.
    """

    identity: str
    root: str
    hub_name: str | None
    folder: Path | None
    shapes: Mapping[str, tuple[int, int] | None]


@lru_cache(maxsize=4)
def read_base(root: str, substitute: Path | None) -> BaseModel:
    """`substitute`: a folder with the same model, where `root` is a path of another machine. Raises SettingsError."""
    folder = next(
        (one for one in (Path(root), substitute) if one is not None and (one / "config.json").is_file()), None
    )
    if folder is None:
        if not HUB_NAME.fullmatch(root):
            raise SettingsError(
                f"the engine's model {root!r} is no folder of this machine, so that adapters cannot be compared with it; "
                "set SERVICE_LLM_MODEL_FOLDER to a folder with the same model"
            )
        return BaseModel(root, root, root, None, _shapes_of_hub(root))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SettingsError(f"model folder {str(folder)!r} holds no safetensors file to compare adapters with")
    hub_name = root if HUB_NAME.fullmatch(root) and not Path(root).is_dir() else hub_name_of(folder)
    try:
        shapes = dict(pair for file in files for pair in _shapes_of_file(file))
    except (OSError, SafetensorError) as error:
        raise SettingsError(f"the weights in {str(folder)!r} cannot be read: {error}") from error
    return BaseModel(hub_name or _fingerprint(folder, files), root, hub_name, folder, shapes)


def window(folder: Path) -> int | None:
    """-> tokens that a prompt and its answer may have; None where config.json does not say, or stretches its positions. Raises
    SettingsError.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        config = config.get("text_config") or config
        found = config.get("model_max_length") or config.get("max_position_embeddings")
        rope = config.get("rope_parameters") or config.get("rope_scaling")
    except (OSError, ValueError, AttributeError) as error:
        raise SettingsError(f"{str(folder / 'config.json')!r} cannot be read: {error}") from error
    return None if not isinstance(found, int) or "factor" in json.dumps(rope) else found


def chat_template(folder: Path) -> str | None:
    """The template that a model's or an adapter's folder carries. Raises ValueError for a broken file."""
    with suppress(FileNotFoundError):
        return (folder / "chat_template.jinja").read_text()
    with suppress(FileNotFoundError):
        held = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
        if isinstance(held, list):
            held = next((one.get("template") for one in held if one.get("name") == "default"), None)
        return held if isinstance(held, str) else None
    return None


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> id of the tokenizer that a folder carries. Raises ValueError for a broken file."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"tokenizer.json cannot be read: {error}") from error


def hub_name_of(folder: Path) -> str | None:
    """What the card of a bundled model says."""
    with suppress(OSError, ValueError, AttributeError):
        name = json.loads((folder / "graft-model.json").read_text()).get("hub_name")
        return name if isinstance(name, str) else None
    return None


def _shapes_of_file(file: Path) -> Iterator[tuple[str, tuple[int, int] | None]]:
    with safe_open(str(file), framework="numpy") as weights:
        for name in weights.keys():  # noqa: SIM118 - not a mapping
            module, _, last = name.rpartition(".")
            shape = weights.get_slice(name).get_shape()
            if last == "weight" and len(shape) == 2:
                quantized = weights.get_slice(name).get_dtype() in {"U8", "I8", "I32"}
                yield module, None if quantized else (shape[0], shape[1])
            elif last in {"qweight", "weight_packed"}:
                yield module, None


def _shapes_of_hub(name: str) -> dict[str, tuple[int, int] | None]:
    """By the headers of the hub's files, without their weights."""
    from huggingface_hub import get_safetensors_metadata

    try:
        files = get_safetensors_metadata(name).files_metadata.values()
    except Exception as error:  # the hub client raises OSError, ValueError and its own kinds
        raise SettingsError(
            f"the hub says nothing of the engine's model {name!r} ({error}); set SERVICE_LLM_MODEL_FOLDER to a folder with it"
        ) from error
    shapes: dict[str, tuple[int, int] | None] = {}
    for file in files:
        for tensor, info in file.tensors.items():
            module, _, last = tensor.rpartition(".")
            if last == "weight" and len(info.shape) == 2:
                shapes[module] = None if info.dtype in {"U8", "I8", "I32"} else (info.shape[0], info.shape[1])
            elif last in {"qweight", "weight_packed"}:
                shapes[module] = None
    return shapes


def _fingerprint(folder: Path, files: list[Path]) -> str:
    """Of the configuration and of samples of the weights: enough to tell one fine-tuned model from another."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size}".encode())
        with file.open("rb") as weights:
            for at in range(SAMPLES):
                weights.seek(at * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(weights.read(SAMPLE_BYTES))
    return f"weights-{digest.hexdigest()[:16]}"
