"""An index to other vector stores and back. Chroma and Milvus are the real engines, embedded; Pinecone is its real client
against a loopback server that answers in the form of its API, since the service itself cannot be had here."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import chromadb
import numpy as np
import pytest
from chromadb.config import Settings
from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import (
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_index.vector_stores.milvus import MilvusVectorStore
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import QdrantClient
from test_ingest_shards import DIMENSION, Home, expiring, fill, ingest, made, write_files

from ingest.embed import Embedder
from ingest.errors import ConflictError, InvalidError, NotFoundError, SettingsError, UnavailableError
from ingest.index import Filter, Point, sparse_query
from ingest.index_server import ServerIndex
from ingest.parquet import Kept, read_chunks, read_documents, read_manifest
from ingest.pipeline import Cancelled
from ingest.schemas import document_id
from ingest.settings import IngestSettings
from ingest.stores import is_store, parse_store, pull, push

DOCUMENTS = 10  # of 5 chunks


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    opened = Home(tmp_path / "first")
    fill(opened, range(DOCUMENTS))
    opened.dump(tmp_path / "dump", rows_per_shard=20)
    yield opened
    opened.index.close()


def chroma(folder: Path, name: str) -> ChromaVectorStore:
    """As any program opens it; within one process all clients of a folder must have the same settings."""
    client = chromadb.PersistentClient(path=str(folder), settings=Settings(anonymized_telemetry=False))
    return ChromaVectorStore(chroma_collection=client.get_or_create_collection(name, embedding_function=None))


def chunks(folder: Path) -> dict[str, Point]:
    shards = [one.file for one in read_manifest(folder).shards if one.holds_chunks]
    return {point.id: point for file in shards for page in read_chunks(folder / file, DIMENSION) for point in page}


def documents(folder: Path) -> dict[str, Kept]:
    shards = [one.file for one in read_manifest(folder).shards if not one.holds_chunks]
    return {row[0].id: row for file in shards for page in read_documents(folder / file) for row in page}


def assert_came_back(home: Home, before: Path, after: Path) -> None:
    """Chunk rows exactly; documents but for what stamps their files; and a load that serves all of it."""
    assert chunks(after).keys() == chunks(before).keys()
    for identity, point in chunks(before).items():
        other = chunks(after)[identity]
        assert (other.payload, other.sparse) == (point.payload, point.sparse)
        assert other.dense == pytest.approx(point.dense, abs=1e-6)
    lost = {"size", "stamp", "content_hash", "text_hash"}
    assert {key: one.model_dump(exclude=lost) for key, (one, _) in documents(after).items()} == {
        key: one.model_dump(exclude=lost) for key, (one, _) in documents(before).items()
    }
    for document, text in documents(after).values():
        assert text is not None
        own = [one.payload for one in chunks(after).values() if one.payload["document_id"] == document.id]
        assert all(text.text[one["start"] : one["end"]] == one["text"] for one in own)
        assert document.text_hash == text.content_address()
    manifest = read_manifest(after)
    assert manifest.collection == home.collection
    assert manifest.embedder_fingerprint == "e" * 64
    other_home = Home(after.parent / "loaded")
    other_home.load(after)
    assert {one.id: one.payload for one in other_home.points()} == {one.id: one.payload for one in home.points()}
    other_home.index.close()


def best(store: Any, point: Point, **options: Any) -> TextNode:
    found = store.query(VectorStoreQuery(query_embedding=point.dense.tolist(), similarity_top_k=1, **options))
    node: TextNode = found.nodes[0]
    return node


def test_chroma_holds_it_and_gives_it_back(home: Home, tmp_path: Path) -> None:
    store = f"chroma:{tmp_path / 'chroma'}#papers"
    assert push(tmp_path / "dump", store).chunks == 50
    assert push(tmp_path / "dump", store).chunks == 50  # again: replaced, not doubled
    report = pull(store, tmp_path / "back")
    assert (report.chunks, report.documents, report.foreign) == (50, DOCUMENTS, 0)
    assert_came_back(home, tmp_path / "dump", tmp_path / "back")

    held = chroma(tmp_path / "chroma", "papers")
    point = home.points()[7]
    node = best(held, point)
    assert (node.node_id, node.text, node.ref_doc_id) == (point.id, point.payload["text"], point.payload["document_id"])
    assert node.metadata["path"] == point.payload["path"]
    assert json.loads(node.metadata["site"]) == point.payload["metadata"]["site"]
    only = MetadataFilters(filters=[MetadataFilter(key="path", value="docs/3.md", operator=FilterOperator.EQ)])
    assert best(held, point, filters=only).metadata["path"] == "docs/3.md"
    assert "graft" not in node.get_content("llm")


def test_milvus_holds_it_and_gives_it_back(home: Home, tmp_path: Path) -> None:
    store = f"milvus:{tmp_path / 'milvus.db'}#papers"
    assert push(tmp_path / "dump", store).chunks == 50
    assert push(tmp_path / "dump", store).chunks == 50
    report = pull(store, tmp_path / "back")
    assert (report.chunks, report.documents, report.foreign) == (50, DOCUMENTS, 0)
    assert_came_back(home, tmp_path / "dump", tmp_path / "back")

    held = MilvusVectorStore(
        str(tmp_path / "milvus.db"), collection_name="papers", dim=DIMENSION, use_async_client=False
    )
    point = home.points()[7]
    assert best(held, point).node_id == point.id
    held.client.close()


class Pinecone(BaseHTTPRequestHandler):
    """What the API answers to the four calls that are made (describe_index, upsert, list, fetch; version 2025-10)."""

    vectors: dict[str, dict[str, Any]]
    calls: list[str]

    def do_GET(self) -> None:
        path, asked = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        self.calls.append(f"GET {path} {self.headers['Api-Key']}")
        if path == "/indexes/papers":
            host = f"http://127.0.0.1:{self.server.server_address[1]}"
            self._answer(
                {
                    "name": "papers", "vector_type": "dense", "metric": "cosine", "dimension": DIMENSION, "host": host,
                    "status": {"ready": True, "state": "Ready"}, "deletion_protection": "disabled",
                    "spec": {"serverless": {"cloud": "aws", "region": "us-east-1"}},
                }
            )  # fmt: skip
        elif path == "/vectors/list":
            ids = sorted(self.vectors)
            start = int(asked.get("paginationToken", ["0"])[0])
            page = [{"id": one} for one in ids[start : start + 20]]
            more = {"pagination": {"next": str(start + 20)}} if start + 20 < len(ids) else {}
            self._answer({"vectors": page, "namespace": "team", "usage": {"readUnits": 1}, **more})
        elif path == "/vectors/fetch":
            found = {one: self.vectors[one] for one in asked["ids"]}
            self._answer({"vectors": found, "namespace": "team", "usage": {"readUnits": 1}})
        else:
            self._answer({"error": {"code": "NOT_FOUND", "message": "Resource papers not found"}, "status": 404}, 404)

    def do_POST(self) -> None:
        self.calls.append(f"POST {self.path} {self.headers['Api-Key']}")
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["namespace"] == "team"
        for vector in body["vectors"]:
            assert len(json.dumps(vector["metadata"]).encode()) < 40_960
            numbers = {key: float(one) for key, one in vector["metadata"].items() if type(one) is int}
            self.vectors[vector["id"]] = {
                **vector,
                "metadata": {**vector["metadata"], **numbers},
            }  # it knows no integers
        self._answer({"upsertedCount": len(body["vectors"])})

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def pinecone(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Pinecone]]:
    Pinecone.vectors, Pinecone.calls = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pinecone)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PINECONE_API_KEY", "pc-test")
    monkeypatch.setenv("PINECONE_CONTROLLER_HOST", f"http://127.0.0.1:{server.server_address[1]}")
    yield Pinecone
    server.shutdown()
    server.server_close()


def test_pinecones_client_sends_it_and_gets_it_back(home: Home, tmp_path: Path, pinecone: type[Pinecone]) -> None:
    assert push(tmp_path / "dump", "pinecone:papers#team").chunks == 50
    point = home.points()[0]
    sent = pinecone.vectors[f"{point.payload['document_id']}#{point.id}"]
    assert sent["values"] == pytest.approx(point.dense.tolist(), abs=1e-6)
    report = pull("pinecone:papers#team", tmp_path / "back")
    assert (report.chunks, report.documents, report.foreign) == (50, DOCUMENTS, 0)
    assert_came_back(home, tmp_path / "dump", tmp_path / "back")
    assert all(one.endswith(" pc-test") for one in pinecone.calls)
    with pytest.raises(UnavailableError, match="'pinecone:nothing#team' did not do as it was asked: NotFoundError"):
        pull("pinecone:nothing#team", tmp_path / "nothing")


def test_without_a_key_pinecone_is_not_asked(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PINECONE_API_KEY", raising=False)
    with pytest.raises(SettingsError, match="PINECONE_API_KEY is not set"):
        push(tmp_path / "dump", "pinecone:papers#team")


def foreign(store: Any) -> dict[str, list[str]]:
    """Nodes as LlamaIndex writes them for anybody: two documents, one of which has a source, and a node without any."""
    said = {
        "handbook": ["Leave is 27 days.", "Ask your manager first.", "Leave is 27 days."],
        "notes": ["水泵每年维护两次。", "Call the pump hall."],
    }
    nodes = []
    for number, (name, texts) in enumerate(said.items()):
        for place, text in enumerate(texts):
            rng = np.random.default_rng(10 * number + place)
            metadata: dict[str, Any] = {"file_name": f"{name}.pdf", "page_label": str(place + 1)} if number == 0 else {}
            nodes.append(
                TextNode(
                    text=text,
                    embedding=rng.standard_normal(DIMENSION).tolist(),
                    metadata={**metadata, "lang": "mixed"},
                    start_char_idx=100 * place,
                    relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=name)},
                )
            )
    nodes.append(TextNode(id_="alone", text="On its own.", embedding=[1.0] * DIMENSION))
    store.add(nodes[::-1])
    return said | {"alone": ["On its own."]}


@pytest.mark.parametrize("kind", ["chroma", "milvus"])
def test_what_others_wrote_comes_in_with_what_there_is(tmp_path: Path, kind: str) -> None:
    if kind == "chroma":
        said = foreign(chroma(tmp_path / "store", "theirs"))
    else:
        store = MilvusVectorStore(
            str(tmp_path / "store.db"), collection_name="theirs", dim=DIMENSION, use_async_client=False
        )
        said = foreign(store)
        store.client.close()
    source = f"{kind}:{tmp_path / ('store' if kind == 'chroma' else 'store.db')}#theirs"
    with pytest.raises(InvalidError, match="does not say which embedder made its vectors; name a collection"):
        pull(source, tmp_path / "unsaid")
    home = Home(tmp_path / "home", "mine")
    report = pull(source, tmp_path / "back", collection=home.collection)
    assert (report.chunks, report.documents, report.foreign) == (6, 3, 6)
    home.load(tmp_path / "back")
    by_path = home.documents()
    assert sorted(by_path) == ["alone", "handbook.pdf", "notes"]
    for path, document in by_path.items():
        text = home.catalog.text(document.id).text
        own = sorted(
            (one.payload for one in home.points() if one.payload["document_id"] == document.id),
            key=lambda payload: payload["ordinal"],
        )
        assert [one["text"] for one in own] == said[path.removesuffix(".pdf")]
        assert all(text[one["start"] : one["end"]] == one["text"] for one in own)
    point = next(one for one in home.points() if "manager" in one.payload["text"])
    assert point.payload["page"] == 2
    assert point.payload["metadata"]["lang"] == "mixed"
    assert [
        key for key, _ in home.index.search(home.collection.index, None, sparse_query("manager"), Filter(), 3).sparse
    ] == [point.id]
    home.index.close()


def test_a_pulled_dump_loads_into_a_collection_of_another_name(home: Home, tmp_path: Path) -> None:
    store = f"chroma:{tmp_path / 'chroma'}#papers"
    push(tmp_path / "dump", store)
    pull(store, tmp_path / "back")
    other = Home(tmp_path / "other", "copy")
    other.load(tmp_path / "back")
    assert {one.id for one in other.documents().values()} == {
        document_id("copy", f"file:///docs/{number}.md", 0) for number in range(DOCUMENTS)
    }
    assert {one.id for one in other.points()} == {
        one.id for number in range(DOCUMENTS) for one in made("copy", number)[2]
    }
    other.index.close()


@pytest.mark.slow
def test_after_a_way_through_a_store_the_files_are_read_again_and_nothing_is_embedded(
    tmp_path: Path, settings: IngestSettings, embedder: Embedder
) -> None:
    docs = write_files(tmp_path / "docs")
    first, second = Home(tmp_path / "first"), Home(tmp_path / "second")
    chunks_there = ingest(first, docs, settings, embedder).chunks.added
    first.dump(tmp_path / "dump")
    store = f"chroma:{tmp_path / 'chroma'}#papers"
    assert push(tmp_path / "dump", store).left_out == 1  # the broken file
    pull(store, tmp_path / "back")
    second.load(tmp_path / "back")
    report = ingest(second, docs, settings, embedder)
    assert (report.files.done, report.chunks.kept, report.chunks.added) == (4, chunks_there, 0)
    for path, document in first.documents().items():
        if document.state == "done":
            assert second.catalog.text(second.documents()[path].id) == first.catalog.text(document.id)
    first.index.close()
    second.index.close()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("chroma:/data/chroma#papers", ("chroma", "/data/chroma", "papers")),
        ("milvus:https://host:19530#papers", ("milvus", "https://host:19530", "papers")),
        ("milvus:./a#b.db#papers", ("milvus", "./a#b.db", "papers")),
        ("pinecone:index#", ("pinecone", "index", "")),
    ],
)
def test_a_store_is_named_by_kind_place_and_collection(name: str, parts: tuple[str, ...]) -> None:
    assert is_store(name)
    assert parse_store(name) == parts


@pytest.mark.parametrize("name", ["chroma:/data", "weaviate:x#y", "chroma:#papers", "milvus:x#", "/a/folder"])
def test_what_names_no_store_is_refused_with_the_forms(name: str) -> None:
    with pytest.raises(InvalidError, match=r"chroma:PATH#COLLECTION, milvus:FILE_OR_URI#COLLECTION or pinecone:"):
        parse_store(name)
    assert not is_store("/a/folder")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chroma:{0}/nowhere#papers", "there is no Chroma folder"),
        ("chroma:{0}/chroma#others", "holds no collection 'others'"),
        ("milvus:{0}/nowhere.db#papers", "there is no Milvus file"),
    ],
)
def test_a_store_that_is_not_there_is_not_made_by_asking(home: Home, tmp_path: Path, name: str, said: str) -> None:
    push(tmp_path / "dump", f"chroma:{tmp_path}/chroma#papers")
    with pytest.raises(NotFoundError, match=said):
        pull(name.format(tmp_path), tmp_path / "back")
    assert not (tmp_path / "nowhere").exists()


def test_a_missing_package_is_named_with_its_remedy(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("chromadb", "llama_index.vector_stores.chroma"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SettingsError, match=r"`\.venv/bin/pip install 'graft\[stores\]'` brings it"):
        push(tmp_path / "dump", f"chroma:{tmp_path}/chroma#papers")


def test_vectors_that_do_not_fit_the_store_are_an_error_of_ours(home: Home, tmp_path: Path) -> None:
    chroma(tmp_path / "chroma", "papers").add([TextNode(id_="x", text="x", embedding=[1.0, 0.0])])
    with pytest.raises(UnavailableError, match=r"chroma.*dimension"):
        push(tmp_path / "dump", f"chroma:{tmp_path / 'chroma'}#papers")


def test_a_push_and_a_pull_end_wherever_they_are_asked_to(home: Home, tmp_path: Path) -> None:
    store = f"chroma:{tmp_path / 'chroma'}#papers"
    for after in (1, 5, 6, 7):  # hashed, documents read, chunks sent
        with pytest.raises(Cancelled) as stopped:
            push(tmp_path / "dump", store, cancelled=expiring(after))
        assert stopped.value.expired
    push(tmp_path / "dump", store)
    for after in (1, 2, 1 + DOCUMENTS, 2 + DOCUMENTS):  # read, put in order, sealed
        with pytest.raises(Cancelled) as stopped:
            pull(store, tmp_path / "back", cancelled=expiring(after))
        assert stopped.value.expired
    assert pull(store, tmp_path / "back").documents == DOCUMENTS


def test_a_pull_into_a_folder_in_use_is_refused(home: Home, tmp_path: Path) -> None:
    push(tmp_path / "dump", f"chroma:{tmp_path / 'chroma'}#papers")
    with pytest.raises(ConflictError, match="holds a finished dump already"):
        pull(f"chroma:{tmp_path / 'chroma'}#papers", tmp_path / "dump")


class Fixed(BaseEmbedding):
    """Stands in for our embedder on LlamaIndex's side."""

    def _get_query_embedding(self, query: str) -> list[float]:
        return made("default", 4)[2][2].dense.tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_query_embedding(text)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


def test_a_qdrant_collection_of_ours_opens_in_llama_index(tmp_path: Path) -> None:
    client = QdrantClient(":memory:")
    home = Home(tmp_path / "first", index=ServerIndex(client))
    fill(home, range(DOCUMENTS))

    def words(texts: list[str]) -> tuple[list[list[int]], list[list[float]]]:
        vectors = [sparse_query(text) for text in texts]
        return [one.indices for one in vectors], [one.values for one in vectors]

    store = QdrantVectorStore(
        home.collection.index,
        client=client,
        dense_vector_name="dense",
        sparse_vector_name="bm25",
        enable_hybrid=True,
        sparse_doc_fn=words,
        sparse_query_fn=words,
    )
    index = VectorStoreIndex.from_vector_store(store, embed_model=Fixed())
    point = made("default", 4)[2][2]
    found = index.as_retriever(similarity_top_k=3).retrieve("anything")
    assert found[0].node.node_id == point.id
    assert found[0].get_content() == point.payload["text"]
    assert found[0].score == pytest.approx(1, abs=1e-5)
    assert found[0].node.metadata["path"] == "docs/4.md"
    only = MetadataFilters(
        filters=[MetadataFilter(key="metadata.site.no", value=7), MetadataFilter(key="language", value="en")]
    )
    filtered = index.as_retriever(similarity_top_k=20, filters=only).retrieve("anything")
    assert {one.node.metadata["path"] for one in filtered} == {"docs/7.md"}
    query = VectorStoreQuery(
        query_embedding=point.dense.tolist(), query_str="pump 4 holds", similarity_top_k=3, sparse_top_k=10,
        mode=VectorStoreQueryMode.HYBRID,
    )  # fmt: skip
    assert store.query(query).ids[0] == point.id
    sparse = VectorStoreQuery(query_str="水泵7号", similarity_top_k=5, sparse_top_k=5, mode=VectorStoreQueryMode.SPARSE)
    assert len(store.query(sparse).ids) == 5
