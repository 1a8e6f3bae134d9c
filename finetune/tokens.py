"""How many tokens a prompt is, for a model's tokenizer, without the training stack."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from finetune.schemas import Message
from ingest.errors import SettingsError
from service.engine import model_argument

TURN_TOKENS = 8  # that a chat template puts around a message, at most


def token_counter(model: str, models: Path) -> Callable[[Sequence[Message]], int]:
    """`model`: as the engine takes it; a folder with tokenizer.json, or a bundled name. Raises SettingsError."""
    file = Path(model_argument(model, models)) / "tokenizer.json"
    if not file.is_file():
        raise SettingsError(
            f"model {model!r} has no tokenizer.json here to count tokens with; name a folder with --base"
        )
    tokenizer = Tokenizer.from_file(str(file))

    def count(messages: Sequence[Message]) -> int:
        return sum(len(tokenizer.encode(one.content, add_special_tokens=False).ids) + TURN_TOKENS for one in messages)

    return count
