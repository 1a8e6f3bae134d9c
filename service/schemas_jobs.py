"""What travels over HTTP of jobs: what is asked of them, how far they are, and the engine that makes room for one."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator

from ingest.reader import ReaderSpec
from ingest.schemas import Chunking, Frozen, Progress, Report
from service.records import JobKind
from service.schemas import CollectionName, Groups, Label, Request, Text, storable
from service.tuning import LossPoint, TuneProgress, TuneResult, Waiting

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Place = Annotated[Text, Field(min_length=1, max_length=4096)]
Metadata = Annotated[dict[str, Any], AfterValidator(storable)]


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


Holder = Annotated[Text, Field(min_length=1, max_length=200)]


class PauseRequest(Request):
    """The engine is stopped for this long; asking again before it is over lengthens it. Each `holder` has a pause of its own."""

    seconds: Annotated[float, Field(ge=1, le=3600)] = 60
    why: Annotated[Text, Field(min_length=1, max_length=200)] = "training"
    holder: Holder = "admin"


class ResumeRequest(Request):
    """Ends the pause of `holder` and no other; the engine comes back when none is left."""

    holder: Holder = "admin"


class EngineView(Frozen):
    state: Literal["starting", "up", "down", "stopped", "paused"]
    detail: str
    paused_seconds: float | None = None  # that are left
    holders: tuple[str, ...] = ()  # of the pause
