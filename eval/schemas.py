"""The words of measuring: a data set of cases, what came back for each, and a run, which is a file that others compare with."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, computed_field, model_validator

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
    long_answer: str = ""  # what a yes, no or maybe was concluded from
    kind: CaseKind = "span"
    answerable: bool = True
    turns: tuple[Turn, ...] = ()
    slices: dict[str, str] = {}


class DataSet(Frozen):
    """`documents` is empty for a collection that is there already; then `Case.relevant` names paths of it.

    `lines`: of a case in a file of lines, by its id.
    """

    name: str
    documents: tuple[Document, ...]
    cases: tuple[Case, ...]
    lines: dict[str, int] = {}


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


class _Run(Frozen):
    facts: RunFacts

    @computed_field  # type: ignore[prop-decorator]  # mypy takes no decorator on top of a property
    @property
    def configuration(self) -> dict[str, Any]:
        """That of `facts`, where a reader of the file looks for it."""
        return self.facts.configuration

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> Any:
        return {key: one for key, one in value.items() if key != "configuration"} if isinstance(value, dict) else value


class RetrievalRun(_Run):
    """`counts`: of `cases`, of those `left_out` since no document is known to be relevant, of `documents`.

    `latency_ms`: p50 and p99 of the client's wait ("client") and of each of the service's stages.
    """

    kind: Literal["retrieval"] = "retrieval"
    metrics: dict[str, float]  # means over the cases; "ndcg@10", "map", "mrr", "recall@100", "precision@10", ...
    counts: dict[str, int] = {}
    latency_ms: dict[str, dict[str, float]] = {}
    cases: tuple[RetrievalCase, ...]


class AnswersRun(_Run):
    """`control`: the same questions without passages ("none"), or with those of another question ("wrong")."""

    kind: Literal["answers"] = "answers"
    control: Literal["none", "wrong"] | None = None
    metrics: dict[str, float]  # means over the cases that have the score
    counts: dict[str, int]  # of cases by score, and of each blame
    latency_ms: dict[str, dict[str, float]] = {}  # p50, p99 and mean of each stage
    tokens: dict[str, float] = {}  # means
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
