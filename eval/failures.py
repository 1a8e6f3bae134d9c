"""Failures of the product that were labelled by reading them, and how far `eval.blame` agrees with the labels.

`sets/failures.jsonl` holds what the bundled model answered wrongly over `examples/`, the distractors here and short documents
like them, under several settings of the collection and the service. A row keeps what a reader needs to judge it and what
`blame` saw of it; its label was written before `blame` was run on it. The questions are in two halves: the classifier may
be changed by what the first one shows.

Labels, as they were read. The first stage that lost the answer counts. With the passage that says it in the prompt: *ignored*,
when the answer is another part of that passage, made up or garbled; *cited_wrongly*, when it is what another passage says;
*truncated*, when it was cut off before it said anything of its own, or the prompt's excerpt leaves the answer out. An answer
that was cut off while it repeated itself, or recited another passage, is not *truncated*: more room would not have helped.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self, get_args

from pydantic import model_validator

from eval.blame import Seen, blame
from eval.case_rows import refuse, rows
from eval.schemas import Blame
from ingest.schemas import Frozen

SET = Path(__file__).parent / "sets" / "failures.jsonl"
BAR = 0.8  # of agreement with the labels
CLASSES: tuple[Blame, ...] = get_args(Blame)
Classifier = Callable[[bool, bool, Seen], tuple[Blame, str]]


class Passage(Frozen):
    """A passage that was retrieved, cut to the part around the answer, or to its beginning. `rank` counts from 1."""

    rank: int
    document: str
    text: str
    in_prompt: bool


class Sentence(Frozen):
    """`quotes`: of each citation, the document and the words that it points at."""

    text: str
    quotes: tuple[str, ...] = ()


class Failure(Frozen):
    """A bad answer. `setting`: what it was asked under. `relevant`: documents that say it, also those that are not in the
    collection. `prompt`: what a version that shows excerpts showed of the passages. `unreranked`: in a collection that
    reranks, the ranks of passages of the relevant documents without that. `also`: what a reader could call it as well.
    """

    id: str
    half: Literal["first", "second"]
    setting: str
    question: str
    language: str
    answerable: bool
    gold: tuple[str, ...]
    relevant: tuple[str, ...]
    passages: tuple[Passage, ...]
    prompt: str = ""
    unreranked: tuple[int, ...] = ()
    answer: str
    refused: bool
    sentences: tuple[Sentence, ...]
    seen: Seen
    label: Blame
    also: Blame | None = None
    why: str

    @model_validator(mode="after")
    def _has_two_names(self) -> Self:
        if self.also == self.label:
            raise ValueError(f"also is {self.also!r}, as the label is")
        return self


class Agreement(NamedTuple):
    """`share`: of the failures whose class is the label. `allowing`: whose class is the label or what it could be as well.

    `kappa`: what is left of the agreement beyond chance (Cohen 1960), 1 for all. `commonest`: the share that one who always
    says the commonest label would have. `confusion`: counts by (label, class).
    """

    failures: int
    share: float
    allowing: float
    kappa: float
    commonest: float
    confusion: dict[tuple[Blame, Blame], int]

    def recall(self, label: Blame) -> float | None:
        """Of the failures with this label, the share that gets it; None where there are none."""
        held = sum(count for (one, _), count in self.confusion.items() if one == label)
        return self.confusion.get((label, label), 0) / held if held else None


def read_failures(path: Path = SET) -> tuple[Failure, ...]:
    """Raises InvalidError with every row that does not fit, OSError."""
    read, refused = dict[str, Failure](), list[str]()
    for place, one in rows(path, Failure, refused):
        if one.id in read:
            refused.append(f"{place}: id {one.id!r} is that of an earlier line")
        read[one.id] = one
    refuse(path, refused)
    return tuple(read.values())


def agreement(failures: Sequence[Failure], classify: Classifier = blame) -> Agreement:
    """`failures`: at least one."""
    said = [(one, classify(one.answerable, one.refused, one.seen)[0]) for one in failures]
    labels, classes = Counter(one.label for one in failures), Counter(found for _, found in said)
    whole = len(failures)
    share = sum(found == one.label for one, found in said) / whole
    chance = sum(labels[name] * classes[name] for name in CLASSES) / whole**2
    return Agreement(
        failures=whole,
        share=share,
        allowing=sum(found in (one.label, one.also) for one, found in said) / whole,
        kappa=(share - chance) / (1 - chance) if chance < 1 else 1.0,
        commonest=max(labels.values()) / whole,
        confusion=dict(Counter((one.label, found) for one, found in said)),
    )


def disagreements(failures: Sequence[Failure], classify: Classifier = blame) -> list[tuple[Failure, Blame, str]]:
    """-> the failures whose class is not their label, with the class and its words."""
    said = [(one, *classify(one.answerable, one.refused, one.seen)) for one in failures]
    return [(one, found, words) for one, found, words in said if found != one.label]


def confusion_table(found: Agreement) -> str:
    """Labels down, classes across, in Markdown."""
    head = ["label \\ class", *CLASSES, "all"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for label in CLASSES:
        counts = [found.confusion.get((label, one), 0) for one in CLASSES]
        rows.append([label, *(str(count or "") for count in counts), str(sum(counts))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
