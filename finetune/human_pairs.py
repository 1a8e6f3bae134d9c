"""Pairs that people compared, in parts that share no question: what is learned, and what measures it.

Files are read by `finetune.rows`: hh-rlhf transcripts, or rows in any format for preferences. People ask the same thing in nearly
the same words, with one name changed for another, so a pair goes where its opening goes: the first thing that the person says,
and everything that is nearly the same as it.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eval.answer_metrics import cmrc_words
from finetune.groups import connected
from finetune.rows import read_rows
from finetune.rows_lines import rows_of
from finetune.rows_split import normal, split_rows
from finetune.schemas import PreferenceRow, Row, Rows, SftRow
from ingest.errors import InvalidError

NEAR = 0.7  # of the words of two openings, the share that both have, from which on they are the same question


class Parts(NamedTuple):
    """Of all pairs: two halves to learn from, and what is held out. `openings`: how many different ones there are."""

    a: Rows
    b: Rows
    held_out: Rows
    openings: int


def read_pairs(path: Path) -> Rows:
    """Each pair's question (`source.question`) is the opening that it hangs together with, by which `split_rows` splits.

    Raises InvalidError with every line that does not fit.
    """
    rows = read_rows(path, "dpo")
    texts = [opening(row) for row in rows.rows]
    named = list(rows.rows)
    for group in connected(_keys(texts)):
        for at in group:
            source = rows.rows[at].source.model_copy(update={"question": texts[group[0]]})
            named[at] = rows.rows[at].model_copy(update={"source": source})
    made = rows_of(named, rows.places, rows.name, rows.prompt_version)
    return made.model_copy(update={"left_out": rows.left_out})


def part(rows: Rows, held_out: float, seed: int) -> Parts:
    """`held_out`: a share. Raises InvalidError where a part would be empty."""
    learn, measured = split_rows(rows, held_out, seed)
    a, b = split_rows(learn, 0.5, seed)
    openings = len({row.source.question for row in rows.rows})
    for name, one in (("first half", a), ("second half", b), ("held-out part", measured)):
        if not one.rows:
            raise InvalidError(
                f"the pairs of {rows.name!r} cannot be split: they have {openings} different openings, and the {name} would "
                "be empty; give more pairs, or another share with --held-out"
            )
    return Parts(a, b, measured, openings)


def opening(row: Row) -> str:
    """The first thing that the user says."""
    return next((one.content for one in row.prompt if one.role == "user"), row.prompt[0].content)


def chosen_answers(rows: Rows) -> Rows:
    """The answers that people preferred, as rows to imitate."""
    made = [
        SftRow(prompt=row.prompt, completion=row.chosen, source=row.source)
        for row in rows.rows
        if isinstance(row, PreferenceRow)
    ]
    return rows_of(made, rows.places, rows.name)


def _keys(texts: Sequence[str]) -> list[list[tuple[str, str]]]:
    """-> of each text its words, and a key for each text that it is nearly the same as."""
    words = [frozenset(cmrc_words(normal(text))) for text in texts]
    keys = [[("words", " ".join(cmrc_words(normal(text))) or text)] for text in texts]
    for one, other in _near(words):
        keys[one].append(("near", f"{one} {other}"))
        keys[other].append(("near", f"{one} {other}"))
    return keys


def _near(sets: Sequence[frozenset[str]]) -> list[tuple[int, int]]:
    """-> pairs whose Jaccard similarity is at least NEAR. Two such sets share one of their rarest words (prefix filtering:
    Chaudhuri et al., 2006), so only those that do are compared.
    """
    count = Counter(word for one in sets for word in one)
    holding: dict[str, list[int]] = defaultdict(list)
    found = []
    for at, one in enumerate(sets):
        rarest = sorted(one, key=lambda word: (count[word], word))
        rarest = rarest[: len(one) - math.ceil(NEAR * len(one)) + 1]
        for other in dict.fromkeys(before for word in rarest for before in holding[word]):
            if len(one & sets[other]) >= NEAR * len(one | sets[other]):
                found.append((other, at))
        for word in rarest:
            holding[word].append(at)
    return found
