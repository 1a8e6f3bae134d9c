"""What travels over HTTP: requests, replies and events. The service answers with these and the client reads them."""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ingest.generations import Generation
from ingest.reader import ReaderSpec
from ingest.schemas import Chunking, Frozen, Hit, Progress, Report, Retrieval
from service.records import JobKind, Source, Turn
from service.tuning import LossPoint, TuneProgress, TuneResult, Waiting

FilterValue = str | Annotated[int, Field(ge=-(2**63), lt=2**63)] | bool
FILTER_FIELDS = ("document_id", "path", "language")
METADATA_FIELD = re.compile(r"metadata(\.[\w-]+)+")  # what the index takes for a path unquoted
JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]


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


def _storable(metadata: dict[str, Any]) -> dict[str, Any]:
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
        _storable(filters)
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


Place = Annotated[Text, Field(min_length=1, max_length=4096)]
Metadata = Annotated[dict[str, Any], AfterValidator(_storable)]


class IngestRequest(Request):
    """`path`: a folder, a file, or a URL; or, in its place, a LlamaIndex `reader`. `only`: these files and folders of it
    alone. `restore`: documents that were deleted by their ids come back.

    `acl` (groups) and `metadata` are set on the documents of this job; left out, documents keep what they have.
    """

    path: Place | None = None
    reader: ReaderSpec | None = None
    collection: CollectionName = "default"
    only: Annotated[tuple[Place, ...], Field(max_length=10_000)] = ()
    allow_empty: bool = False
    restore: bool = False
    acl: Groups | None = None
    metadata: Metadata | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.reader is None):
            raise ValueError("name a path or a reader")
        return self


class UploadFields(Request):
    """The fields of an upload's form beside its files."""

    collection: CollectionName = "default"
    acl: Groups | None = None
    metadata: Metadata | None = None

    @classmethod
    def of_form(cls, form: Mapping[str, Any]) -> Self:
        """`acl` and `metadata` as JSON. Raises RequestValidationError, as a body that does not fit does."""
        try:
            return cls.model_validate({key: _from_json(key, value) for key, value in form.items() if value})
        except ValidationError as error:
            raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from error


def _from_json(key: str, value: Any) -> Any:
    if key == "collection" or not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


class ReindexRequest(Request):
    """What is left out stays as it is. `flip`: make it live at the end; else it is kept ready."""

    embedder: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    chunking: Chunking | None = None
    flip: bool = True


class MoveRequest(Request):
    """Of an index: `target` is a folder for Parquet, or a store as `chroma:PATH#NAME`."""

    target: Place


class Job(Frozen):
    """`progress` and `report` are of jobs that write documents; `tuning`, `curve` and `result` of trainings.

    `waiting_for`: what keeps it from going on; `hint` says what helps. `curve`: the losses so far, of one job alone.
    """

    job_id: str
    kind: JobKind
    state: JobState
    collection: str
    path: str
    created_at: datetime
    progress: Progress
    report: Report | None = None
    tuning: TuneProgress | None = None
    curve: tuple[LossPoint, ...] = ()
    result: TuneResult | None = None
    waiting_for: Waiting | None = None
    hint: str | None = None
    error: str | None = None


TuneSetting = Annotated[Text, Field(max_length=4096, pattern=r"^\s*([a-z]+\.)?[A-Za-z_][A-Za-z0-9_]*\s*=")]


class TuneRequest(Request):
    """`recipe`: the name of one of the product's; `settings`: changes to it, as "max_steps=200". `data`: a file or folder of
    rows, or the name of a data set in `datasets` of GRAFT_HOME. `label` begins the adapter's name.

    At the end the adapter is checked against the engine, registered, and, with `activate`, made the one of `collection`;
    without a collection, the live one of all others. `pause_engine`: the engine may be stopped while the
    training needs its memory.
    """

    recipe: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
    settings: Annotated[tuple[TuneSetting, ...], Field(max_length=100)] = ()
    data: Place
    collection: CollectionName | None = None
    label: Label | None = None
    check: bool = True
    register_it: Annotated[bool, Field(alias="register")] = True
    activate: bool = False
    pause_engine: bool = False

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.activate and not (self.check and self.register_it):
            raise ValueError(
                "activate needs check and register: an adapter answers once it was compared with its training"
            )
        return self


class PauseRequest(Request):
    """The engine is stopped for this long; asking again before it is over lengthens it."""

    seconds: Annotated[float, Field(ge=1, le=3600)] = 60
    why: Annotated[Text, Field(min_length=1, max_length=200)] = "training"


class EngineView(Frozen):
    state: Literal["starting", "up", "down", "stopped", "paused"]
    detail: str
    paused_seconds: float | None = None  # that are left


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


class RegisterRequest(Request):
    """`path`: a PEFT LoRA folder; `label` begins its name, left out the folder's own."""

    path: Annotated[Text, Field(min_length=1, max_length=4096)]
    label: Label | None = None


class ActivateRequest(Request):
    """`collection`: give this one an adapter of its own; left out, the live adapter of all others changes."""

    collection: CollectionName | None = None
    why: Annotated[Text, Field(max_length=2_000)] | None = None


class RollbackRequest(ActivateRequest):
    """To the adapter before, or to the bare base; for a collection the base means: follow the live adapter again."""

    to: Literal["previous", "base"] = "previous"


class Checked(Frozen):
    """An adapter's answers in the engine, compared with PEFT's. `digest`: of the weights, configuration and base that were
    compared, as the registry has it. `difference`: mean absolute difference of log-probabilities; `base_difference`: of the
    bare model, the same way. `changed`: of the `prompts`, those that the engine answers otherwise with the adapter than
    without, in words or in probabilities. `why_not`: where it has not passed.
    """

    at: datetime
    passed: bool
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    dtype: Annotated[Text, Field(max_length=32)]
    difference: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    bound: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    base_difference: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    tokens_equal: bool
    prompts: Annotated[int, Field(ge=1)]
    changed: Annotated[int, Field(ge=0)]
    engine: Annotated[Text, Field(max_length=512)]
    why_not: Annotated[Text, Field(max_length=2_000)] | None = None


Standing = Literal["passed", "failed", "no"]


class AdapterView(Frozen):
    """`base`: the model that it was compared with; `size` in bytes. `checked`: whether its answers are known to be PEFT's;
    null where another tool made it and nobody looked.

    `live`: it answers for every collection without an adapter of its own; `collections`: it is their own.
    """

    name: str
    label: str
    digest: str
    base: str
    rank: int
    target_modules: tuple[str, ...]
    size: int
    parent: str | None
    principal: str
    created_at: datetime
    checked: Standing | None
    manifest: dict[str, Any] | None
    live: bool
    collections: tuple[str, ...]


class Move(Frozen):
    """One move of a pointer; `to_name` null is the bare base, or for a collection: follow the live pointer."""

    seq: int
    at: datetime
    principal: str
    role: Literal["answer"]
    collection: str | None
    kind: Literal["activate", "rollback"]
    from_name: str | None
    to_name: str | None
    why: str | None


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
