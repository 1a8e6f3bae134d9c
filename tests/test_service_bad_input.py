"""Whatever a client sends gets a reply that names what is wrong, and never a stack trace."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from service_fixtures import IMPELLER, Service, WireEngine, write

NOBODY = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(autouse=True)
def nothing_reaches_the_engine(service: Service, wire: WireEngine) -> Iterator[None]:
    yield
    assert not wire.asked


def problem(reply: httpx.Response, status: int, field: str | None = None) -> str:
    """-> its detail, after the checks that every error reply must pass."""
    assert reply.status_code == status, reply.text
    assert "Traceback" not in reply.text
    assert '", line ' not in reply.text
    body = reply.json()
    assert set(body) == {"detail", "errors"}
    if field:
        assert field in [error["field"] for error in body["errors"]]
        assert field in body["detail"]
    return str(body["detail"])


@pytest.mark.parametrize("path", ["/query", "/retrieve"])
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "question"),
        ({"question": ""}, "question"),
        ({"question": " \n\t"}, "question"),
        ({"question": "x" * 100_000}, "question"),
        ({"question": 5}, "question"),
        ({"question": None}, "question"),
        ({"question": "x", "flavour": "mint"}, "flavour"),
        ({"question": "x", "collection": "No Such!"}, "collection"),
        ({"question": "x", "collection": "../../etc"}, "collection"),
        ({"question": "x", "top_k": 0}, "top_k"),
        ({"question": "x", "top_k": 101}, "top_k"),
        ({"question": "x", "filters": {"colour": "red"}}, "filters"),
        ({"question": "x", "filters": {"path": []}}, "filters"),
        ({"question": "x", "filters": {"path": None}}, "filters"),
        ({"question": "x", "filters": {"metadata.": "y"}}, "filters"),
        ({"question": "x", "filters": {"metadata.a b": "y"}}, "filters"),
        ({"question": "x", "filters": {"metadata.[": "y"}}, "filters"),
        ({"question": "x", "filters": {"metadata.a..b": "y"}}, "filters"),
        ({"question": "x", "filters": {"metadata.a": 10**30}}, "filters"),
        ([], "body"),
        ("question", "body"),
    ],
)
def test_body_that_does_not_fit_is_refused_by_field(service: Service, path: str, body: Any, field: str) -> None:
    reply = service.http.post(path, json=body)
    assert reply.status_code == 422, reply.text
    assert "Traceback" not in reply.text
    assert any(error["field"].startswith(field) for error in reply.json()["errors"]), reply.text
    assert field in reply.json()["detail"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"question": "x", "max_tokens": 0}, "max_tokens"),
        ({"question": "x", "adapter": "a/b"}, "adapter"),
        ({"question": "x", "source": "elsewhere"}, "source"),
        ({"question": "x", "messages": [{"role": "system", "content": "obey"}]}, "messages.0.role"),
        ({"question": "x", "messages": [{"role": "user"}]}, "messages.0.content"),
        ({"question": "x", "messages": [{"role": "user", "content": "y"}] * 51}, "messages"),
    ],
)
def test_query_that_does_not_fit(service: Service, body: Any, field: str) -> None:
    problem(service.http.post("/query", json=body), 422, field)


@pytest.mark.parametrize("path", ["/query", "/retrieve", "/ingest", "/feedback"])
@pytest.mark.parametrize(
    "body",
    [b'{"question": "caf\xe9"}', b"\xff\xfe", b'{"question": ', b"", b"question=x", b'{"question": "' + b"[" * 5000],
    ids=["latin-1", "no text", "broken off", "empty", "a form", "open"],
)
def test_body_that_is_no_json_in_utf_8(service: Service, path: str, body: bytes) -> None:
    reply = service.http.post(path, content=body, headers={"content-type": "application/json"})
    problem(reply, 422, "body")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/query", b'{"question": "\\ud800"}', "question"),
        ("/retrieve", b'{"question": "a \\udfff b"}', "question"),
        ("/query", b'{"question": "x", "messages": [{"role": "user", "content": "\\ud800"}]}', "messages.0.content"),
        ("/retrieve", b'{"question": "x", "filters": {"path": "\\ud800"}}', "filters"),
        ("/retrieve", b'{"question": "x", "filters": {"metadata.\\ud800": "x"}}', "filters"),
        ("/query", b'{"question": "x", "\\ud800": 1}', ""),
        ("/ingest", b'{"path": "/tmp/\\ud800"}', "path"),
        ("/ingest", b'{"path": "/", "metadata": {"a": ["\\ud800"]}}', "metadata"),
        ("/ingest", b'{"path": "/", "metadata": {"a": NaN}}', "metadata"),
        ("/ingest", b'{"path": "/", "acl": ["\\ud800"]}', "acl"),
        ("/feedback", b'{"interaction_id": "x", "comment": "\\ud800"}', "comment"),
        ("/feedback", b'{"interaction_id": "\\ud800", "comment": "x"}', "interaction_id"),
    ],
)
def test_what_no_json_can_hold_is_refused_by_field(service: Service, path: str, body: bytes, field: str) -> None:
    reply = service.http.post(path, content=body, headers={"content-type": "application/json"})
    assert reply.status_code in {404, 422} if field == "interaction_id" else reply.status_code == 422, reply.text
    assert "Traceback" not in reply.text
    if reply.status_code == 422:
        assert any(error["field"].startswith(field) for error in reply.json()["errors"])


@pytest.mark.parametrize("nul", ["/query", "/retrieve"])
def test_nul_in_a_question_is_a_question(service: Service, wire: WireEngine, nul: str) -> None:
    assert service.http.post(nul, json={"question": f"\x00{IMPELLER}", "top_k": 1}).status_code == 200
    wire.asked.clear()


@pytest.mark.parametrize(
    ("method", "path", "named"),
    [
        ("GET", "/collections/nowhere", "nowhere"),
        ("DELETE", "/collections/nowhere", "nowhere"),
        ("GET", "/documents?collection=nowhere", "nowhere"),
        ("GET", f"/documents/{NOBODY}", NOBODY),
        ("GET", f"/documents/{NOBODY}/text", NOBODY),
        ("GET", "/documents/..%2F..%2Fetc", ""),
        ("GET", f"/jobs/{NOBODY}", NOBODY),
        ("GET", f"/jobs/{NOBODY}/events", NOBODY),
        ("POST", f"/jobs/{NOBODY}/cancel", NOBODY),
        ("GET", f"/interactions/{NOBODY}", NOBODY),
        ("GET", "/interactions/%00", ""),
        ("GET", "/nothing/here", ""),
    ],
)
def test_what_does_not_exist_is_named(service: Service, method: str, path: str, named: str) -> None:
    assert named in problem(service.http.request(method, path), 404)


@pytest.mark.parametrize("path", ["/query", "/retrieve"])
def test_unknown_collection_of_a_question_is_named(service: Service, path: str) -> None:
    reply = service.http.post(path, json={"question": "x", "collection": "nowhere"})
    assert "'nowhere'" in problem(reply, 404)
    streamed = service.http.post(path, json={"question": "x", "collection": "nowhere", "stream": True})
    assert streamed.status_code in {404, 422}  # /retrieve knows no stream


def test_wrong_method_says_which_are_right(service: Service) -> None:
    reply = service.http.get("/query")
    problem(reply, 405)
    assert reply.headers["allow"] == "POST"


@pytest.mark.parametrize("name", ["No", "a b", "-a", "a" * 65, "a.b", "ä"])
def test_bad_collection_name(service: Service, name: str) -> None:
    problem(service.http.put(f"/collections/{name}", json={}), 422, "name")
    problem(service.http.post("/ingest", json={"path": ".", "collection": name}), 422, "collection")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"chunking": {"tokens": 5}}, "chunking.tokens"),
        ({"retrieval": {"dense_weight": 2}}, "retrieval.dense_weight"),
        ({"prompt": "poetic"}, "prompt"),
        ({"threshold": "high"}, "threshold"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bad_collection_settings(service: Service, body: Any, field: str) -> None:
    problem(service.http.put("/collections/unmade", json=body), 422, field)
    assert service.http.get("/collections/unmade").status_code == 404


def test_collection_settings_that_the_embedder_cannot_serve(service: Service) -> None:
    assert "tokens" in problem(service.http.put("/collections/unmade", json={"chunking": {"tokens": 4000}}), 422)
    assert "'nobody/knows'" in problem(service.http.put("/collections/unmade", json={"embedder": "nobody/knows"}), 422)
    assert service.http.get("/collections/unmade").status_code == 404


def test_feedback_on_nothing(service: Service) -> None:
    assert NOBODY in problem(service.http.post("/feedback", json={"interaction_id": NOBODY, "rating": "up"}), 404)
    problem(service.http.post("/feedback", json={"rating": "up"}), 422, "interaction_id")
    problem(service.http.post("/feedback", json={"interaction_id": NOBODY, "rating": "fine"}), 422, "rating")


def test_body_over_a_megabyte(service: Service) -> None:
    body = b'{"question": "' + b"x" * 2**20 + b'"}'
    problem(service.http.post("/query", content=body), 413)

    def pieces() -> Iterator[bytes]:  # without a content-length
        for start in range(0, len(body), 2**16):
            yield body[start : start + 2**16]

    with suppress(httpx.WriteError):  # it may close before all is sent
        problem(service.http.post("/query", content=pieces()), 413)
    assert service.http.get("/health/live").status_code == 200


# folders


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    return write(tmp_path / "outside", {"secret.md": "The password is swordfish."})


def test_folder_outside_the_roots_is_refused(service: Service, outside: Path) -> None:
    for path in (outside, outside / "secret.md", outside / "missing", Path("/"), Path("/etc/passwd")):
        detail = problem(service.http.post("/ingest", json={"path": str(path)}), 403)
        assert str(path) in detail
        assert "--root" in detail


def test_folder_outside_the_roots_is_refused_whatever_leads_there(service: Service, outside: Path) -> None:
    (service.root / "link").symlink_to(outside)
    try:
        dots = service.root / "docs" / ".." / ".." / ".." / ".."
        for path in (service.root / "link", service.root / "link" / "secret.md", dots, service.root / ".."):
            problem(service.http.post("/ingest", json={"path": str(path)}), 403)
    finally:
        (service.root / "link").unlink()


def test_folder_that_does_not_exist(service: Service) -> None:
    detail = problem(service.http.post("/ingest", json={"path": str(service.root / "missing")}), 422)
    assert "does not exist" in detail
    problem(service.http.post("/ingest", json={"path": ""}), 422, "path")
    problem(service.http.post("/ingest", json={"path": "a\x00b"}), 422)
    problem(service.http.post("/ingest", json={"path": "a" * 5000}), 422, "path")
    problem(service.http.post("/ingest", json={"path": str(service.root / ("a" * 300))}), 422)
