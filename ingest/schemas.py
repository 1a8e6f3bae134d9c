"""The words of this domain: what a document is once read, how it is split, and what a search gives back."""

import hashlib
import json
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

NAMESPACE = uuid.UUID("6f0d6f4c-5d0a-5d8e-9a35-0c5a3f2f7a11")  # fixed for good: every document and chunk id hangs on it
Stage = Literal["read", "parse", "chunk", "embed", "write"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Chunking(Frozen):
    """How a document is split. `tokens` are the embedder's own."""

    strategy: Literal["sentence"] = "sentence"
    tokens: Annotated[int, Field(ge=16, le=8192)] = 224
    overlap: Annotated[int, Field(ge=0, le=1024)] = 0


class Retrieval(Frozen):
    """How a collection is searched: `dense_weight` of the fused score, `candidates` taken from each side before fusion."""

    dense_weight: Annotated[float, Field(ge=0, le=1)] = 0.7
    candidates: Annotated[int, Field(ge=1, le=1000)] = 100
    top_k: Annotated[int, Field(ge=1, le=50)] = 5
    rerank: bool = False


class PageSpan(Frozen):
    """Page `number` (from 1) covers text[start:end], in code points."""

    number: int
    start: int
    end: int


class Heading(Frozen):
    """A heading of `level` 1 to 6 whose line starts at code point `start`."""

    level: int
    start: int
    title: str


class ParsedText(Frozen):
    """A document's text with its structure; offsets everywhere point into `text`, in code points."""

    text: str
    mime: str
    pages: tuple[PageSpan, ...] = ()
    headings: tuple[Heading, ...] = ()
    metadata: dict[str, Any] = {}

    def content_address(self) -> str:
        """sha256 (hex) over text and structure."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class Chunk(Frozen):
    """A stretch of a document's text: text[start:end] == self.text."""

    id: str
    ordinal: int
    text: str
    start: int
    end: int
    page: int | None
    heading: str | None
    language: str


class SparseVector(Frozen):
    indices: list[int]
    values: list[float]


class Hit(Frozen):
    """A chunk found for a question, with the scores that ranked it."""

    chunk_id: str
    document_id: str
    path: str
    text: str
    start: int
    end: int
    page: int | None = None
    heading: str | None = None
    language: str | None = None
    metadata: dict[str, Any] = {}
    dense_score: float | None = None  # cosine, -1 to 1; None: not among the dense candidates
    sparse_score: float | None = None  # BM25; None: not among the sparse candidates
    score: float  # fused, 0 to 1
    rerank_score: float | None = None  # cross-encoder, 0 to 1


class Failure(Frozen):
    path: str
    stage: Stage
    reason: str


class Skip(Frozen):
    path: str
    reason: str


class FileCounts(Frozen):
    done: int = 0
    unchanged: int = 0
    moved: int = 0
    deleted: int = 0
    skipped: int = 0
    failed: int = 0


class ChunkCounts(Frozen):
    added: int = 0
    kept: int = 0
    deleted: int = 0


class Report(Frozen):
    """What an ingest job did. `seconds`: total, and by stage (a stage's time overlaps the others')."""

    files: FileCounts = FileCounts()
    chunks: ChunkCounts = ChunkCounts()
    seconds: dict[str, float] = {}
    failures: tuple[Failure, ...] = ()
    skips: tuple[Skip, ...] = ()
    languages: dict[str, int] = {}
    notes: tuple[str, ...] = ()


class Progress(Frozen):
    """How far an ingest job is. `files_total` is known once the folder has been walked."""

    files_total: int | None = None
    files: int = 0
    chunks: int = 0
    current: str | None = None


def document_id(collection: str, uri: str, n: int) -> str:
    """`n` counts the documents first seen at `uri`, so that an id survives a move and a new file under the old name."""
    return str(uuid.uuid5(NAMESPACE, json.dumps([collection, uri, n])))


def chunk_id(document: str, text: str, occurrence: int) -> str:
    """An unchanged stretch keeps its id wherever it moves in the document; `occurrence` tells repeated ones apart."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return str(uuid.uuid5(NAMESPACE, f"{document}:{digest}:{occurrence}"))
