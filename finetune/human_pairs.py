"""Pairs that people compared, in parts that share no question: what is learned, and what measures it.

Files are read by `finetune.rows`: hh-rlhf transcripts, or rows in any format for preferences. People ask the same thing in nearly
the same words, with one name changed for another, so a pair goes where its opening goes: the first thing that the person says,
and everything that is nearly the same as it.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

from eval.answer_metrics import cmrc_words
from eval.groups import connected
from finetune.rows import read_rows
from finetune.rows_lines import rows_of
from finetune.rows_split import normal, split_rows
from finetune.schemas import PreferenceRow, PromptRow, Row, Rows, SftRow
from ingest.errors import InvalidError

NEAR = 0.7  # of the words of two openings, the share that both have, from which on they are the same question


class Parts(NamedTuple):
    """Of all pairs: two halves to learn from, and what is held out. `openings`: how many different ones there are."""

    a: Rows
    b: Rows
    held_out: Rows
    openings: int


def read_pairs(path: Path, measured: Sequence[Row] = ()) -> Rows:
    """Each pair's question (`source.question`) is the opening that it hangs together with, by which `split_rows` splits. Pairs
    that ask what `measured` asks are left out.

    Raises InvalidError with every line that does not fit.
    """
    rows = apart(read_rows(path, "dpo"), measured)
    named = list(rows.rows)
    for group in connected(_keys(named)):
        for at in group:
            source = rows.rows[at].source.model_copy(update={"question": opening(rows.rows[group[0]])})
            named[at] = rows.rows[at].model_copy(update={"source": source})
    made = rows_of(named, rows.places, rows.name, rows.prompt_version)
    return made.model_copy(update={"left_out": rows.left_out})


def apart(rows: Rows, measured: Sequence[Row], nearly: bool = True) -> Rows:
    """-> the rows that ask nothing that `measured` asks, in the same or nearly the same words, and show none of its documents;
    the others are named in `left_out`. Raises InvalidError where none is left.
    """
    keys = _keys([*rows.rows, *measured], nearly)
    taken = set[Hashable]().union(*keys[len(rows.rows) :])
    kept = [at for at in range(len(rows.rows)) if taken.isdisjoint(keys[at])]
    if not kept:
        raise InvalidError(f"every row of {rows.name!r} asks, or shows, what measures: give other rows")
    dropped = [f"{rows.places[at]}: it measures" for at in sorted({*range(len(rows.rows))} - {*kept})]
    made = rows_of([rows.rows[at] for at in kept], [rows.places[at] for at in kept], rows.name, rows.prompt_version)
    return made.model_copy(update={"left_out": (*rows.left_out, *dropped)})


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


def _keys(rows: Sequence[Row], nearly: bool = True) -> list[set[Hashable]]:
    """-> of each row what it shares with rows that ask the same, or nearly, or show the same documents."""
    asked = [_asked(row) for row in rows]
    texts = sorted(set[str]().union(*asked))
    words = [frozenset(cmrc_words(normal(text))) for text in texts]
    keys: dict[str, set[Hashable]] = {text: {("words", one or text)} for text, one in zip(texts, words, strict=True)}
    for one, other in _near(words) if nearly else ():
        for at in (one, other):
            keys[texts[at]].add(("near", one, other))
    return [
        set[Hashable]().union(*(keys[text] for text in own), (("document", name) for name in row.source.documents))
        for row, own in zip(rows, asked, strict=True)
    ]


def _asked(row: Row) -> set[str]:
    known = row.known.question if isinstance(row, PromptRow) else None
    return {text for text in (opening(row), row.source.question, known) if text}


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
