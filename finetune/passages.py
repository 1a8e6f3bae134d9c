"""A data set's documents as the passages that are searched, their vectors, and a search over them as the product does it."""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval.collection import document_content
from eval.retrieval_metrics import scores
from eval.schemas import Case, Document
from ingest.chunk import split
from ingest.embed import Embedder, TokenCounter, Vectors
from ingest.index import Filter, Point, candidates, ranked, sparse_document
from ingest.index_edge import EdgeIndex
from ingest.language import reads
from ingest.parse import markdown_headings
from ingest.schemas import Chunking, ParsedText, Retrieval, document_id
from ingest.settings import IngestSettings

BATCH = 128  # texts between two looks at whether to stop
KEPT = 8  # sets of vectors
FORGOTTEN = 24 * 3600.0  # seconds after which a file that is half written has no writer any more
METRIC = "ndcg@10"
NAME = "passages"
DEFAULT = Retrieval()
Told = Callable[[int, int], None]


class Passages(NamedTuple):
    """`texts` as they are embedded and searched; `documents`: of each, the data set's id."""

    texts: tuple[str, ...]
    documents: tuple[str, ...]


def passages_of(documents: Sequence[Document], counter: TokenCounter, chunking: Chunking) -> Passages:
    """Cut as an ingest cuts them. Raises GraftError."""
    texts, held = list[str](), list[str]()
    for one in documents:
        text = document_content(one)
        parsed = ParsedText(text=text, mime="text/markdown", headings=markdown_headings(text))
        for chunk in split(document_id("tune", one.id, 0), parsed, chunking, counter):
            texts.append(chunk.searched)
            held.append(one.id)
    return Passages(tuple(texts), tuple(held))


def vectors_of(
    texts: Sequence[str],
    embedder: Embedder,
    settings: IngestSettings,
    queries: bool = False,
    tell: Told = lambda *_: None,
) -> Vectors:
    """(texts, dimension). The last few sets are kept below GRAFT_HOME, so that a second run on the same texts need not embed."""
    digest = hashlib.sha256("\0".join([embedder.fingerprint, embedder.runtime, str(queries)]).encode())
    for text in texts:
        digest.update(b"\0" + text.encode("utf-8", "surrogatepass"))
    folder = settings.home / "tuning-vectors"
    kept = folder / f"{digest.hexdigest()[:32]}.npy"
    if (held := _held(kept)) is not None and len(held) == len(texts):
        return held
    made = []
    for start in range(0, len(texts), BATCH):
        some = texts[start : start + BATCH]
        made.append(np.stack([embedder.embed_query(text) for text in some]) if queries else embedder.embed(some))
        tell(start + len(some), len(texts))
    found = np.concatenate(made).astype(np.float32)
    _keep(found, kept)
    return found


def _held(kept: Path) -> Vectors | None:
    """None where there are none, or what is there is no such file; another process may remove it at any time."""
    with suppress(OSError, ValueError, EOFError):
        found = np.asarray(np.load(kept), dtype=np.float32)
        kept.touch()
        return found
    return None


def _keep(vectors: Vectors, kept: Path) -> None:
    """And drops the sets that were used longest ago. Several processes may do this at once."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_suffix(f".{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            np.save(file, vectors)
        unfinished.replace(kept)
    finally:
        unfinished.unlink(missing_ok=True)
    sets = sorted(_ages(kept.parent, "*.npy"))
    forgotten = [one for one in _ages(kept.parent, "*.part") if time.time() - one[0] > FORGOTTEN]
    for _, old in (*sets[:-KEPT], *forgotten):
        old.unlink(missing_ok=True)


def _ages(folder: Path, names: str) -> Iterator[tuple[float, Path]]:
    """-> (when it was last used, file)."""
    for file in folder.glob(names):
        with suppress(FileNotFoundError):
            yield file.stat().st_mtime, file


class Searched:
    """Passages in an index of their own, for as long as it is open. The embedder's `languages` are those that it reads."""

    def __init__(self, passages: Passages, vectors: Vectors, languages: tuple[str, ...], folder: Path) -> None:
        self.passages = passages
        self.languages = languages
        self._index = EdgeIndex(folder)
        self._index.create(NAME, vectors.shape[1])
        ids = [document_id("tune", str(at), 0) for at in range(len(passages.texts))]
        self._places = {identity: at for at, identity in enumerate(ids)}
        for start in range(0, len(ids), 256):
            some = range(start, min(start + 256, len(ids)))
            points = [
                Point(ids[at], vectors[at], sparse_document(passages.texts[at]), {"document_id": ids[at]})
                for at in some
            ]
            self._index.upsert(NAME, points)

    def close(self) -> None:
        self._index.close()

    def search(self, question: str, vector: Vectors, retrieval: Retrieval = DEFAULT) -> list[int]:
        """-> places of passages, best first, by the product's fusion."""
        dense = vector if retrieval.dense_weight > 0 and reads(self.languages, question) else None
        found = candidates(self._index, NAME, dense, question, Filter(), retrieval, retrieval.candidates)
        return [self._places[identity] for identity, _ in ranked(found, retrieval, dense is not None)]

    def scores(self, cases: Sequence[Case], vectors: Vectors, retrieval: Retrieval = DEFAULT) -> list[float]:
        """-> nDCG@10 of each case; a document stands where its best passage does. `vectors`: (cases, dimension)."""
        orders = [
            list(dict.fromkeys(self.passages.documents[at] for at in self.search(case.question, vector, retrieval)))
            for case, vector in zip(cases, vectors, strict=True)
        ]
        return [one[METRIC] for one in scores([case.relevant for case in cases], orders, [METRIC])]


@contextmanager
def searched(passages: Passages, vectors: Vectors, languages: tuple[str, ...] = ("*",)) -> Iterator[Searched]:
    with tempfile.TemporaryDirectory(prefix="graft-tune-") as folder:
        opened = Searched(passages, vectors, languages, Path(folder))
        try:
            yield opened
        finally:
            opened.close()


def golds(cases: Sequence[Case], passages: Passages) -> list[list[int]]:
    """-> of each case the places of its relevant documents' passages."""
    by_document: dict[str, list[int]] = {}
    for at, document in enumerate(passages.documents):
        by_document.setdefault(document, []).append(at)
    return [
        [at for one, grade in case.relevant.items() if grade > 0 for at in by_document.get(one, ())] for case in cases
    ]
