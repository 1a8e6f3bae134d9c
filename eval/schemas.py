"""The words of measuring: a data set of cases, what came back for each, and a run, which is a file that others compare with."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from ingest.schemas import Frozen
from service.records import Turn

CaseKind = Literal["span", "yes_no_maybe", "free"]


class Document(Frozen):
    """A document of a data set; `id` is the data set's own."""

    id: str
    title: str
    text: str


class Case(Frozen):
    """A question and what is known of its answer.

    `relevant`: grade by document id, 1 and more is relevant. `answers`: any of these is right; none where nothing is
    known. `slices`: what to group by, as {"type": "bridge", "language": "zh"}; "language" is always there. `answerable`
    false: the documents do not say, so a refusal is right. `turns`: the conversation before the question.
    """

    id: str
    question: str
    relevant: dict[str, int] = {}
    answers: tuple[str, ...] = ()
    kind: CaseKind = "span"
    answerable: bool = True
    turns: tuple[Turn, ...] = ()
    slices: dict[str, str] = {}


class DataSet(Frozen):
    """`documents` is empty for a collection that is there already; then `Case.relevant` names paths of it."""

    name: str
    documents: tuple[Document, ...]
    cases: tuple[Case, ...]


class Ranked(Frozen):
    """A document found, best first, by its best chunk."""

    document: str
    score: float
    text: str = ""  # of that chunk, where it was kept


class RetrievalCase(Frozen):
    case: Case
    ranked: tuple[Ranked, ...]
    metrics: dict[str, float]
    timings_ms: dict[str, float] = {}


class Passage(Frozen):
    """A passage that the service retrieved for an answer. `document` is the data set's id, or the path where it has none."""

    document: str
    text: str
    score: float
    in_prompt: bool


Blame = Literal["not_in_corpus", "not_retrieved", "lost_by_reranker", "ignored", "cited_wrongly", "truncated"]


class AnswerCase(Frozen):
    """What the service answered, and its scores. A score that could not be had is absent, never 0.

    `blame`: of a bad answer, where it went wrong, `blame_detail` in words (as "found at rank 37"); null for a good one.
    """

    case: Case
    answer: str
    refused: bool
    finish_reason: str
    interaction_id: str
    passages: tuple[Passage, ...] = ()
    citations: tuple[dict[str, Any], ...] = ()
    sentences: tuple[dict[str, Any], ...] = ()
    scores: dict[str, float] = {}
    good: bool
    blame: Blame | None = None
    blame_detail: str = ""
    timings_ms: dict[str, float] = {}
    usage: dict[str, int] = {}
    not_evaluated: dict[str, str] = {}  # score -> why there is none


class RunFacts(Frozen):
    """What a run was made with. `configuration`: of the collection, the adapter, the control, the sample, the seed."""

    name: str
    dataset: str
    created_at: datetime
    configuration: dict[str, Any]
    machine: str = ""
    seconds: float = 0.0


class RetrievalRun(Frozen):
    kind: Literal["retrieval"] = "retrieval"
    facts: RunFacts
    metrics: dict[str, float]  # means over the cases; "ndcg@10", "map", "mrr", "recall@100", "precision@10", ...
    cases: tuple[RetrievalCase, ...]


class AnswersRun(Frozen):
    """`control`: the same questions without passages ("none"), or with those of another question ("wrong")."""

    kind: Literal["answers"] = "answers"
    facts: RunFacts
    control: Literal["none", "wrong"] | None = None
    metrics: dict[str, float]  # means over the cases that have the score
    counts: dict[str, int]  # of cases by score, and of each blame
    cases: tuple[AnswerCase, ...]


Run = Annotated[RetrievalRun | AnswersRun, Field(discriminator="kind")]


class Difference(Frozen):
    """A metric of two runs over the cases that both have: `after` - `before`, with a 95 % interval and a paired test's p."""

    metric: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    p: float
    cases: int
    won: tuple[str, ...]  # ids of cases
    lost: tuple[str, ...]
