"""Sources beyond a folder, and indexes that move, over HTTP: what is allowed goes the same way, the rest is refused."""

import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from service_fixtures import HANDBOOK, HERON, KESTREL, LEAVE, Service, WireEngine, running, write

pytestmark = pytest.mark.slow

READER = "llama_index.core.readers.json:JSONReader"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """-> the address of a server on loopback, and the folder that it serves."""
    folder = tmp_path_factory.mktemp("web")

    def handler(*args: Any) -> _Quiet:
        return _Quiet(*args, directory=str(folder))

    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def reaching(
    tmp_path_factory: pytest.TempPathFactory, wire_engine: WireEngine, web: tuple[str, Path]
) -> Iterator[Service]:
    """A service that may read below /docs of the web server, and run one reader."""
    folder = tmp_path_factory.mktemp("reaching")
    settings = {
        "SERVICE_LLM_URL": wire_engine.url,
        "SERVICE_INGEST_URLS": f"{web[0]}/docs s3://nobody-listens/",
        "SERVICE_INGEST_READERS": READER,
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    }
    with running(folder / "home", write(folder / "root", {"a.md": HERON}), "--no-engine", **settings) as service:
        yield service


def ingest(service: Service, **body: Any) -> dict[str, Any]:
    reply = service.http.post("/ingest", json=body)
    assert reply.status_code == 202, reply.text
    return service.wait(reply.json()["job_id"])


def test_a_file_of_the_web_is_a_document_under_its_url(reaching: Service, web: tuple[str, Path]) -> None:
    address, folder = web
    write(folder, {"docs/heron.md": HERON})
    job = ingest(reaching, path=f"{address}/docs/heron.md", collection="web")
    assert job["report"]["files"]["done"] == 1, job
    assert job["path"] == f"{address}/docs/heron.md"
    hits = reaching.http.post("/retrieve", json={"question": "impeller", "collection": "web"}).json()["hits"]
    assert hits[0]["path"] == f"{address}/docs/heron.md"
    filtered = {"question": "impeller", "collection": "web", "filters": {"path": f"{address}/docs"}}
    assert reaching.http.post("/retrieve", json=filtered).json()["hits"]
    assert ingest(reaching, path=f"{address}/docs/heron.md", collection="web")["report"]["files"]["unchanged"] == 1


@pytest.mark.parametrize("path", ["/secret.md", "/docs/../secret.md", "/docs2/a.md", "/docs/%2e%2e/secret.md"])
def test_a_url_that_is_not_listed_is_refused_before_it_is_asked(
    reaching: Service, web: tuple[str, Path], path: str
) -> None:
    reply = reaching.http.post("/ingest", json={"path": web[0] + path})
    assert reply.status_code == 403
    assert "SERVICE_INGEST_URLS" in reply.json()["detail"] or "'..'" in reply.json()["detail"]


def test_a_store_that_does_not_answer_ends_the_job_with_the_reason(reaching: Service) -> None:
    job = ingest(reaching, path="s3://nobody-listens/docs", collection="store")
    assert job["state"] == "failed"
    assert "s3://nobody-listens" in job["error"]


def test_documents_of_a_listed_reader_come_in_under_their_ids(reaching: Service) -> None:
    file = (
        write(reaching.root, {"faq.json": '{"question": "Who mends pumps?", "answer": "The electricians."}'})
        / "faq.json"
    )
    reader = {"name": READER, "args": {"input_file": str(file), "extra_info": {"source": "faq"}}}
    job = ingest(reaching, reader=reader, collection="read")
    assert job["report"]["files"]["done"] == 1, job
    (document,) = reaching.http.get("/documents", params={"collection": "read"}).json()
    assert document["metadata"]["source"] == "faq"
    assert ingest(reaching, reader=reader, collection="read")["report"]["files"]["unchanged"] == 1
    assert not list(
        (reaching.home / "scratch").rglob("*")
    )  # what it gave lies nowhere but in the catalog and the index


def test_a_reader_that_is_not_listed_is_not_run(reaching: Service) -> None:
    reply = reaching.http.post("/ingest", json={"reader": {"name": "os:system", "args": {"command": "true"}}})
    assert reply.status_code == 403
    assert "SERVICE_INGEST_READERS" in reply.json()["detail"]


@pytest.mark.parametrize("body", [{}, {"path": "a", "reader": {"name": READER}}, {"reader": {"name": "x y"}}])
def test_a_source_is_one_path_or_one_reader(reaching: Service, body: dict[str, Any]) -> None:
    assert reaching.http.post("/ingest", json=body).status_code == 422


def test_an_index_goes_out_and_into_another_collection(reaching: Service) -> None:
    folder = write(reaching.root / "moving", {"heron.md": HERON, "kestrel.md": KESTREL, "leave.md": LEAVE})
    ingest(reaching, path=str(folder), collection="first", acl=["staff"])
    out = reaching.http.post("/collections/first/dump", json={"target": str(reaching.root / "dump")})
    dumped = reaching.wait(out.json()["job_id"])
    assert dumped["state"] == "succeeded", dumped
    assert (reaching.root / "dump/manifest.json").is_file()
    back = reaching.http.post("/collections/second/load", json={"target": str(reaching.root / "dump")})
    loaded = reaching.wait(back.json()["job_id"])
    assert loaded["report"]["chunks"]["added"] == dumped["report"]["chunks"]["added"]
    first, second = (
        reaching.http.post("/retrieve", json={"question": "oil of the seal chamber", "collection": name}).json()["hits"]
        for name in ("first", "second")
    )
    assert [(hit["text"], hit["score"]) for hit in first] == [(hit["text"], hit["score"]) for hit in second]
    documents = reaching.http.get("/documents", params={"collection": "second"}).json()
    assert {tuple(document["acl"]) for document in documents} == {("staff",)}
    again = ingest(reaching, path=str(folder), collection="second", acl=["staff"])
    assert again["report"]["files"]["unchanged"] == 3


def test_an_index_goes_nowhere_outside_of_the_allowed_folders(reaching: Service, tmp_path: Path) -> None:
    for target in (str(tmp_path / "dump"), f"chroma:{tmp_path}/store#docs", "/etc"):
        assert reaching.http.post("/collections/default/dump", json={"target": target}).status_code == 403
        assert reaching.http.post("/collections/new/load", json={"target": target}).status_code == 403
    assert not list(tmp_path.iterdir())


def test_a_language_that_the_embedder_does_not_read_is_told_in_numbers(reaching: Service) -> None:
    folder = write(reaching.root / "languages", {"zh.md": HANDBOOK, "en.md": HERON})
    job = ingest(reaching, path=str(folder), collection="languages")
    count = job["report"]["languages"]
    share = round(100 * count["zh"] / sum(count.values()))
    (note,) = job["report"]["notes"]
    assert note.startswith(f"{share} % of the chunks are Chinese; bge-small-en-v1.5 reads English")
    hits = reaching.http.post("/retrieve", json={"question": "年休假几天", "collection": "languages"}).json()["hits"]
    assert hits[0]["language"] == "zh"
