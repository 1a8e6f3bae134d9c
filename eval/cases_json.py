"""Data sets that are one JSON file: SQuAD and its dialects (XQuAD, DRCD, COVID-QA), PubMedQA, BeerQA, and our own, which
`graft dataset split` writes.
"""

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from eval.case_rows import Loose, place
from eval.schemas import Case, DataSet, Document
from service.schemas import Question

Content = TypeVar("Content")


def _said(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


Said = Annotated[str, AfterValidator(_said)]


class _Answer(Loose):
    text: str


class _Asked(Loose):
    id: str
    question: Question
    answers: list[_Answer] = []
    is_impossible: bool = False


class _Paragraph(Loose):
    context: Said
    id: str | None = None
    document_id: str | None = None
    qas: list[_Asked]


class _Article(Loose):
    title: str = ""
    paragraphs: list[_Paragraph]


class _Squad(Loose):
    data: list[_Article]


class _Abstract(Loose):
    question: Question = Field(alias="QUESTION")
    contexts: list[str] = Field(alias="CONTEXTS", min_length=1)
    labels: list[str] = Field([], alias="LABELS")
    long_answer: str = Field("", alias="LONG_ANSWER")
    final_decision: Literal["yes", "no", "maybe"]


class _Hops(Loose):
    id: str
    question: Question
    answers: list[str] = []
    context: list[tuple[str, Said]]
    src: str = ""


class _Beer(Loose):
    data: list[_Hops]


def reader_of(content: Any) -> Callable[[Any, str, list[str]], DataSet] | None:
    """-> what reads it: (content, name, what is refused) -> data set. None: it is of no layout that is known here."""
    data = content.get("data") if isinstance(content, dict) else None
    first = data[0] if isinstance(data, list) and data and isinstance(data[0], dict) else {}
    if "paragraphs" in first:
        return squad
    if "context" in first and "question" in first:
        return beerqa
    if isinstance(content, dict) and {"documents", "cases"} <= content.keys():
        return own
    if isinstance(content, dict) and any(isinstance(one, dict) and "QUESTION" in one for one in content.values()):
        return pubmedqa
    return None


def squad(content: Any, name: str, refused: list[str]) -> DataSet:
    """Each distinct paragraph is a document, without its article's title: that would tell it apart from those of other
    articles, and in XQuAD it is English in every language. A question that is impossible (SQuAD 2) has no relevant one.
    """
    checked = _checked(TypeAdapter(_Squad), content, refused)
    documents, cases = _Documents(), list[Case]()
    for at, article in enumerate(checked.data if checked else ()):
        for number, paragraph in enumerate(article.paragraphs):
            own = paragraph.id or paragraph.document_id
            found = documents.add(own or f"{article.title or at}/{number}", "", paragraph.context)
            told = article.title.replace("_", " ") or paragraph.document_id
            cases.extend(
                Case(
                    id=one.id,
                    question=one.question,
                    relevant={} if one.is_impossible else {found: 1},
                    answers=() if one.is_impossible else _distinct(answer.text for answer in one.answers),
                    answerable=not one.is_impossible,
                    slices={"document": told} if told else {},
                )
                for one in paragraph.qas
            )
    return DataSet(name=name, documents=documents.all(), cases=_unique(cases, refused))


def pubmedqa(content: Any, name: str, refused: list[str]) -> DataSet:
    """A document is an abstract without its conclusion, which is the long answer, and without its title, which is often
    the question. Source: Jin et al., 2019.
    """
    checked = _checked(TypeAdapter(dict[str, _Abstract]), content, refused)
    documents, cases = _Documents(), list[Case]()
    for pmid, one in (checked or {}).items():
        labels = [*one.labels, *[""] * len(one.contexts)]
        parts = [f"{label}: {part}" if label else part for label, part in zip(labels, one.contexts, strict=False)]
        cases.append(
            Case(
                id=pmid,
                question=one.question,
                relevant={documents.add(pmid, "", "\n\n".join(parts)): 1},
                answers=(one.final_decision,),
                long_answer=one.long_answer,
                kind="yes_no_maybe",
                slices={"type": one.final_decision},
            )
        )
    return DataSet(name=name, documents=documents.all(), cases=tuple(cases))


def beerqa(content: Any, name: str, refused: list[str]) -> DataSet:
    """All paragraphs of a question's context are relevant; a question of several hops needs all of them. Source: Qi et al.,
    2021.
    """
    checked = _checked(TypeAdapter(_Beer), content, refused)
    documents, cases = _Documents(), list[Case]()
    for one in checked.data if checked else ():
        relevant = {documents.add(title, title, text): 1 for title, text in one.context}
        slices = {"type": one.src} if one.src else {}
        answers = _distinct(one.answers)
        cases.append(Case(id=one.id, question=one.question, relevant=relevant, answers=answers, slices=slices))
    return DataSet(name=name, documents=documents.all(), cases=_unique(cases, refused))


def own(content: Any, name: str, refused: list[str]) -> DataSet:
    """A `DataSet` as it is, under the name that it has."""
    return _checked(TypeAdapter(DataSet), content, refused) or DataSet(name=name, documents=(), cases=())


class _Documents:
    """Distinct ones, each under an id of its own: that of another text gets a number behind it."""

    def __init__(self) -> None:
        self._ids: dict[tuple[str, str], str] = {}
        self._documents: dict[str, Document] = {}

    def add(self, wanted: str, title: str, text: str) -> str:
        """-> its id, that of an earlier one where there was the same."""
        if (title, text) not in self._ids:
            identity, number = wanted, 1
            while identity in self._documents:
                number += 1
                identity = f"{wanted}#{number}"
            self._ids[title, text] = identity
            self._documents[identity] = Document(id=identity, title=title, text=text)
        return self._ids[title, text]

    def all(self) -> tuple[Document, ...]:
        return tuple(self._documents.values())


def _checked(layout: TypeAdapter[Content], content: Any, refused: list[str]) -> Content | None:
    try:
        return layout.validate_python(content)
    except ValidationError as error:
        refused.extend(f"{place(one['loc'])}: {one['msg']}" for one in error.errors(include_url=False))
        return None


def _unique(cases: list[Case], refused: list[str]) -> tuple[Case, ...]:
    seen: set[str] = set()
    for one in cases:
        if one.id in seen:
            refused.append(f"id {one.id!r} is that of two questions")
        seen.add(one.id)
    return tuple(cases)


def _distinct(answers: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one for one in answers if one.strip()))
