"""The words of this domain: what a document is once read, how it is split, and what a search gives back."""

import hashlib
import json
import uuid
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

NAMESPACE = uuid.UUID("6f0d6f4c-5d0a-5d8e-9a35-0c5a3f2f7a11")  # fixed for good: every document and chunk id hangs on it
Stage = Literal["read", "parse", "chunk", "embed", "write"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Strategy = Literal["sentence", "token", "heading", "semantic", "hierarchical", "code", "table", "page"]


class Chunking(Frozen):
    """How a document is split. `tokens` are the embedder's own. `parent_tokens`: of a `hierarchical` chunk's parent.

    `headers`: each chunk is embedded and searched under its document's title (else path) and its heading path.
    """

    strategy: Strategy = "sentence"
    tokens: Annotated[int, Field(ge=16, le=8192)] = 224
    overlap: Annotated[int, Field(ge=0, le=1024)] = 0
    parent_tokens: Annotated[int, Field(ge=32, le=32_768)] | None = None
    headers: bool = False

    @model_validator(mode="after")
    def _parent(self) -> Self:
        if self.strategy != "hierarchical" and self.parent_tokens is not None:
            raise ValueError("parent_tokens belongs to the strategy hierarchical")
        if self.parent_tokens is not None and self.parent_tokens < self.tokens:
            raise ValueError("parent_tokens must be at least tokens")
        return self


class Retrieval(Frozen):
    """How a collection is searched; docs/retrieval.md says when each lever helps.

    `candidates` are taken from each side, then fused: scores scaled to 0..1 and weighted, or reciprocal ranks (`rrf_k` their
    constant) weighted. `dense_weight` 0 is BM25 alone, 1 dense alone. `quantized`: the dense side goes through quantised
    vectors and scores what it finds with the real ones. `rerank_depth`: hits that the cross-encoder may read. `mmr`: lambda,
    1 is relevance alone. `neighbours`: chunks before and after a hit that its text is extended by. `query_adapter`: one of
    GRAFT_HOME, which moves the question's vector.
    """

    fusion: Literal["weighted", "rrf"] = "weighted"
    rrf_k: Annotated[int, Field(ge=1, le=1000)] = 60
    dense_weight: Annotated[float, Field(ge=0, le=1)] = 0.7
    candidates: Annotated[int, Field(ge=1, le=1000)] = 100
    quantized: bool = True
    top_k: Annotated[int, Field(ge=1, le=50)] = 5
    rerank: bool = False
    rerank_depth: Annotated[int, Field(ge=1, le=100)] = 20
    mmr: Annotated[float, Field(ge=0, le=1)] | None = None
    neighbours: Annotated[int, Field(ge=0, le=3)] = 0
    query_adapter: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")] | None = None


def with_query_adapter(retrieval: Retrieval, name: str | None) -> Retrieval:
    """Raises ValidationError."""
    return Retrieval.model_validate({**retrieval.model_dump(), "query_adapter": name})


class Labels(Frozen):
    """Who may see a document (groups; null says nothing, empty is everybody), and what is known of it."""

    acl: tuple[str, ...] | None = None
    metadata: dict[str, Any] = {}


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
    """A document's text with its structure; offsets everywhere point into `text`, in code points.

    `metadata` and `acl` are what the file itself says, in its properties or its front matter; `acl` null says nothing.
    """

    text: str
    mime: str
    pages: tuple[PageSpan, ...] = ()
    headings: tuple[Heading, ...] = ()
    metadata: dict[str, Any] = {}
    acl: tuple[str, ...] | None = None

    def content_address(self) -> str:
        """sha256 (hex) over text and structure."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class Span(Frozen):
    """text[start:end] of a document, in code points."""

    start: int
    end: int


class Chunk(Frozen):
    """A stretch of a document's text: text[start:end] == self.text.

    `context` is put in front of the text where it is embedded and searched (a heading path, a table's header), and is no
    part of the stretch. `parent`: the wider stretch that is answered from when this one is found.
    """

    id: str
    ordinal: int
    text: str
    start: int
    end: int
    page: int | None
    heading: str | None
    language: str
    context: str | None = None
    parent: Span | None = None

    @property
    def searched(self) -> str:
        """What is embedded and what BM25 sees."""
        return f"{self.context}\n{self.text}" if self.context else self.text


class SparseVector(Frozen):
    indices: list[int]
    values: list[float]


class Hit(Frozen):
    """A chunk found for a question, with the scores that ranked it. `ordinal`: its place among its document's chunks."""

    chunk_id: str
    document_id: str
    collection: str | None = None
    path: str
    text: str
    start: int
    end: int
    page: int | None = None
    heading: str | None = None
    language: str | None = None
    context: str | None = None
    parent: Span | None = None
    ordinal: int | None = None
    fingerprint: str | None = None  # of the embedder that made its vector
    metadata: dict[str, Any] = {}
    dense_score: float | None = None  # cosine, -1 to 1; None: not among the dense candidates
    sparse_score: float | None = None  # BM25; None: not among the sparse candidates
    score: float  # fused, 0 to 1
    rerank_score: float | None = None  # cross-encoder, 0 to 1

    @property
    def searched(self) -> str:
        """As `Chunk.searched`."""
        return f"{self.context}\n{self.text}" if self.context else self.text


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


class Comparison(Frozen):
    """A new index beside the live one, over sample questions: those asked of the collection, and headings or sentences of
    its documents (`known`), each of which should find its document.

    `overlap`: mean share of the live index' first ten documents that the new one finds among its first ten; `same_first`:
    share of questions with the same first document; `live_found`, `new_found`: share of `known` whose document is among
    the first ten.
    """

    questions: int
    known: int
    overlap: float
    same_first: float
    live_found: float
    new_found: float


class Report(Frozen):
    """What a job did with documents. `seconds`: total, and by stage (a stage's time overlaps the others').

    `comparison`: of a new index with the live one.
    """

    files: FileCounts = FileCounts()
    chunks: ChunkCounts = ChunkCounts()
    seconds: dict[str, float] = {}
    failures: tuple[Failure, ...] = ()
    skips: tuple[Skip, ...] = ()
    languages: dict[str, int] = {}
    comparison: Comparison | None = None
    notes: tuple[str, ...] = ()


class Progress(Frozen):
    """How far a job is. Totals are known once the source has been walked; an ingest job counts bytes of what it reads.

    `chunks_per_second` is over the last half minute; `seconds_left` null until it can be told.
    """

    files_total: int | None = None
    files: int = 0
    bytes_total: int | None = None
    bytes: int = 0
    pages: int = 0
    chunks: int = 0
    chunks_per_second: float | None = None
    seconds_left: float | None = None
    current: str | None = None


def document_id(collection: str, uri: str, n: int) -> str:
    """`n` counts the documents first seen at `uri`, so that an id survives a move and a new file under the old name."""
    return str(uuid.uuid5(NAMESPACE, json.dumps([collection, uri, n])))


def chunk_id(document: str, text: str, occurrence: int) -> str:
    """An unchanged stretch keeps its id wherever it moves in the document; `occurrence` tells repeated ones apart.

    `text` is all that its vectors are made of (`Chunk.searched`).
    """
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return str(uuid.uuid5(NAMESPACE, f"{document}:{digest}:{occurrence}"))
