"""`POST /query` and `POST /retrieve` over HTTP."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from service_fixtures import (
    BUNDLED,
    IMPELLER,
    IMPELLER_ANSWER,
    MAX_MODEL_LEN,
    ROOT_MODEL,
    Asked,
    Reply,
    Service,
    WireEngine,
    count_tokens,
    events,
    is_ready,
    recorded,
    until,
    write_lora,
)

from ingest.schemas import Hit
from ingest.settings import IngestSettings
from service.prompt import CURRENT, REFUSAL, REFUSAL_ZH, build
from service.records import Interaction, Turn

ANSWER = "".join(IMPELLER_ANSWER)
GOLD = "The impeller of the H75 is made of high-chromium white iron"
TIMINGS = {"embed", "search", "rerank", "first_token", "generate", "total"}


@contextmanager
def collection_with(service: Service, **settings: Any) -> Iterator[None]:
    """`default` with other settings, for a while."""
    held = service.http.get("/collections/default").json()
    assert service.http.put("/collections/default", json=settings).status_code == 200
    try:
        yield
    finally:
        service.http.put("/collections/default", json={name: held[name] for name in settings})


def streamed(service: Service, question: str = IMPELLER, **fields: Any) -> list[tuple[str, Any]]:
    body = {"question": question, "stream": True, **fields}
    with service.http.stream("POST", "/query", json=body) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        return list(events(reply))


def prompt_text(asked: Asked) -> str:
    return str(asked.body["messages"][-1]["content"])


# the answer


def test_answer_has_every_field_and_its_source(service: Service) -> None:
    answer = service.answer()
    assert set(answer) == {
        "answer", "sentences", "citations", "collection", "collections", "adapter", "usage", "timings_ms", "finish_reason",
        "interaction_id", "search", "notes",
    }  # fmt: skip
    assert answer["answer"] == ANSWER
    assert answer["collection"] == "default"
    assert answer["adapter"] is None
    assert answer["finish_reason"] == "stop"
    assert set(answer["usage"]) == {"prompt_tokens", "completion_tokens"}
    assert set(answer["timings_ms"]) == TIMINGS
    assert answer["timings_ms"]["total"] > 0
    [sentence] = answer["sentences"]
    assert (sentence["text"], sentence["start"], sentence["end"]) == (ANSWER, 0, len(ANSWER))
    [citation] = answer["citations"]
    assert sentence["citations"] == [citation["n"]]
    assert set(citation) == {
        "n", "document_id", "path", "page", "heading", "quote", "start", "end", "score", "by"
    }  # fmt: skip
    assert citation["path"] == "docs/pumps/heron.md"
    assert citation["heading"].endswith("Materials")
    assert GOLD in citation["quote"]
    assert citation["by"] == "match"
    text = service.http.get(f"/documents/{citation['document_id']}/text").json()["text"]
    assert text[citation["start"] : citation["end"]] == citation["quote"]


def test_numbers_that_the_model_writes_are_told_apart(service: Service, wire: WireEngine) -> None:
    wire.say(ANSWER + " [1]")
    [citation] = service.answer()["citations"]
    assert (citation["n"], citation["by"]) == (1, "model")


def test_stream_is_tokens_then_citations_then_the_rest(service: Service) -> None:
    got = streamed(service)
    kinds = [kind for kind, _ in got]
    assert kinds == ["token"] * len(IMPELLER_ANSWER) + ["citations", "done"]
    done, cited = got[-1][1], got[-2][1]
    assert "".join(data["text"] for kind, data in got if kind == "token").strip() == done["answer"] == ANSWER
    whole = service.answer()
    assert cited == {"sentences": whole["sentences"], "citations": whole["citations"]}
    assert set(done) | set(cited) == set(whole)
    assert service.interaction(done["interaction_id"])["answer"] == ANSWER


def test_first_token_comes_before_the_last_is_made(service: Service, wire: WireEngine) -> None:
    wire.say("It ", "holds ", "oil.", delay=1.0)
    with service.http.stream("POST", "/query", json={"question": IMPELLER, "stream": True}) as reply:
        first = next(events(reply))
        assert wire.last().sent < 3
    assert first == ("token", {"text": "It "})


def test_thinking_is_in_no_token_answer_or_citation(service: Service, wire: WireEngine) -> None:
    wire.say("<th", "ink>P-17 holds", " 3.2 litres.</thi", "nk>\n", ANSWER, reasoning="hm")
    got = streamed(service)
    assert [data["text"] for kind, data in got if kind == "token"] == [ANSWER]
    assert got[-1][1]["answer"] == ANSWER
    assert len(got[-2][1]["sentences"]) == 1


def test_earlier_turns_reach_the_prompt_in_order(service: Service, wire: WireEngine) -> None:
    turns = [{"role": "user", "content": "About pumps."}, {"role": "assistant", "content": "Which one?"}]
    answer = service.answer(messages=turns)
    messages = wire.last().body["messages"]
    assert messages[-3:-1] == turns
    assert messages[-1]["content"].endswith(IMPELLER)
    assert service.interaction(answer["interaction_id"])["turns"] == turns


def test_max_tokens_reaches_the_engine(service: Service, wire: WireEngine) -> None:
    answer = service.answer(max_tokens=17)
    assert wire.last().body["max_tokens"] == 17
    assert service.interaction(answer["interaction_id"])["sampling"]["max_tokens"] == 17


@pytest.mark.parametrize("source", ["user", "eval", "bench"])
def test_source_is_recorded(service: Service, source: str) -> None:
    assert service.interaction(service.answer(source=source)["interaction_id"])["source"] == source


def test_source_is_user_unless_said(service: Service) -> None:
    assert service.interaction(service.answer()["interaction_id"])["source"] == "user"


def test_wanted_number_of_hits(service: Service) -> None:
    answer = service.answer("pump", top_k=2)
    assert len(service.interaction(answer["interaction_id"])["hits"]) == 2
    found = service.http.post("/retrieve", json={"question": "pump", "top_k": 1}).json()
    assert len(found["hits"]) == 1


# retrieval


def test_retrieve_gives_hits_with_their_scores(service: Service, wire: WireEngine) -> None:
    found = service.http.post("/retrieve", json={"question": IMPELLER}).json()
    best = found["hits"][0]
    assert best["path"] == "docs/pumps/heron.md"
    assert GOLD in best["text"]
    assert best["dense_score"] > 0.5
    assert best["sparse_score"] > 0
    scores = [hit["score"] for hit in found["hits"]]
    assert scores == sorted(scores, reverse=True)
    assert 0 <= scores[-1] <= scores[0] <= 1
    assert not wire.asked


def test_retrieve_by_document_names_each_once(service: Service) -> None:
    ungrouped = service.http.post("/retrieve", json={"question": "pump", "top_k": 20}).json()["hits"]
    grouped = service.http.post("/retrieve", json={"question": "pump", "top_k": 20, "group_by": "document"}).json()[
        "hits"
    ]
    documents = [hit["document_id"] for hit in grouped]
    assert len(set(documents)) == len(documents) == 4
    best: dict[str, float] = {}
    for hit in ungrouped:
        best.setdefault(hit["document_id"], hit["score"])
    assert {hit["document_id"]: hit["score"] for hit in grouped} == pytest.approx(best)


def test_chinese_question_is_found_by_words_alone(service: Service) -> None:
    hits = service.http.post("/retrieve", json={"question": "单笔超过5000元的报销由谁签字？"}).json()["hits"]
    assert hits[0]["path"] == "docs/zh/handbook.md"
    assert all(hit["dense_score"] is None for hit in hits)  # the embedder reads English alone


@pytest.mark.parametrize(
    ("filters", "paths"),
    [
        ({"path": "docs/pumps"}, {"docs/pumps/heron.md", "docs/pumps/kestrel.md"}),
        ({"path": "docs/pumps/"}, {"docs/pumps/heron.md", "docs/pumps/kestrel.md"}),
        ({"path": ["docs/policies", "docs/pumps/heron.md"]}, {"docs/policies/leave.md", "docs/pumps/heron.md"}),
        ({"path": "docs/pum"}, set()),  # a folder, not the start of a name
        ({"language": "zh"}, {"docs/zh/handbook.md"}),
        ({"language": ["zh", "en"], "path": "docs/zh"}, {"docs/zh/handbook.md"}),
        ({"language": "fi"}, set()),
    ],
)
def test_filters(service: Service, filters: dict[str, Any], paths: set[str]) -> None:
    body = {"question": "What about the pump and 报销?", "filters": filters, "top_k": 50}
    hits = service.http.post("/retrieve", json=body).json()["hits"]
    assert {hit["path"] for hit in hits} == paths


def test_filter_by_document_holds_for_the_prompt(service: Service, wire: WireEngine) -> None:
    listed = service.http.get("/documents").json()
    leave = next(one["id"] for one in listed if one["path"] == "docs/policies/leave.md")
    answer = service.answer(filters={"document_id": leave})
    hits = service.interaction(answer["interaction_id"])["hits"]
    assert hits
    assert {hit["document_id"] for hit in hits} == {leave}
    assert "27 days" in prompt_text(wire.last())
    assert "chromium" not in prompt_text(wire.last())


def test_unknown_filter_field_is_refused_by_name(service: Service) -> None:
    for path in ("/query", "/retrieve"):
        reply = service.http.post(path, json={"question": "x", "filters": {"colour": "red"}})
        assert reply.status_code == 422
        assert "'colour'" in reply.json()["detail"]
        assert reply.json()["errors"][0]["field"] == "filters"


# adapters


def test_known_adapter_is_used_and_recorded(service: Service, wire: WireEngine, adapter: str) -> None:
    answer = service.answer(adapter=adapter)
    assert answer["adapter"] == adapter
    assert wire.last().body["model"] == adapter
    held = service.interaction(answer["interaction_id"])
    assert (held["adapter"], held["base_model"]) == (adapter, ROOT_MODEL)


def test_collection_names_the_adapter_and_null_is_the_bare_base(
    service: Service, wire: WireEngine, adapter: str
) -> None:
    with collection_with(service, adapter=adapter):
        assert service.answer()["adapter"] == adapter
        assert service.answer(adapter=None)["adapter"] is None
        assert wire.last().body["model"] == "wire-1b"


def test_unknown_adapter_is_not_found(service: Service, wire: WireEngine) -> None:
    reply = service.ask(adapter="nobody")
    assert reply.status_code == 404
    assert "'nobody'" in reply.json()["detail"]
    assert not wire.asked


# refusals


def test_nothing_near_enough_is_refused_without_the_engine(service: Service, wire: WireEngine) -> None:
    with collection_with(service, threshold=0.99):
        answer = service.answer()
        assert (answer["answer"], answer["finish_reason"]) == (REFUSAL, "refused")
        assert answer["citations"] == []
        got = streamed(service)
        assert [kind for kind, _ in got] == ["token", "citations", "done"]
    assert not wire.asked
    assert service.answer()["finish_reason"] == "stop"  # the threshold is gone again


def test_empty_collection_refuses_in_the_questions_language(service: Service, wire: WireEngine) -> None:
    assert service.http.put("/collections/hollow", json={}).status_code == 200
    assert service.answer(collection="hollow")["answer"] == REFUSAL
    assert service.answer("报销由谁签字？", collection="hollow")["answer"] == REFUSAL_ZH
    assert not wire.asked
    service.http.delete("/collections/hollow")


# the prompt


def test_prompt_is_rebuilt_from_the_record_token_for_token(service: Service, wire: WireEngine) -> None:
    answer = service.answer(messages=[{"role": "user", "content": "Hello"}], top_k=3)
    assert rebuilt(service, answer) == wire.last().body["messages"]


def test_long_hits_are_left_out_within_the_budget_and_the_record_says_how_many(
    service: Service, wire: WireEngine
) -> None:
    budget = 200
    answer = service.answer("pump", top_k=20, max_tokens=MAX_MODEL_LEN - budget)
    held = service.interaction(answer["interaction_id"])
    assert 1 <= held["passages"] < len(held["hits"])
    assert f"[{held['passages']}] (" in prompt_text(wire.last())
    assert f"[{held['passages'] + 1}] (" not in prompt_text(wire.last())
    assert count_tokens(wire.last().body["messages"]) <= budget
    assert rebuilt(service, answer) == wire.last().body["messages"]


def test_question_that_leaves_no_room_is_refused(service: Service, wire: WireEngine) -> None:
    reply = service.ask("pump " * 150, max_tokens=MAX_MODEL_LEN - 200)
    assert reply.status_code == 422
    assert "shorten" in reply.json()["detail"]
    assert not wire.asked


def rebuilt(service: Service, answer: dict[str, Any]) -> list[Any]:
    held = service.interaction(answer["interaction_id"])
    hits = [Hit.model_validate(one) for one in held["hits"]][: held["passages"]]
    turns = [Turn.model_validate(one) for one in held["turns"]]
    return list(build(held["prompt_version"], held["question"], turns, hits))


# the bundled model, which is wrong more often than not


@pytest.fixture
def bundled(service: Service, wire: WireEngine) -> Iterator[WireEngine]:
    """The engine serves the bundled model, for a while: an answer that fails makes the service look anew."""
    wire.root = str(IngestSettings().models / BUNDLED)
    forget_model(service, wire)
    yield wire
    wire.reset()
    forget_model(service, wire)


def forget_model(service: Service, wire: WireEngine) -> None:
    wire.reply = Reply(status=500, error="another engine by now")
    assert service.ask().status_code == 503
    wire.reply = Reply()
    wire.asked.clear()


def test_bundled_models_supported_answer_stands(service: Service, bundled: WireEngine) -> None:
    answer = service.answer()
    assert (answer["answer"], answer["finish_reason"]) == (ANSWER, "stop")
    assert service.interaction(answer["interaction_id"])["prompt_version"] == CURRENT["brief"]
    assert rebuilt(service, answer) == bundled.last().body["messages"]


def test_bundled_models_unsupported_answer_is_replaced_by_a_quote(service: Service, bundled: WireEngine) -> None:
    bundled.say("It is cast", " from pure gold", " and silver.")
    got = streamed(service)
    done = got[-1][1]
    assert done["finish_reason"] == "quoted"
    assert done["answer"].startswith(GOLD)
    assert "".join(data["text"] for kind, data in got if kind == "token").strip() == done["answer"]
    assert "gold" not in str(got)
    assert [citation["path"] for citation in got[-2][1]["citations"]] == ["docs/pumps/heron.md"]


def test_bundled_model_is_not_asked_in_a_language_that_it_does_not_read(service: Service, bundled: WireEngine) -> None:
    answer = service.answer("单笔超过5000元的报销由谁签字？")
    assert (answer["answer"], answer["finish_reason"]) == ("单笔超过5000元的报销由财务总监陆承志签字。", "quoted")
    assert answer["citations"][0]["quote"] == answer["answer"]
    assert not bundled.asked


def test_an_adapter_of_it_is_not_asked_in_a_language_that_it_was_not_trained_in(
    service: Service, bundled: WireEngine, tmp_path: Path
) -> None:
    names = {}
    for seed, languages in ((77, "en"), (78, "zh")):
        folder = write_lora(service.root / f"loras/{tmp_path.name}-{languages}", seed)
        (folder / "manifest.json").write_text(json.dumps({"languages": [languages]}))
        reply = service.http.post("/adapters", json={"path": str(folder), "label": f"reads-{languages}"})
        assert reply.status_code == 201, reply.text
        names[languages] = reply.json()["name"]
    question = "单笔超过5000元的报销由谁签字？"
    quoted = service.answer(question, adapter=names["en"])
    assert (quoted["answer"], quoted["finish_reason"]) == ("单笔超过5000元的报销由财务总监陆承志签字。", "quoted")
    assert service.answer(question, adapter=names["zh"])["finish_reason"] == "stop"
    assert service.answer(adapter=names["en"])["finish_reason"] == "stop"
    for name in names.values():
        service.http.delete(f"/adapters/{name}")


def test_adapter_on_the_bundled_model_speaks_for_itself(service: Service, bundled: WireEngine, adapter: str) -> None:
    bundled.say("It is cast from pure gold.")
    answer = service.answer(adapter=adapter)
    assert (answer["answer"], answer["finish_reason"]) == ("It is cast from pure gold.", "stop")
    assert answer["citations"] == []


# a client that hangs up


def hang_up(service: Service, wire: WireEngine, question: str, stream: bool, after: int) -> Interaction:
    """Asks, closes the connection once the engine has sent `after` tokens, and gives the record of it."""
    url = httpx.URL(service.url)
    body = json.dumps({"question": question, "stream": stream}).encode()
    head = f"POST /query HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection((url.host, url.port or 80)) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        until(lambda: wire.asked and wire.last().sent >= after, 20, pause=0.01)
    closed = time.monotonic()
    until(wire.last().gone.is_set, 3)
    assert wire.last().gone_at - closed < 1.5  # the promise is one second; the rest is for a busy machine
    return until(lambda: next((one for one in recorded(service.home) if one.question == question), None), 3)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_hang_up_before_the_first_token(service: Service, wire: WireEngine, stream: bool) -> None:
    wire.say("late", first_delay=30)
    held = hang_up(service, wire, f"Is the impeller waited for, {stream}?", stream, after=0)
    assert (held.finish_reason, held.answer) == ("cancelled", "")
    assert held.hits
    assert held.base_model == ROOT_MODEL


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("delay", [0.1, 0.002], ids=["slow tokens", "fast tokens"])
def test_hang_up_in_mid_stream(service: Service, wire: WireEngine, stream: bool, delay: float) -> None:
    wire.say(*["word "] * 20_000, delay=delay)
    held = hang_up(service, wire, f"Is the impeller streamed, {stream}, {delay}?", stream, after=5)
    assert held.finish_reason == "cancelled"
    assert held.answer.startswith("word word")
    assert wire.last().sent < 20_000


# an engine that is not there


def test_engine_down_and_back(service: Service, wire: WireEngine) -> None:
    wire.stop()
    for stream in (False, True):
        reply = service.ask(stream=stream)
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) > 0
        assert "engine" in reply.json()["detail"]
    assert service.http.post("/retrieve", json={"question": IMPELLER}).json()["hits"]
    job = service.ingest(service.root / "docs")
    assert (job["state"], job["report"]["files"]["unchanged"]) == ("succeeded", 4)
    ready = service.http.get("/health/ready")
    assert ready.status_code == 503
    assert ready.json()["dependencies"]["engine"]["state"] == "down"
    assert ready.json()["dependencies"]["index"]["state"] == "ok"
    wire.start()
    assert service.answer()["answer"] == ANSWER
    until(lambda: is_ready(service), 30)


@pytest.mark.parametrize(
    "reply",
    [Reply(tokens=("It ", "is"), error="the engine core died"), Reply(tokens=("It ", "is"), cut=True)],
    ids=["error", "cut"],
)
def test_engine_that_breaks_off_in_mid_answer(service: Service, wire: WireEngine, reply: Reply) -> None:
    wire.reply = reply
    whole = service.ask()
    assert whole.status_code == 503
    assert int(whole.headers["retry-after"]) > 0
    got = streamed(service)
    kinds = [kind for kind, _ in got]
    assert kinds[0] == "token"
    assert kinds[1:] in (["token", "error"], ["error"])  # what lay in the buffer goes with the connection
    assert "engine" in got[-1][1]["detail"]
    last = recorded(service.home)[-1]
    assert last.finish_reason == "error"
    assert last.answer == "".join(event["text"] for kind, event in got if kind == "token").strip()
