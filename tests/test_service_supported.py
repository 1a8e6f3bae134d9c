"""Answers that hold up: each sentence is looked for in the passages, and what is not found is marked, dropped or refused."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from service_fixtures import (
    DOCUMENTS,
    IMPELLER,
    Service,
    WireEngine,
    count_tokens,
    events,
    hit,
    is_ready,
    recorded,
    running,
    until,
    write,
)

from service.check import Sentences
from service.cite import cite, split_sentences
from service.prompt import REFUSAL, REFUSAL_ZH
from service.schemas import Sentence

pytestmark = pytest.mark.slow

OIL = hit(
    "Change the oil of the H75 every 4,000 running hours. The chamber holds 3.2 litres; at most 20.0 % may be water.",
    n=1,
)
STARTS = hit("The K40 may be started six times per hour, as Table 2 says [12]. A start takes 90 seconds.", n=2)
LEAVE = hit("满十年不满二十年的员工，每年12天年休假。报销由陆承志签字。", n=3, language="zh")
PASSAGES = [OIL, STARTS, LEAVE]


def only(answer: str) -> Sentence:
    (sentence,) = cite(answer, PASSAGES).sentences
    return sentence


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("Change the oil of the H75 every 5,000 running hours.", "number"),
        ("Change the oil of the H75 every 5,000 running hours [1].", "number"),
        ("Change the oil of the H76 every 4,000 running hours.", "number"),
        ("The K40 may be started seven times per hour [2].", "number"),
        ("It holds 3.2 litres [1] and costs 500 crowns.", "number"),
        ("满十年不满二十年的员工，每年13天年休假。", "number"),
        ("满十年不满二十年的员工，每年十三天年休假。", "number"),
        ("The director of the museum opened a new exhibition.", "words"),
        ("Yes.", "words"),
        ("The museum opens on Sunday [1].", "citation"),
        ("The chamber holds 3.2 litres [9].", "citation"),
        ("The chamber holds 3.2 litres [0].", "citation"),
        ("The chamber holds 3.2 litres [1][9].", "citation"),
        ("The chamber holds 3.2 litres [2].", "citation"),
    ],
)
def test_what_the_passages_do_not_say_is_marked_with_the_reason(answer: str, why: str) -> None:
    assert (only(answer).supported, only(answer).unsupported) == (False, why)


def test_wrong_marker_does_not_count_and_the_right_source_is_named() -> None:
    assert only("The chamber holds 3.2 litres [9].").citations == (1,)
    assert only("The museum opens on Sunday [1].").citations == ()


@pytest.mark.parametrize(
    "answer",
    [
        "Change the oil of the H75 every 4000 running hours.",
        "Change the oil of the H75 every 4\u202f000 running hours [1].",
        "Change the oil of the H75 every 4’000 hours [1].",
        "The chamber holds 3,2 litres [1].",
        "The chamber holds ３.２ litres [1].",
        "At most 20% may be water [1].",
        "At most twenty % may be water [1].",
        "The K40 may be started 6 times per hour.",
        "A start takes ninety seconds [2].",
        "满十年不满二十年的员工，每年１２天年休假。",
        "满10年不满20年的员工，每年十二天年休假[3]。",
        "The K40 may be started six times per hour, as Table 2 says [12].",  # copied with the passage's own reference
    ],
)
def test_numbers_are_found_however_they_are_written(answer: str) -> None:
    assert (only(answer).unsupported, only(answer).citations != ()) == (None, True)


def test_one_sentence_may_have_two_sources() -> None:
    joint = only("The chamber holds 3.2 litres [1], and a start of the K40 takes 90 seconds [2].")
    assert (joint.supported, joint.citations) == (True, (1, 2))
    behind = only("The chamber holds 3.2 litres and a start takes 90 seconds [1, 2].")
    assert (behind.supported, behind.citations) == (True, (1, 2))


def test_documents_that_contradict_each_other_are_each_cited_for_their_own() -> None:
    old, new = hit("The valve V-3 is rated for 16 bar.", n=1), hit("The valve V-3 is rated for 10 bar.", n=2)
    cited = cite("The valve V-3 is rated for 16 bar [1]. Elsewhere it is rated for 10 bar [2].", [old, new])
    assert [(one.supported, one.citations) for one in cited.sentences] == [(True, (1,)), (True, (2,))]
    assert [one.quote for one in cited.citations] == [old.text, new.text]
    crossed = cite("The valve V-3 is rated for 16 bar [2]. The valve V-3 is rated for 10 bar [1].", [old, new])
    assert [one.unsupported for one in crossed.sentences] == ["citation", "citation"]
    both = cite("The valve V-3 is rated for 16 bar [1][2].", [old, new])
    assert (both.sentences[0].unsupported, both.sentences[0].citations) == ("citation", (1,))


@pytest.mark.parametrize(
    "idle",
    [
        REFUSAL,
        REFUSAL_ZH,
        "The passages do not mention the price.",
        "I don't know.",
        "文档中没有提到价格。",
        "Which pump do you mean?",
        "您问的是哪台水泵？",
        "Hello!",
        "Sure.",
    ],
)
def test_what_claims_nothing_needs_no_source(idle: str) -> None:
    assert only(idle) == Sentence(text=idle, start=0, end=len(idle))


@pytest.mark.parametrize(
    "claim",
    [
        "The documents do not say so, but the code is BANANA-4.",
        "Did you know that 700 pumps failed?",
        "文档没有说，但价格是500元。",
    ],
)
def test_a_refusal_or_a_question_hides_no_claim(claim: str) -> None:
    assert not only(claim).supported


texts = st.lists(
    st.sampled_from(
        [
            "It is 3",
            ".",
            " ",
            "2 litres",
            "[1]",
            " [2, 3]",
            "[",
            "\n",
            "\n\n",
            "- oil",
            "。",
            "”",
            "e.g.",
            "Dr",
            "!",
            "每年",
        ]
    ),
    max_size=14,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(texts, st.lists(st.integers(1, 6), max_size=40))
def test_a_stream_of_any_pieces_gives_the_sentences_of_the_whole(text: str, sizes: list[int]) -> None:
    held, given_out, at = Sentences(), [], 0
    for size in sizes:
        given_out += held.feed(text[at : at + size])
        at += size
    given_out += held.feed(text[at:])
    given_out += held.rest()
    assert "".join(given_out) == text.rstrip()
    assert [one.strip() for one in given_out] == [text[start:end] for start, end in split_sentences(text)]


# as it comes


TRUE, WRONG = "Grease the K40 bearings every 2,000 running hours [1].", " Each nipple takes 99 g [1]."
LAST = " The K40 may be started at most six times per hour [2]."
ASK: dict[str, Any] = {
    "question": "How often are the K40 bearings greased?",
    "filters": {"path": "docs/pumps/kestrel.md"},
}


def streamed(service: Service, **fields: Any) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """-> the text of each token, the citations, the end."""
    with service.http.stream("POST", "/query", json={**ASK, "stream": True, **fields}) as reply:
        got = list(events(reply))
    assert [kind for kind, _ in got[-2:]] == ["citations", "done"]
    return [data["text"] for kind, data in got if kind == "token"], got[-2][1], got[-1][1]


def counted(service: Service, supported: str, lacks: str) -> float:
    found = service.http.get("/metrics").text.splitlines()
    line = f'graft_sentences_total{{lacks="{lacks}",supported="{supported}"}} '
    return sum(float(one.removeprefix(line)) for one in found if one.startswith(line))


def test_marked_sentences_are_shown_recorded_and_counted(service: Service, wire: WireEngine) -> None:
    before = counted(service, "false", "number"), counted(service, "true", "")
    wire.say(TRUE, WRONG)
    answer = service.answer(**ASK)
    assert answer["answer"] == TRUE + WRONG
    assert [(one["supported"], one["unsupported"]) for one in answer["sentences"]] == [(True, None), (False, "number")]
    held = service.interaction(answer["interaction_id"])
    assert (held["sentences"], held["said"]) == (answer["sentences"], None)
    assert (counted(service, "false", "number"), counted(service, "true", "")) == (before[0] + 1, before[1] + 1)


def test_fifty_pages_against_a_small_budget(service: Service, wire: WireEngine) -> None:
    pages = {
        f"{n}.md": f"# Page {n}\n\nThe tank number {n} of the yard holds {n + 100} litres of oil." for n in range(50)
    }
    try:
        assert service.ingest(write(service.root / "pages", pages), collection="pages")["state"] == "succeeded"
        wire.say("The tank holds litres of oil [1]. The tank holds litres of oil [20].")
        answer = service.answer("How many litres does each tank hold?", collection="pages", top_k=50, max_tokens=3900)
        held = service.interaction(answer["interaction_id"])
        assert len(held["hits"]) == 50
        assert 1 <= held["passages"] < 20
        assert count_tokens(wire.last().body["messages"]) <= 196
        assert [one["unsupported"] for one in answer["sentences"]] == [None, "citation"]  # no 20th was in the prompt
    finally:
        service.http.delete("/collections/pages")


# a control of evaluations


def test_without_passages_the_model_answers_by_heart(service: Service, wire: WireEngine) -> None:
    wire.say("White iron [1].")
    answer = service.answer(source="eval", without_passages=True)
    (system, asked) = wire.last().body["messages"]
    assert (system["role"], asked["content"]) == ("system", IMPELLER)
    assert (answer["answer"], answer["citations"]) == ("White iron [1].", [])
    assert answer["sentences"][0]["supported"] is False
    held = service.interaction(answer["interaction_id"])
    assert (held["hits"], held["passages"], held["prompt_version"]) == ([], 0, "plain-1")


@pytest.mark.parametrize("source", ["user", "bench"])
def test_without_passages_is_for_evaluations_alone(service: Service, source: str) -> None:
    reply = service.ask(source=source, without_passages=True)
    assert reply.status_code == 422
    assert "eval" in reply.json()["detail"]


# dropped or refused


def _started(policy: str, tmp_path_factory: pytest.TempPathFactory, wire: WireEngine) -> Iterator[Service]:
    root = write(tmp_path_factory.mktemp("root"), {f"docs/{name}": text for name, text in DOCUMENTS.items()})
    home = tmp_path_factory.mktemp("homes") / policy
    up = ("--no-engine", "--ingest", "docs")
    with running(home, root, *up, SERVICE_LLM_URL=wire.url, SERVICE_UNSUPPORTED=policy) as service:
        until(lambda: is_ready(service), 120)
        yield service


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory, wire_engine: WireEngine) -> Iterator[Service]:
    yield from _started("drop", tmp_path_factory, wire_engine)


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory, wire_engine: WireEngine) -> Iterator[Service]:
    yield from _started("refuse", tmp_path_factory, wire_engine)


def test_drop_leaves_the_sentence_out_of_stream_answer_and_record(dropping: Service, wire: WireEngine) -> None:
    wire.say(*TRUE.partition("bearings"), *WRONG.partition("99"), *LAST.partition("six"))
    tokens, cited, done = streamed(dropping)
    assert tokens == [TRUE, LAST]
    assert (done["answer"], done["finish_reason"]) == (TRUE + LAST, "dropped")
    assert [one["supported"] for one in cited["sentences"]] == [True, True]
    held = dropping.interaction(done["interaction_id"])
    assert (held["answer"], held["said"]) == (TRUE + LAST, TRUE + WRONG + LAST)
    assert counted(dropping, "false", "number") == 1
    assert dropping.answer(**ASK)["answer"] == TRUE + LAST


def test_drop_of_all_is_the_refusal(dropping: Service, wire: WireEngine) -> None:
    wire.say(WRONG)
    tokens, _, done = streamed(dropping)
    assert tokens == [REFUSAL]
    assert (done["answer"], done["finish_reason"]) == (REFUSAL, "refused")
    assert dropping.interaction(done["interaction_id"])["said"] == WRONG.strip()


def test_drop_leaves_a_supported_answer_and_a_refusal_alone(dropping: Service, wire: WireEngine) -> None:
    for said in (TRUE + LAST, REFUSAL):
        wire.say(*said.partition(" "))
        answer = dropping.answer(**ASK)
        assert (answer["answer"], answer["finish_reason"]) == (said, "stop")
        assert dropping.interaction(answer["interaction_id"])["said"] is None


def test_drop_does_not_wait_for_the_end_of_the_answer(dropping: Service, wire: WireEngine) -> None:
    wire.say(TRUE, LAST, " Hello", " there", delay=1.0)
    with dropping.http.stream("POST", "/query", json={**ASK, "stream": True}) as reply:
        first = next(events(reply))
        assert wire.last().sent < 4
    assert first == ("token", {"text": TRUE})


def test_drop_records_what_was_shown_before_a_hang_up(dropping: Service, wire: WireEngine) -> None:
    question = "How often are the K40 bearings greased, by the way?"
    wire.say(TRUE, WRONG, LAST, *[" word"] * 1000, delay=0.02)
    url = httpx.URL(dropping.url)
    body = json.dumps({**ASK, "question": question, "stream": True}).encode()
    head = f"POST /query HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection((url.host, url.port or 80)) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        until(lambda: wire.asked and wire.last().sent > 20, 20, pause=0.01)
    until(wire.last().gone.is_set, 5)
    held = until(lambda: next((one for one in recorded(dropping.home) if one.question == question), None), 5)
    assert (held.finish_reason, held.answer) == ("cancelled", TRUE + LAST)
    assert held.said is not None
    assert held.said.startswith(TRUE + WRONG + LAST + " word")


def test_refuse_ends_at_the_first_unsupported_sentence(refusing: Service, wire: WireEngine) -> None:
    wire.say(TRUE, *WRONG.partition("99"), LAST, *[" word"] * 1000, delay=0.02)
    tokens, cited, done = streamed(refusing)
    assert tokens == [TRUE]
    assert (done["answer"], done["finish_reason"]) == (REFUSAL, "refused")
    assert [one["text"] for one in cited["sentences"]] == [REFUSAL]
    assert cited["citations"] == []
    until(wire.last().gone.is_set, 5)  # the engine need not go on
    held = refusing.interaction(done["interaction_id"])
    assert (held["answer"], held["sentences"]) == (REFUSAL, cited["sentences"])
    assert held["said"].startswith(TRUE + WRONG)
    assert refusing.answer(**ASK)["answer"] == REFUSAL


def test_refuse_shows_a_supported_answer_and_a_refusal_in_place_of_another(refusing: Service, wire: WireEngine) -> None:
    wire.say(*(TRUE + LAST).partition("bearings"))
    assert streamed(refusing)[2]["answer"] == TRUE + LAST
    wire.say("Every 3,000 hours.")
    tokens, _, done = streamed(refusing)
    assert tokens == [done["answer"]] == [REFUSAL]
    wire.say("单笔超过6000元的报销由陆承志签字。")
    assert refusing.answer("报销由谁签字？")["answer"] == REFUSAL_ZH


def test_the_control_shows_what_the_model_says(refusing: Service, wire: WireEngine) -> None:
    wire.say("Gold.")
    assert refusing.answer(source="eval", without_passages=True)["answer"] == "Gold."
