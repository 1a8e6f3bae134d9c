"""Feedback and interactions over HTTP."""

from collections.abc import Callable

import pytest
from service_fixtures import IMPELLER, Service

from service.prompt import CURRENT


@pytest.fixture
def interaction_id(service: Service) -> str:
    return str(service.answer()["interaction_id"])


@pytest.fixture
def give(service: Service, interaction_id: str) -> Callable[..., str]:
    def given(key: str | None = None, **fields: str) -> str:
        headers = {"Idempotency-Key": key} if key else {}
        reply = service.http.post("/feedback", json={"interaction_id": interaction_id, **fields}, headers=headers)
        assert reply.status_code == 201, reply.text
        return str(reply.json()["feedback_id"])

    return given


def test_interaction_shows_what_the_answer_was_made_of(service: Service, interaction_id: str) -> None:
    held = service.interaction(interaction_id)
    assert (held["id"], held["question"], held["collection"]) == (interaction_id, IMPELLER, "default")
    assert held["principal"] == "local"
    assert held["index_fingerprint"] == service.http.get("/collections/default").json()["fingerprint"]
    assert held["prompt_version"] == CURRENT["cited"]
    assert {"chunk_id", "text", "score"} <= set(held["hits"][0])
    assert held["sampling"] == {"max_tokens": 256, "temperature": 0.0}
    assert held["feedback"] == []


def test_each_kind_of_feedback_is_appended(service: Service, interaction_id: str, give: Callable[..., str]) -> None:
    kinds = [{"rating": "up"}, {"rating": "down"}, {"comment": "太短"}, {"correction": "White iron."}]
    identities = [give(**kind) for kind in [*kinds, {"rating": "up", "comment": "a", "correction": "b"}]]
    assert len(set(identities)) == 5
    held = service.interaction(interaction_id)["feedback"]
    assert [one["id"] for one in held] == identities
    assert [one["rating"] for one in held] == ["up", "down", None, None, "up"]
    assert held[2]["comment"] == "太短"
    assert held[3]["correction"] == "White iron."


def test_idempotency_key(service: Service, interaction_id: str, give: Callable[..., str]) -> None:
    key = f"key of {interaction_id}"
    first = give(key, rating="up")
    assert give(key, rating="up") == first
    other = {"interaction_id": interaction_id, "rating": "down"}
    reply = service.http.post("/feedback", json=other, headers={"Idempotency-Key": key})
    assert reply.status_code == 409
    assert key in reply.json()["detail"]
    assert [one["id"] for one in service.interaction(interaction_id)["feedback"]] == [first]
    assert give(rating="up") != give(rating="up")  # without a key, each is one more
