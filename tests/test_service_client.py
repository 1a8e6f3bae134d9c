"""The typed client: replies come back as models, error replies as the errors that the service raised."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from service_fixtures import IMPELLER, IMPELLER_ANSWER, Service, WireEngine

from ingest.errors import (
    ConflictError,
    ForbiddenError,
    GraftError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from service.client import Client
from service.schemas import CollectionSettings, FeedbackRequest, QueryRequest, SearchRequest
from service.schemas_jobs import IngestRequest

NOBODY = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def client(service: Service) -> Client:
    return Client(service.url)


def test_streamed_and_whole_answers_are_alike(client: Client) -> None:
    tokens: list[str] = []
    streamed = client.query(QueryRequest(question=IMPELLER), tokens.append)
    whole = client.query(QueryRequest(question=IMPELLER))
    assert tokens == list(IMPELLER_ANSWER)
    differing = {"interaction_id", "timings_ms"}
    assert streamed.model_dump(exclude=differing) == whole.model_dump(exclude=differing)
    assert streamed.citations


def test_every_reading_call(client: Client, service: Service) -> None:
    assert client.ready().ready
    assert "default" in [one.name for one in client.collections()]
    assert client.collection("default").documents == 4
    documents = client.documents()
    assert [one.path for one in client.documents(limit=1, offset=1)] == [documents[1].path]
    hits = client.retrieve(SearchRequest(question=IMPELLER, top_k=1)).hits
    assert hits[0].text in client.document_text(hits[0].document_id)
    job = client.wait(client.ingest(IngestRequest(path=str(service.root / "docs"))).job_id)
    assert job.report is not None
    assert job.report.files.unchanged == 4


def test_feedback_through_the_client(client: Client) -> None:
    answer = client.query(QueryRequest(question=IMPELLER))
    given = FeedbackRequest(interaction_id=answer.interaction_id, rating="up")
    assert client.feedback(given, "once" + answer.interaction_id) == client.feedback(
        given, "once" + answer.interaction_id
    )
    assert len(client.interaction(answer.interaction_id)["feedback"]) == 1


def test_error_replies_become_the_errors_that_were_raised(client: Client, wire: WireEngine, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        client.collection("nowhere")
    with pytest.raises(NotFoundError, match=NOBODY):
        client.job(NOBODY)
    with pytest.raises(ConflictError, match="default"):
        client.delete_collection("default")
    with pytest.raises(ConflictError):
        client.put_collection("default", CollectionSettings.model_validate({"chunking": {"tokens": 100}}))
    with pytest.raises(ForbiddenError, match="--root"):
        client.ingest(IngestRequest(path=str(tmp_path)))
    with pytest.raises(InvalidError, match="limit"):
        client.documents(limit=0)
    with pytest.raises(NotFoundError, match="'nobody'"):
        client.query(QueryRequest(question=IMPELLER, adapter="nobody"), lambda _: None)
    wire.stop()
    for on_token in (None, lambda _: None):
        with pytest.raises(UnavailableError, match="engine"):
            client.query(QueryRequest(question=IMPELLER), on_token)


def test_engine_that_breaks_off_in_the_stream(client: Client, wire: WireEngine) -> None:
    wire.say("It", cut=True)
    tokens: list[str] = []
    with pytest.raises(UnavailableError, match="engine"):
        client.query(QueryRequest(question=IMPELLER), tokens.append)
    assert tokens == ["It"]


def test_bad_requests_do_not_leave_the_client() -> None:
    with pytest.raises(ValidationError, match="question"):
        QueryRequest(question=" ")


def test_nobody_answers(wire: WireEngine) -> None:
    wire.stop()
    with Client(wire.url) as client, pytest.raises(UnavailableError, match="graft up"):
        client.collections()


def test_something_else_answers(wire: WireEngine) -> None:
    with Client(wire.url) as client, pytest.raises(GraftError):
        client.collection("default")
