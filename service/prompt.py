"""Question + passages -> chat messages. Pure: the same arguments give the same messages, in serving and in training.

A version is never changed once it has been served; a better prompt gets a new version. Those of the product are files in
`prompts/`: `cited` for models that follow instructions, `brief` for models of a few hundred million parameters, `plain` for
a question without passages. Those that users add are in the store, which gives their templates (`service.prompt_store`).
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from ingest.errors import NotFoundError
from ingest.schemas import Hit
from service.excerpt import best_sentence as best_sentence
from service.records import Turn
from service.refusal import REFUSAL as REFUSAL
from service.refusal import REFUSAL_ZH as REFUSAL_ZH
from service.refusal import refusal as refusal
from service.template import Message as Message
from service.template import Template

CURRENT = {"brief": "brief-2", "cited": "cited-2"}  # by style, what "auto" chooses
CLOSED = "plain-1"  # of a question that is asked without passages
_FILES = Path(__file__).parent / "prompts"


def build(
    version: str,
    question: str,
    turns: Sequence[Turn],
    passages: Sequence[Hit],
    template_of: Callable[[str], Template] | None = None,
) -> list[Message]:
    """The messages for `question` after `turns`, with `passages` best first. `template_of`: a store's, for versions that
    users added. Raises NotFoundError.
    """
    return (template_of or built_in)(version).messages(question, turns, passages)


@cache
def built_in(version: str) -> Template:
    """Raises NotFoundError."""
    if version not in built_in_versions():
        raise NotFoundError(f"there is no prompt {version!r}; there are {', '.join(built_in_versions())}")
    return Template.of(source_of(version))


def source_of(version: str) -> str:
    """The file of a version of the product's own."""
    return (_FILES / f"{version}.toml").read_text(encoding="utf-8")


@cache
def built_in_versions() -> tuple[str, ...]:
    """By name, oldest first."""
    found = (path.stem.rpartition("-") for path in _FILES.glob("*.toml"))
    return tuple(f"{name}-{number}" for name, _, number in sorted(found, key=lambda one: (one[0], int(one[2]))))
