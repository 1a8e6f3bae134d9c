"""A catalog and an index, filled as an ingest job would, and a retriever over them; and a second kind of embedder."""

import json
import re
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.catalog import Catalog, Collection, Document, now
from ingest.chunk import split
from ingest.db import connect, migrate
from ingest.embed import Embedder, index_fingerprint, load_counter
from ingest.index import Index, Point, chunk_payload, sparse_document
from ingest.parse import markdown_headings
from ingest.schemas import Chunking, Hit, ParsedText, Retrieval, document_id
from ingest.settings import IngestSettings
from service.retrieve import Found, Retriever

BGE = "bge-small-en-v1.5"
RERANKER = "ms-marco-minilm-l-12-v2"
VECTORS: dict[tuple[str, str], NDArray[np.float32]] = {}  # by embedder and text: the tests share theirs


class Shelf:
    def __init__(self, settings: IngestSettings, index: Index, rerank_ms: float = 60_000) -> None:
        settings.home.mkdir(parents=True, exist_ok=True)
        engine = connect(f"sqlite:///{settings.home}/graft.db")
        migrate(engine)
        self.catalog = Catalog(engine)
        self.index = index
        self.counter = load_counter(BGE, settings)
        self.retriever = Retriever(self.catalog, index, settings, RERANKER, rerank_ms)

    def embedder(self, collection: Collection) -> Embedder:
        return self.retriever.embedder(collection.embedder)

    def collect(
        self,
        chunking: Chunking | None = None,
        retrieval: Retrieval | None = None,
        name: str = "manuals",
        embedder: str = BGE,
    ) -> Collection:
        used, chunking = self.retriever.embedder(embedder), chunking or Chunking()
        collection = Collection(
            name=name, embedder=embedder, chunking=chunking, fingerprint=index_fingerprint(used, chunking),
            prompt="auto", created_at=now(), retrieval=retrieval or Retrieval(),
        )  # fmt: skip
        self.catalog.put_collection(collection)
        self.index.create(collection.index, used.dimension)
        return collection

    def put(
        self,
        collection: Collection,
        path: str,
        text: str,
        acl: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        name = document_id(collection.name, path, 0)
        parsed = ParsedText(text=text, mime="text/markdown", headings=markdown_headings(text))
        chunks = split(name, parsed, collection.chunking, self.counter, path=path)
        vectors = self._vectors(collection, [chunk.searched for chunk in chunks])
        gone = self.index.ids(collection.index, name) - {chunk.id for chunk in chunks}
        points = [
            Point(
                chunk.id,
                vector,
                sparse_document(chunk.searched),
                chunk_payload(chunk, name, path, acl, metadata or {}, "e"),
            )
            for chunk, vector in zip(chunks, vectors, strict=True)
        ]
        self.index.upsert(collection.index, points)
        self.index.delete(collection.index, sorted(gone))
        self.keep(collection.name, path, parsed)

    def _vectors(self, collection: Collection, texts: Sequence[str]) -> list[NDArray[np.float32]]:
        keys = [(collection.embedder, text) for text in texts]
        fresh = [text for key, text in dict(zip(keys, texts, strict=True)).items() if key not in VECTORS]
        for text, vector in zip(fresh, self.embedder(collection).embed(fresh) if fresh else (), strict=True):
            VECTORS[collection.embedder, text] = vector
        return [VECTORS[key] for key in keys]

    def keep(self, collection: str, path: str, parsed: ParsedText) -> None:
        row = Document(
            id=document_id(collection, path, 0), collection=collection, uri=f"file:///{collection}/{path}",
            first_uri=f"file:///{collection}/{path}", path=path, size=1, stamp=1, content_hash="c",
            text_hash=parsed.content_address(), state="done",
        )  # fmt: skip
        self.catalog.finish([(row, parsed)])

    def find(self, question: str, *names: str, **fields: Any) -> Found:
        """`fields`: of `Retriever.retrieve`."""
        given: dict[str, Any] = {"filters": {}, "groups": None, "top_k": None, **fields}
        return self.retriever.retrieve(question, names or ("manuals",), **given)

    def ask(self, question: str, *names: str, **fields: Any) -> list[Hit]:
        return self.find(question, *names, **fields).hits


@contextmanager
def bag_of_words(dimension: int = 512) -> Iterator[str]:
    """An embedding server: a text's vector counts its words. -> its name as an embedder."""

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            rows = [{"index": n, "embedding": _counted(text, dimension)} for n, text in enumerate(asked["input"])]
            body = json.dumps({"data": rows}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1#words"
    finally:
        server.shutdown()
        server.server_close()


def _counted(text: str, dimension: int) -> list[float]:
    counts = [0.0] * dimension
    for word in re.findall(r"\w{4,}", text.lower()) or [text]:
        counts[zlib.crc32(word.encode()) % dimension] += 1
    return counts
