"""Rows for the benchmarks of training, made on the spot: facts about machine parts that nobody makes, in serving's prompt.

Seeded: the same rows in each run. Held-out rows are about parts that no training row asks about or shows.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eval.schemas import Document
from finetune.preferences import preference_rows
from finetune.rows import write_rows
from finetune.rows_questions import hit
from finetune.schemas import KtoRow, Message, Method, PreferenceRow, Provenance, Row, SftRow
from service.prompt import build, refusal

PROMPT = "tuned-1"
PARTS, HELD_OUT = 60, 10  # of which each gives a row for each of PROPERTIES
REFUSED = 4  # every so many rows, the passage with the answer is missing
SYLLABLES = ("ar", "bel", "cor", "dan", "el", "fir", "gos", "hul", "im", "jor", "kal", "lun", "mer", "nor", "os", "pel")
KINDS = ("pump", "valve", "gearbox", "compressor", "blower", "mixer", "conveyor", "centrifuge")
PROPERTIES = {
    "What is the {part} made of?": ("cast bronze", "duplex steel", "grey iron", "polyamide", "titanium", "ceramic"),
    "How often is the {part} serviced?": tuple(f"every {hours:,} hours" for hours in range(500, 6500, 250)),
    "How hot may the {part} get?": tuple(f"{degrees} °C" for degrees in range(60, 240, 5)),
    "What is the order number of the {part}'s seal?": tuple(f"S-{number}" for number in range(1013, 9999, 97)),
}
SAYS = (
    "The {part} is made of {0}. It is serviced {1} and may get as hot as {2}. "
    "Its seal has the order number {3}, and comes with two spare rings."
)


class Files(NamedTuple):
    """Rows to train on and held-out ones, of one method."""

    learn: Path
    held_out: Path


def write(folder: Path, method: Method) -> Files:
    """200 rows that train and 40 that do not, less those that give no pair; for a reward model a pair for each fault."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(17)
    parts = _parts(chance)
    files = Files(folder / f"{method}.jsonl", folder / f"{method}-held-out.jsonl")
    for file, some in zip(files, (parts[HELD_OUT:], parts[:HELD_OUT]), strict=True):
        rows = [row for number in range(len(some)) for row in _rows(number, some, chance)]
        write_rows(_of_method(rows, method), file)
    return files


class _Part(NamedTuple):
    name: str
    values: tuple[str, ...]  # one for each of PROPERTIES

    def document(self) -> Document:
        return Document(id=self.name, title=self.name, text=SAYS.format(*self.values, part=self.name))


def _parts(chance: random.Random) -> list[_Part]:
    names: dict[str, None] = {}
    while len(names) < PARTS:
        name = "".join(chance.sample(SYLLABLES, 2)).capitalize()
        names[f"{name} {chance.choice('ABCDK')}{chance.randint(10, 99)} {chance.choice(KINDS)}"] = None
    return [_Part(name, tuple(chance.choice(values) for values in PROPERTIES.values())) for name in names]


def _rows(number: int, among: Sequence[_Part], chance: random.Random) -> list[SftRow]:
    """About one of the parts; the others stand beside it."""
    part, rows = among[number], []
    for n, (question, value) in enumerate(zip(PROPERTIES, part.values, strict=True)):
        asked = question.format(part=part.name)
        others = chance.sample([one for one in among if one is not part], 3)
        refused = (number + n) % REFUSED == 0
        shown = others if refused else [part, *others[:2]]
        chance.shuffle(shown)
        said = refusal(asked) if refused else f"{value} [{shown.index(part) + 1}]"
        messages = build(PROMPT, asked, [], [hit(one.document()) for one in shown])
        source = Provenance(
            documents=tuple(one.name for one in shown), kind="refusal" if refused else "answer", question=asked
        )
        rows.append(
            SftRow(
                prompt=tuple(Message.model_validate(one) for one in messages),
                completion=(Message(role="assistant", content=said),),
                source=source,
            )
        )
    return rows


def _of_method(rows: Sequence[SftRow], method: Method) -> Sequence[Row]:
    if method == "sft":
        return rows
    pairs = preference_rows(rows, seed=17, every=method == "reward")
    return pairs if method in ("dpo", "reward") else [one for pair in pairs for one in _labelled(pair)]


def _labelled(pair: PreferenceRow) -> tuple[KtoRow, KtoRow]:
    return (
        KtoRow(prompt=pair.prompt, completion=pair.chosen, label=True, source=pair.source),
        KtoRow(prompt=pair.prompt, completion=pair.rejected, label=False, source=pair.source),
    )
