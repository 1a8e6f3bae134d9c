"""A prompt within a budget of tokens: as many passages as fit."""

from collections.abc import Sequence

from ingest.errors import InvalidError
from ingest.schemas import Hit
from service.generate import Generator
from service.records import Turn
from service.template import Message, Template


async def fitted(
    template: Template, question: str, turns: Sequence[Turn], hits: Sequence[Hit], budget: int, generator: Generator
) -> tuple[list[Message], list[Hit]]:
    """-> the messages, and the passages that they hold: passages are left out, from the last one on, until the prompt is
    within `budget` tokens, and within the template's own. Raises InvalidError.

    The last passage stays where the template's own is too small for it: an answer from a longer prompt than the model was
    trained on is better than none.
    """
    own = min(budget, template.tokens or budget)
    passages = list(hits[: template.passages])
    while True:
        messages = template.messages(question, turns, passages)
        wanted = own if len(passages) > 1 else budget
        size = sum(_at_most(message["content"]) + 16 for message in messages)
        if size <= wanted or await generator.count_tokens(messages) <= wanted:
            return messages, passages
        if len(passages) <= 1:
            raise InvalidError(
                f"question and messages leave no room for a passage within {budget} tokens; shorten them, "
                "or raise SERVICE_PROMPT_TOKENS and SERVICE_MAX_MODEL_LEN"
            )
        passages.pop()


def _at_most(text: str) -> int:
    """More tokens than `text` has in any usual vocabulary: one for two bytes of ASCII, one for each byte of the rest.

    Where it is wrong all the same, the engine's own limit, which is wider than the budget, still holds.
    """
    ascii_bytes = len(text.encode("ascii", "ignore"))
    return ascii_bytes // 2 + len(text.encode()) - ascii_bytes
