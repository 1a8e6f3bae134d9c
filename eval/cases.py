"""A data set's files -> cases, and the documents that they are asked of. The layout is told from what is there."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field

from eval.case_rows import Loose, lines, load_json, refuse, rows
from eval.cases_json import reader_of
from eval.schemas import Case, CaseKind, DataSet, Document
from ingest.errors import InvalidError
from ingest.language import detect, reads
from ingest.schemas import Frozen
from service.records import Turn
from service.schemas import Question, Text

LAYOUTS = """a data set is one of
  a folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv (BEIR), each also as .gz
  a JSON file of SQuAD's, PubMedQA's or BeerQA's layout, or of `graft dataset split`
  a JSONL file of {"question", "relevant"}, for a collection that is there already"""
RARE = 0.02  # of the questions: fewer in a language beside a neighbour of theirs are taken for wrongly told
Id = Annotated[str, Field(validation_alias=AliasChoices("_id", "id"))]


class _Document(Loose):
    id: Id
    title: Text | None = None
    text: Text = ""


class _Query(Loose):
    id: Id
    text: Question


class _Asked(Frozen):
    """A line of questions for a collection; `relevant` names paths of it, alone or each with its grade."""

    id: Annotated[str, Field(min_length=1)] | None = None
    question: Question
    relevant: list[Text] | dict[Text, Annotated[int, Field(ge=0)]] = []
    answers: list[Text] = []
    kind: CaseKind = "span"
    answerable: bool = True
    turns: list[Turn] = []
    language: str | None = None
    type: str | None = None


def read_dataset(path: Path | str, split: str | None = None, limit: int | None = None, seed: int = 0) -> DataSet:
    """`split`: of a BEIR folder, needed where it has several. `limit`: that many cases, drawn by `seed`, in the order of
    the file; the documents are all there. Raises InvalidError (with every row that does not fit), OSError.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise InvalidError(f"--limit {limit} leaves no case; give at least 1")
    if not path.exists():
        raise InvalidError(f"{str(path)!r} does not exist; {LAYOUTS}")
    if path.is_dir():
        found = _beir(path, split)
    elif split is not None:
        raise InvalidError(f"{str(path)!r} has no splits; leave --split away")
    else:
        found = _file(path)
    if not found.cases:
        raise InvalidError(f"{str(path)!r} holds no question")
    cases = found.cases
    if limit is not None and limit < len(cases):
        chosen = sorted(random.Random(seed).sample(range(len(cases)), limit))
        cases = tuple(cases[at] for at in chosen)
    return found.model_copy(update={"cases": _with_languages(cases)})


def _file(path: Path) -> DataSet:
    suffixes = [one for one in path.suffixes if one in {".json", ".jsonl", ".gz"}]
    name, refused = path.name.removesuffix("".join(suffixes)), list[str]()
    if ".jsonl" in suffixes:
        found = _questions(path, name, refused)
    else:
        content = load_json(path) if ".json" in suffixes else None
        read = reader_of(content)
        if read is None:
            raise InvalidError(f"{str(path)!r} is of no known layout; {LAYOUTS}")
        found = read(content, name, refused)
    refuse(path, refused)
    return found


def _questions(path: Path, name: str, refused: list[str]) -> DataSet:
    cases: dict[str, Case] = {}
    numbers: dict[str, int] = {}
    for place, row in rows(path, _Asked, refused):
        number = int(place.rpartition(":")[2])
        identity = row.id or f"line {number}"
        if identity in cases:
            refused.append(f"{place}: id {identity!r} is that of an earlier line")
        numbers[identity] = number
        relevant = row.relevant if isinstance(row.relevant, dict) else dict.fromkeys(row.relevant, 1)
        cases[identity] = Case(
            id=identity,
            question=row.question,
            relevant=relevant,
            answers=tuple(row.answers),
            kind=row.kind,
            answerable=row.answerable,
            turns=tuple(row.turns),
            slices={key: value for key, value in (("language", row.language), ("type", row.type)) if value},
        )
    return DataSet(name=name, documents=(), cases=tuple(cases.values()), lines=numbers)


def _beir(folder: Path, split: str | None) -> DataSet:
    """The queries of a split are those that it judges. Source: Thakur et al., 2021."""
    corpus, queries = _plain_or_gz(folder / "corpus.jsonl"), _plain_or_gz(folder / "queries.jsonl")
    if corpus is None or queries is None or not (folder / "qrels").is_dir():
        raise InvalidError(f"folder {str(folder)!r} is of no known layout; {LAYOUTS}")
    chosen, qrels = _split(folder / "qrels", split)
    refused: list[str] = []
    documents: dict[str, Document] = {}
    for place, document in rows(corpus, _Document, refused):
        if document.id in documents:
            refused.append(f"{place}: id {document.id!r} is that of an earlier line")
        documents[document.id] = Document(id=document.id, title=document.title or "", text=document.text)
    questions: dict[str, str] = {}
    for place, query in rows(queries, _Query, refused):
        if query.id in questions:
            refused.append(f"{place}: id {query.id!r} is that of an earlier line")
        questions[query.id] = query.text
    judged = _judgements(qrels, questions, documents, refused)
    refuse(folder, refused)
    cases = (Case(id=key, question=text, relevant=judged[key]) for key, text in questions.items() if key in judged)
    return DataSet(name=f"{folder.resolve().name}/{chosen}", documents=tuple(documents.values()), cases=tuple(cases))


def _split(folder: Path, wanted: str | None) -> tuple[str, Path]:
    """-> (its name, its file). Raises InvalidError."""
    found = {one.name.removesuffix(".gz").removesuffix(".tsv"): one for one in sorted(folder.glob("*.tsv*"))}
    if wanted is None and len(found) == 1:
        wanted = next(iter(found))
    if wanted is None or wanted not in found:
        there = ", ".join(found) or "none"
        asked = "choose one with --split" if wanted is None else f"{wanted!r} is none of them"
        raise InvalidError(f"{str(folder)!r} has these splits: {there}; {asked}")
    return wanted, found[wanted]


def _judgements(
    path: Path, questions: Mapping[str, str], documents: Mapping[str, Document], refused: list[str]
) -> dict[str, dict[str, int]]:
    """-> grade by document, by query. A first line without a grade is a header."""
    judged: dict[str, dict[str, int]] = {}
    for number, line in lines(path):
        fields = line.split("\t")
        grade = _grade(fields[-1])
        if number == 1 and grade is None:
            continue
        said = _misfit(fields, grade, questions, documents)
        if said is None and grade is not None:
            held = judged.setdefault(fields[0], {}).setdefault(fields[1], grade)
            said = None if held == grade else f"grade {grade} contradicts an earlier line's {held}"
        if said:
            refused.append(f"{path.name}:{number}: {said}")
    return judged


def _misfit(
    fields: Sequence[str], grade: int | None, questions: Mapping[str, str], documents: Mapping[str, Document]
) -> str | None:
    if len(fields) != 3:
        return f"{len(fields)} columns between tabs, not query, document and grade"
    if grade is None:
        return f"grade {fields[2]!r} is no whole number"
    if fields[0] not in questions:
        return f"query {fields[0]!r} is not among the queries"
    return None if fields[1] in documents else f"document {fields[1]!r} is not in the corpus"


def _grade(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _plain_or_gz(path: Path) -> Path | None:
    return next((one for one in (path, path.with_name(f"{path.name}.gz")) if one.is_file()), None)


def _with_languages(cases: Sequence[Case]) -> tuple[Case, ...]:
    """Each with the language of its question, unless it was given. A few in a neighbour of the commonest language are taken
    for it: a question is short.
    """
    told = [one.slices.get("language") or detect(one.question) for one in cases]
    counts = Counter(told)
    common = counts.most_common(1)[0][0]
    languages = [
        common
        if "language" not in one.slices and counts[language] < RARE * len(cases) and reads((common,), one.question)
        else language
        for one, language in zip(cases, told, strict=True)
    ]
    return tuple(
        one.model_copy(update={"slices": {**one.slices, "language": language}})
        for one, language in zip(cases, languages, strict=True)
    )
