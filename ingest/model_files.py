"""A model's folder: where it is found, what its card says, its tokenizer."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict
from tokenizers import Tokenizer

from ingest.errors import SettingsError
from ingest.schemas import Frozen
from ingest.settings import IngestSettings

ONNX_FILES = ("model.onnx", "onnx/model.onnx", "openvino/openvino_model.xml", "openvino_model.xml")


class ModelCard(Frozen):
    """`graft-model.json` of a model folder: what its files do not say themselves."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    pooling: Literal["cls", "mean"] = "mean"
    normalize: bool = True
    query_prefix: str = ""
    document_prefix: str = ""
    languages: tuple[str, ...] = ("*",)
    max_tokens: int = 512


def find_model(name: str, settings: IngestSettings) -> Path:
    """-> the local folder of a model; a hub name is fetched. Raises SettingsError."""
    for folder in (settings.models / name, Path(name).expanduser()):
        if folder.is_dir():
            return folder
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "onnx/model.onnx", "model.onnx", "1_Pooling/*", "*.txt", "*.model"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises OSError, ValueError and its own kinds
        raise SettingsError(
            f"model {name!r} is neither a folder in {settings.models} nor a path, and the hub did not give it: {error}; "
            "`make models` fetches the bundled ones"
        ) from error


def onnx_file(folder: Path) -> Path | None:
    """-> the file that a CPU runtime reads, if the folder has one."""
    return next((folder / one for one in ONNX_FILES if (folder / one).is_file()), None)


def read_card(name: str, folder: Path) -> ModelCard:
    """From `graft-model.json`, else from the folder's sentence-transformers files. Raises SettingsError."""
    own = folder / "graft-model.json"
    try:
        if own.is_file():
            return ModelCard.model_validate_json(own.read_text())
        pooling: dict[str, Any] = {}
        if (folder / "1_Pooling/config.json").is_file():
            pooling = json.loads((folder / "1_Pooling/config.json").read_text())
        limit = 512
        if (folder / "sentence_bert_config.json").is_file():
            limit = json.loads((folder / "sentence_bert_config.json").read_text()).get("max_seq_length") or limit
        prompts: dict[str, str] = {}
        if (folder / "config_sentence_transformers.json").is_file():
            prompts = json.loads((folder / "config_sentence_transformers.json").read_text()).get("prompts") or {}
    except ValueError as error:
        raise SettingsError(f"model folder {str(folder)!r} has a broken configuration: {error}") from error
    return ModelCard(
        name=name,
        pooling="cls" if pooling.get("pooling_mode_cls_token") or pooling.get("pooling_mode") == "cls" else "mean",
        query_prefix=prompts.get("query", ""),
        document_prefix=prompts.get("document", prompts.get("passage", "")),
        max_tokens=limit,
    )


def read_tokenizer(folder: Path) -> Tokenizer:
    """Neither pads nor truncates. Raises SettingsError."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the Rust library raises plain Exception
        raise SettingsError(f"model folder {str(folder)!r} has no usable tokenizer.json: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
