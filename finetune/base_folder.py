"""The model that a run starts from: its folder, by whatever name it is given."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ingest.errors import SettingsError
from service.base_model import HUB_NAME, hub_name_of
from service.engine import model_argument
from service.settings import ServiceSettings

BUNDLED: str = ServiceSettings.model_fields["model"].default
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
                   "tokenizer.model", "vocab.json", "merges.txt")  # fmt: skip


def find_base(name: str | None, models: Path) -> Path:
    """`name`: a folder, a folder below `models`, the hub name of one there, else fetched from the hub; None: the bundled
    chat model. Raises SettingsError.
    """
    found = model_argument(name or BUNDLED, models)
    if (Path(found) / "config.json").is_file():
        return Path(found)
    if not HUB_NAME.fullmatch(found):
        there = sorted(path.parent.name for path in models.glob("*/config.json"))
        raise SettingsError(
            f"there is no model {found!r}: give a folder with config.json, a hub name, or one of {', '.join(there) or 'none'} "
            f"in {str(models)!r}; `make models` fetches the bundled ones"
        )
    bundled = (path.parent for path in sorted(models.glob("*/config.json")) if hub_name_of(path.parent) == found)
    return next(bundled, None) or _from_hub(found)


def revision(folder: Path) -> str | None:
    """-> of a bundled model what its card says, of one from the hub the commit; None where nothing says it."""
    card = _card(folder / "graft-model.json")
    if "version" in card:
        return f"{card.get('source')} {card['version']}"
    return folder.name if folder.parent.name == "snapshots" else None


def tokenizer_digest(folder: Path) -> str:
    """-> SHA-256 over the files that turn a conversation into tokens."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        file = folder / name
        if file.is_file():
            digest.update(f"{name} {file.stat().st_size}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _card(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except Exception as error:  # the hub client raises OSError, ValueError and its own kinds
        raise SettingsError(
            f"the hub does not give the model {name!r} ({error}); give a folder with it as the base instead"
        ) from error
