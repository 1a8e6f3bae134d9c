"""Questions with the passages that answer them, from pairs in JSONL, from data sets, or for a collection; and their split.

Whatever the source, it becomes a data set of documents and cases, as `eval` has it, so that what is tuned is what is measured.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import AliasChoices, Field

from eval.case_rows import Loose, refuse, rows
from eval.cases import read_dataset
from eval.groups import connected
from eval.retrieval_metrics import is_judged
from eval.schemas import Case, DataSet, Document
from finetune.rows_split import normal
from ingest.errors import InvalidError
from service.schemas import Question, Text

FEWEST = 8  # questions
Texts = Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=1000)]


class Asked(NamedTuple):
    """`negatives`: by case, documents that are known to be wrong for it. `digest`: SHA-256 over all of it."""

    dataset: DataSet
    negatives: Mapping[str, tuple[str, ...]]
    digest: str
    is_pairs: bool = False  # texts alone, which are of no collection


class Sides(NamedTuple):
    """Cases to learn from, to stop by, and to measure with; no document and no question is on two sides."""

    learn: tuple[Case, ...]
    stop: tuple[Case, ...]
    held_out: tuple[Case, ...]


class _Pair(Loose):
    """A line of pairs; a passage may stand alone or in a list. Names as sentence-transformers' too."""

    question: Annotated[Question, Field(validation_alias=AliasChoices("question", "query", "anchor"))]
    positive: Annotated[Text, Field(min_length=1)] | None = None
    positives: Texts = []
    negative: Annotated[Text, Field(min_length=1)] | None = None
    negatives: Texts = []


class _Passages(NamedTuple):
    """Of a question in pairs: ids of the passages that answer it, and that do not. `case`: the first line that asks it."""

    case: str
    question: str
    right: set[str]
    wrong: set[str]


def read_asked(path: Path, split: str | None = None, most: int | None = None, seed: int = 0) -> Asked:
    """Raises InvalidError with every row that does not fit, OSError."""
    if not path.exists():
        raise InvalidError(f"{str(path)!r} does not exist; give --data a file of pairs or a data set")
    found = _pairs(path, split) if _has_pairs(path) else _of(read_dataset(path, split), {})
    cases = tuple(case for case in found.dataset.cases if is_judged(case.relevant))
    if most is not None and most < len(cases):
        chosen = sorted(random.Random(seed).sample(range(len(cases)), most))
        cases = tuple(cases[at] for at in chosen)
    if len(cases) < FEWEST:
        raise InvalidError(
            f"{str(path)!r} holds {len(cases)} questions with a relevant passage: at least {FEWEST} are needed, and some "
            "hundreds to learn anything"
        )
    return found._replace(dataset=found.dataset.model_copy(update={"cases": cases}))


def with_documents(asked: Asked, texts: Mapping[str, str]) -> Asked:
    """Of a collection: its documents, by path. Raises InvalidError where a question names another."""
    missing = {path for case in asked.dataset.cases for path in case.relevant} - texts.keys()
    if missing:
        raise InvalidError(
            f"{asked.dataset.name!r} names documents that the collection does not have, as {min(missing)!r}; "
            "`graft documents list` shows its paths"
        )
    documents = tuple(Document(id=path, title="", text=text) for path, text in texts.items())
    return _of(asked.dataset.model_copy(update={"documents": documents}), asked.negatives)


def split_asked(cases: Sequence[Case], held_out: float, stop: float, seed: int) -> Sides:
    """Cases that share a document, an article or a question stay together. Raises InvalidError where they all do."""
    keys = [
        [*(("document", one) for one, grade in case.relevant.items() if grade > 0), ("question", normal(case.question)),
         *([("article", case.slices["document"])] if "document" in case.slices else [])]
        for case in cases
    ]  # fmt: skip
    groups = [[cases[at] for at in group] for group in connected(keys)]
    chance = random.Random(seed)
    order = chance.sample(sorted(groups, key=lambda group: group[0].id), len(groups))
    sides: list[list[Case]] = [[], []]
    learn: list[Case] = []
    wanted = [held_out * len(cases), stop * len(cases)]
    for group in order:
        side = next((at for at in (0, 1) if len(sides[at]) + len(group) / 2 <= wanted[at]), None)
        (learn if side is None else sides[side]).extend(group)
    if not learn or not sides[0]:
        raise InvalidError(
            f"{len(cases)} questions cannot be split, for they are all about the same documents: give more, or other shares with "
            "--set held_out=0.3"
        )
    return Sides(tuple(learn), tuple(sides[1]), tuple(sides[0]))


def _has_pairs(path: Path) -> bool:
    """Whether the first line of a JSONL file names a positive passage."""
    if path.is_dir() or ".jsonl" not in path.suffixes:
        return False
    from eval.case_rows import lines

    first = next((line for _, line in lines(path)), "")
    return '"positive"' in first or '"positives"' in first


def _pairs(path: Path, split: str | None) -> Asked:
    if split is not None:
        raise InvalidError(f"{str(path)!r} has no splits; leave --split away")
    refused: list[str] = []
    documents: dict[str, Document] = {}
    held: dict[str, _Passages] = {}  # by question: lines that ask the same are one case

    def document(text: str) -> str:
        identity = hashlib.sha256(normal(text).encode()).hexdigest()[:16]
        documents.setdefault(identity, Document(id=identity, title="", text=text))
        return identity

    for place, row in rows(path, _Pair, refused):
        right = {document(text) for text in [*([row.positive] if row.positive else []), *row.positives]}
        wrong = {document(text) for text in [*([row.negative] if row.negative else []), *row.negatives]}
        if not right:
            refused.append(
                f"{place}: no passage that answers the question: give it as positive, or several as positives"
            )
        first = _Passages(f"line {place.rpartition(':')[2]}", row.question, set(), set())
        found = held.setdefault(normal(row.question), first)
        found.right.update(right)
        found.wrong.update(wrong)
        if found.right & found.wrong:
            at = "" if found is first else f", with {found.case} for the same question"
            refused.append(f"{place}: a passage is both positive and negative{at}")
    refuse(path, refused)
    cases = tuple(
        Case(id=one.case, question=one.question, relevant=dict.fromkeys(sorted(one.right), 1)) for one in held.values()
    )
    dataset = DataSet(name=path.name.partition(".")[0], documents=tuple(documents.values()), cases=cases)
    return _of(dataset, {one.case: tuple(sorted(one.wrong)) for one in held.values()})._replace(is_pairs=True)


def _of(dataset: DataSet, negatives: Mapping[str, tuple[str, ...]]) -> Asked:
    digest = hashlib.sha256(dataset.model_dump_json().encode("utf-8", "surrogatepass"))
    digest.update(repr(sorted(negatives.items())).encode())
    return Asked(dataset, negatives, digest.hexdigest())
