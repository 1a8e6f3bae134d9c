"""What travels over HTTP: requests, replies and events. The service answers with these and the client reads them."""

import json
import re
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from ingest.generations import Generation
from ingest.schemas import Chunking, Frozen, Hit, Retrieval
from service.records import Source, Turn

FilterValue = str | Annotated[int, Field(ge=-(2**63), lt=2**63)] | bool
FILTER_FIELDS = ("document_id", "path", "language")
METADATA_FIELD = re.compile(r"metadata(\.[\w-]+)+")  # what the index takes for a path unquoted


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("is not valid Unicode") from error
    return text


def _said(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def _not_a_probe(label: str) -> str:
    if label.startswith("graft-probe"):
        raise ValueError("is kept for the adapters that an engine is tried with")
    return label


def storable(metadata: dict[str, Any]) -> dict[str, Any]:
    _encodable(json.dumps(metadata, ensure_ascii=False, allow_nan=False))
    return metadata


Text = Annotated[str, AfterValidator(_encodable)]
Question = Annotated[str, Field(max_length=8_000), AfterValidator(_encodable), AfterValidator(_said)]
CollectionName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
PromptName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,63}$")]
AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,127}$")]
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"), AfterValidator(_not_a_probe)]
Groups = Annotated[list[Annotated[Text, Field(min_length=1, max_length=128)]], Field(max_length=100)]


class Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RetrieveRequest(Request):
    """`collections` in place of `collection`: all of them are searched. `retrieval`: in place of the collections' settings."""

    question: Question
    collection: CollectionName = "default"
    collections: Annotated[tuple[CollectionName, ...], Field(min_length=2, max_length=10)] | None = None
    retrieval: Retrieval | None = None
    filters: dict[str, FilterValue | list[FilterValue]] = {}
    top_k: Annotated[int, Field(ge=1, le=100)] | None = None

    @field_validator("filters")
    @classmethod
    def _known(cls, filters: dict[str, Any]) -> dict[str, Any]:
        storable(filters)
        for field, value in filters.items():
            if field not in FILTER_FIELDS and not METADATA_FIELD.fullmatch(field):
                known = ", ".join((*FILTER_FIELDS, "metadata.*"))
                raise ValueError(f"has no field {field!r}; there are {known}")
            if value == []:
                raise ValueError(f"field {field!r} lists no value")
        return filters

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        if self.collections is not None:
            if "collection" in self.model_fields_set:
                raise ValueError("name a collection or several collections, not both")
            if len(set(self.collections)) < len(self.collections):
                raise ValueError("collections: each is named once")
        return self

    def names(self) -> tuple[str, ...]:
        """Of the collections that are searched; an answer takes what is said once from the first."""
        return self.collections or (self.collection,)


class SearchRequest(RetrieveRequest):
    """`POST /retrieve`. Grouped by document, a document scores as its best chunk. `index`: of the collection, in place of the
    live one; the first characters of its fingerprint will do.
    """

    group_by: Literal["document"] | None = None
    index: Annotated[str, Field(pattern=r"^[0-9a-f]{4,64}$")] | None = None


class QueryRequest(RetrieveRequest):
    """`POST /query`. `adapter`: leave it out for the collection's or the live one; null is the bare base.

    `messages`: the turns before. `previous`: the interaction of the last of them, whose cited chunks stay candidates.
    `search`: what to search for in place of the question, which is asked as it is all the same.
    """

    messages: Annotated[list[Turn], Field(max_length=50)] = []
    previous: Annotated[Text, Field(min_length=1, max_length=64)] | None = None
    search: Question | None = None
    max_tokens: Annotated[int, Field(ge=1, le=8192)] | None = None
    adapter: AdapterName | None = None
    source: Source = "user"
    stream: bool = False
    without_passages: bool = False

    @model_validator(mode="after")
    def _control(self) -> Self:
        if self.without_passages and self.source != "eval":
            raise ValueError('without_passages is a control of evaluations: it needs "source": "eval"')
        return self


class Citation(Frozen):
    """The span of a document that best supports a sentence of the answer.

    `start` and `end` are code points in the stored text (`GET /documents/{id}/text`); `score` is the share of the
    sentence's content words found in the quote. `by`: "model" wrote `[n]`, or "match" attributed it afterwards. `n` is
    the passage's number; further quotes of a passage get numbers of their own.
    """

    n: int
    document_id: str
    path: str
    page: int | None
    heading: str | None
    quote: str
    start: int
    end: int
    score: float
    by: Literal["model", "match"]


Unsupported = Literal["number", "words", "citation"]


class Sentence(Frozen):
    """A sentence of the answer: answer[start:end] == text. `citations`: the `n` of each that supports it.

    `unsupported` says why one is not `supported`: a number or name that its sources do not hold; words of which they hold
    too little; or a `[n]` that is no passage of the prompt, or not one that says so. Refusals, questions and greetings
    claim nothing, and are supported without a citation.
    """

    text: str
    start: int
    end: int
    citations: tuple[int, ...] = ()
    supported: bool = True
    unsupported: Unsupported | None = None


class Answer(Frozen):
    """`search`: what was searched for, where that was not the question alone. `notes`: what of the question or of the
    collections their embedders do not read; that an adapter answers to another prompt than its own.
    """

    answer: str
    sentences: tuple[Sentence, ...]
    citations: tuple[Citation, ...]
    collection: str
    collections: tuple[str, ...] | None = None
    adapter: str | None
    usage: dict[str, int]
    timings_ms: dict[str, float]
    finish_reason: str
    search: str | None = None
    interaction_id: str
    notes: tuple[str, ...] = ()


class Retrieved(Frozen):
    """`reranked`: hits that the cross-encoder read, of all that were candidates. `notes`: as an answer's."""

    hits: tuple[Hit, ...]
    timings_ms: dict[str, float]
    reranked: int = 0
    notes: tuple[str, ...] = ()


class CollectionSettings(Request):
    """What `PUT /collections/{name}` sets; what is left out stays, or gets its default."""

    embedder: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    chunking: Chunking | None = None
    retrieval: Retrieval | None = None
    prompt: PromptName | None = None  # "auto", a version, or a name, which stands for its newest version of now
    adapter: AdapterName | None = None
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None


class CollectionView(Frozen):
    name: str
    embedder: str
    chunking: Chunking
    fingerprint: str
    retrieval: Retrieval
    prompt: str
    adapter: str | None
    threshold: float | None
    created_at: datetime
    documents: int
    chunks: int


class IndexView(Generation):
    """An index of a collection; `chunks` in it."""

    chunks: int


class DocumentView(Frozen):
    id: str
    collection: str
    path: str
    state: str
    stage: str | None
    reason: str | None
    size: int
    mime: str | None
    chunks: int
    pages: int | None
    languages: dict[str, int]
    acl: tuple[str, ...]
    metadata: dict[str, Any]
    indexed_at: datetime | None


class FeedbackRequest(Request):
    """At least one of rating, comment and correction."""

    interaction_id: Annotated[str, Field(max_length=64)]
    rating: Literal["up", "down"] | None = None
    comment: Annotated[Text, Field(max_length=10_000)] | None = None
    correction: Annotated[Text, Field(max_length=32_000)] | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.rating is None and self.comment is None and self.correction is None:
            raise ValueError("say something: rating, comment or correction")
        return self


class PromptRequest(Request):
    """`template`: a prompt as a TOML file holds it (docs/answers.md)."""

    template: Annotated[Text, Field(max_length=64_000)]


class PromptView(Frozen):
    """A version of a prompt, which never changes. Those `built_in` are files of the product."""

    version: str
    name: str
    number: int
    source: str
    built_in: bool
    created_at: datetime | None = None
    principal: str | None = None


class PromptMove(Frozen):
    """One move of a collection's prompt, from and to "auto" or a version."""

    seq: int
    at: datetime
    principal: str
    collection: str
    kind: Literal["use", "rollback"]
    from_version: str
    to_version: str


class Dependency(Frozen):
    """`off`: not in use, and nothing waits for it."""

    state: Literal["ok", "starting", "down", "off"]
    detail: str = ""


class Ready(Frozen):
    ready: bool
    dependencies: dict[str, Dependency]


class Problem(Frozen):
    """Every error reply. `errors` names the fields of a 422."""

    detail: str
    errors: tuple[dict[str, str], ...] = ()
