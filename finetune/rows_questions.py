"""Rows of question sets (SQuAD and its dialects, PubMedQA, BeerQA): a question over the passages that answer it, in the prompt
that serving builds. Simple ones, without other passages among them; `graft dataset raft` makes harder ones.
"""

from pathlib import Path

from eval.cases import read_dataset
from eval.schemas import Case, Document
from finetune.dataset import target
from finetune.schemas import Message, Provenance, SftRow
from ingest.schemas import Hit
from service.prompt import build, built_in


def question_rows(path: Path, version: str) -> list[SftRow]:
    """Raises InvalidError, NotFoundError for the version, OSError."""
    dataset = read_dataset(path)
    most = built_in(version).passages
    documents = {one.id: one for one in dataset.documents}
    rows, near = list[SftRow](), list(dataset.documents[:1])
    for case in dataset.cases:
        shown = [documents[one] for one, grade in case.relevant.items() if grade > 0][:most]
        near = shown[:1] or near  # a question that has no answer stands behind those of its paragraph
        if said := target(case):
            rows.append(_row(case, said, shown or near, version))
    return rows


def hit(document: Document, text: str | None = None) -> Hit:
    """A document of a data set as the service would have found it."""
    body = document.text if text is None else text
    return Hit(
        chunk_id=document.id,
        document_id=document.id,
        path=document.id,
        text=body,
        start=0,
        end=len(body),
        heading=document.title or None,
        score=1.0,
    )


def _row(case: Case, said: str, shown: list[Document], version: str) -> SftRow:
    messages = build(version, case.question, case.turns, [hit(one) for one in shown])
    if case.answerable and "[1]" in messages[-1]["content"]:  # the passages have numbers, so it cites them
        said = " ".join([said, *(f"[{n}]" for n, _ in enumerate(shown, 1))])
    return SftRow(
        prompt=tuple(Message(role=one["role"], content=one["content"]) for one in messages),
        completion=(Message(role="assistant", content=said),),
        source=Provenance(
            id=case.id,
            documents=tuple(one.id for one in shown),
            kind="answer" if case.answerable else "refusal",
            question=case.question,
        ),
    )
