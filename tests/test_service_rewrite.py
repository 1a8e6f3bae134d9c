"""Follow-up questions: which lean on earlier turns, what is searched for then, and what the turn before cited."""

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from service_fixtures import Asked, Service, WireEngine, hit, is_ready, run_graft, running, until, write

from service.follow_up import Rewriting, makes_sense, search_for
from service.generate import Generator
from service.records import Turn
from service.rewrite import Search, by_rules, leans, shared, subject, with_cited
from service.schemas import QueryRequest

K40 = "How often must the bearings of the Kestrel K40 be greased?"
K40_ANSWER = "Grease the K40 bearings every 2,000 running hours."
STARTS = "How many times per hour may the K40 be started?"
OIL = "How often must the oil in the seal chamber of the H75 be changed?"
PUMP_ZH = "QH-200型水泵的轴承每运行多少小时加注一次润滑脂？"


def talk(*said: str) -> list[Turn]:
    """Turns of the user and the assistant by turns."""
    return [Turn(role=("user", "assistant")[at % 2], content=text) for at, text in enumerate(said)]


# the rules


@pytest.mark.parametrize(
    "question",
    [
        "And how often?", "What about the H75?", "Why not?", "What does it mean if it looks milky?", "How long does that take?",
        "Who signed this?", "Does she review reports too?", "Thanks! And at Eastgate?", "Is the same true for the H75?",
        "What happens after that?", "Where are they kept, and under which part number?", "What if that person has gone home?",
        "那它的机油呢？", "那QH-350型呢？", "省外呢？", "这个怎么算？", "如果超过了的话怎么办？", "他的电话是多少？",
        "该型号的转速是多少？",
    ],
)  # fmt: skip
def test_leans_on_what_was_said(question: str) -> None:
    assert leans(question) == "yes"


@pytest.mark.parametrize(
    "question", ["Where?", "How many litres?", "Who reads the meter?", "多久一次？", "婚假有多少天？"]
)
def test_too_short_to_tell(question: str) -> None:
    assert leans(question) == "perhaps"


@pytest.mark.parametrize(
    "question",
    [
        "How often does a household receive a water bill?", "What load may the travelling crane in the workshop carry?",
        "Is it allowed to use a phone while driving?", "How heavy is the K40?", "Which rules hold for those who carry loads?",
        "How long must the H75 motor cool before it can be started again?", "How long does it take to replace a mechanical seal?",
        "Does the manual say that pumps must be vented before starting?",
        "Is there a noise limit at night for Millbrook station?",
        "And what does a cubic metre of drinking water cost from January 2025?",
        "员工每月加班时间最多可以有多少小时？", "QH-350型电机的绝缘电阻低于多少时不得送电？", "出差应该怎么报销住宿费用？",
        "除了婚假以外公司规定的其他假期有哪些？", "QH-350型水泵换下的油呈乳白色时它说明什么？",
        "SELECT name FROM pumps WHERE id = 3;", "ERROR 0x80070005 access denied while writing the index file",
    ],
)  # fmt: skip
def test_stands_alone_and_is_searched_for_as_it_is(question: str) -> None:
    assert by_rules(question, talk(K40, K40_ANSWER)) == Search(question, "no")
    assert by_rules(question, talk(PUMP_ZH, "每运行3000小时加注一次。")) == Search(question, "no")


@pytest.mark.parametrize(
    ("turns", "question", "search"),
    [
        (talk(K40, K40_ANSWER), "And with how much grease?", f"{K40} And with how much grease?"),
        (
            talk(STARTS, "Six times."),
            "What about the H75?",
            "How many times per hour may the H75 be started? What about the H75?",
        ),
        (
            talk("May the Kestrel K40 be used for sewage?", "No."),
            "What about the H75?",
            "May the H75 be used for sewage? What about the H75?",
        ),
        (
            talk("Is the K40 heavier than the H75?", "No."),
            "And the S20?",
            "Is the heavier than the ? And the S20?",
        ),
        (
            talk("How often does TideBoard 4.0 poll the pits?", "Every 60 seconds."),
            "How was it in 3.7?",
            "How often does TideBoard 3.7 poll the pits? How was it in 3.7?",
        ),
        (  # the pronoun stands for what the answer names
            talk("Who answers questions about the K40 manual?", "They go to the supervisor, Marta Ellingsen."),
            "Which report has she reviewed?",
            "K40 Marta Ellingsen Which report has she reviewed?",
        ),
        (  # the question before leans itself
            talk(K40, K40_ANSWER, "And the coupling?", "Every 4,000 hours."),
            "How is it aligned?",
            f"{K40} And the coupling? How is it aligned?",
        ),
        (  # the one before does not
            talk(K40, K40_ANSWER, OIL, "Every 4,000 hours."),
            "What does it mean if it looks milky?",
            f"{OIL} What does it mean if it looks milky?",
        ),
        (
            talk(PUMP_ZH, "每运行3000小时加注一次。"),
            "那QH-350型呢？",
            "QH-350型水泵的轴承每运行多少小时加注一次润滑脂？ 那QH-350型呢？",
        ),
        (
            talk("哪台水泵的效率最高？", "四台水泵中L3的效率最高。"),
            "它的振动呢？",
            "哪台水泵的效率最高？ L3 它的振动呢？",
        ),
        (talk("省内出差的住宿标准是每晚多少钱？"), "省外呢？", "省内出差的住宿标准是每晚多少钱？ 省外呢？"),
    ],
)
def test_what_is_searched_for(turns: list[Turn], question: str, search: str) -> None:
    assert by_rules(question, turns) == Search(search, "yes")


@pytest.mark.parametrize(
    "turns",
    [[], talk(""), talk(" \n", "Yes?"), [Turn(role="assistant", content="Ask me about pumps.")]],
    ids=["no turns", "an empty one", "only blanks asked", "nobody asked"],
)
def test_without_an_earlier_question_there_is_nothing_to_lean_on(turns: list[Turn]) -> None:
    assert by_rules("And how often?", turns) == Search("And how often?", "no")


@pytest.mark.parametrize(
    "piece", ["K40 ", "it ", "那", "A", "a-1-", "3.7,", "Ok, ", "\n", "!?", "🙂", "A B ", "the same "]
)
def test_very_long_turns_take_next_to_no_time(piece: str) -> None:
    long = (piece * 32_000)[:32_000]
    turns = talk(*[long] * 50)
    started = time.process_time()
    for question in ("And it?", "那它呢？", long[:8_000]):
        assert len(by_rules(question, turns).text) < 9_700
    assert time.process_time() - started < 1


def test_of_a_long_turn_the_end_counts_too() -> None:
    log = "start of the log\n" + "line\n" * 5_000 + "Why did the K40 at Eastgate trip?"
    assert by_rules("And when?", talk(log)).text.endswith("Why did the K40 at Eastgate trip? And when?")


def test_sentence_is_chosen_by_what_was_searched_for_where_the_question_says_nothing() -> None:
    assert subject("And how often?", "the K40 bearings") == "the K40 bearings"
    assert subject("那它呢？", "轴承") == "轴承"
    for question in ("And with how much grease?", "What about the H75?", "那QH-350呢？", "停机值呢？", "¿Y la bomba?"):
        assert subject(question, "the K40 bearings") == question


# the places


def test_results_share_the_places() -> None:
    rewritten, as_is = [hit("a", n) for n in (1, 2, 3, 4, 5)], [hit("b", n) for n in (6, 1, 7, 8)]
    assert [one.chunk_id for one in shared("yes", rewritten, as_is, 6)] == ["c1", "c2", "c3", "c6", "c4", "c5"]
    assert [one.chunk_id for one in shared("perhaps", rewritten, as_is, 5)] == ["c6", "c1", "c2", "c7", "c3"]
    assert [one.chunk_id for one in shared("yes", [], as_is, 9)] == ["c6", "c1", "c7", "c8"]
    assert shared("perhaps", [], [], 5) == []
    parts = [hit("a", n, document_id="d", parent={"start": 0, "end": 9}) for n in (1, 2)]
    assert shared("yes", parts[:1], parts[1:], 5) == parts[:1]  # of one parent
    assert with_cited(parts[:1], parts[1:], 5) == parts[:1]


def test_what_was_cited_takes_the_last_places_and_a_third_of_them_at_most() -> None:
    found, cited = [hit("a", n) for n in range(1, 10)], [hit("b", n) for n in (2, 11, 12, 13, 14)]
    assert [one.chunk_id for one in with_cited(found, cited, 6)] == ["c1", "c2", "c3", "c4", "c11", "c12"]
    assert [one.chunk_id for one in with_cited(found, cited, 1)] == ["c1"]
    assert [one.chunk_id for one in with_cited([], cited[:2], 5)] == ["c2"]
    assert with_cited(found, [], 9) == found


# by the engine


@pytest.mark.parametrize(
    ("said", "sensible"),
    [
        ("How much grease do the bearings of the K40 get?", True),
        ("And with how much grease?", True),
        ("", False),
        ("With 35 g of grease per nipple.", False),  # it answers
        ("How much grease do the bearings of the H75 get?", False),  # nobody named it
        ("How much grease do the bearings get every 3,000 hours?", False),
        ("What is the capital of France?", False),
        ("How much grease " + "and grease " * 60 + "?", False),
    ],
)
def test_what_the_engine_says_is_looked_at(said: str, sensible: bool) -> None:
    assert makes_sense(said, "And with how much grease?", talk(K40, K40_ANSWER)) is sensible


@pytest.fixture
def engine() -> Iterator[WireEngine]:
    wire = WireEngine()
    yield wire
    wire.stop()


def searched(
    engine: WireEngine, question: str, way: Rewriting = "auto", seconds: float = 10, small: bool = False
) -> Search:
    async def asked() -> Search:
        generator = Generator(engine.url, None, 20)
        models: dict[str, Any] = {engine.root: ("en",)} if small else {}
        try:
            return await search_for(question, talk(K40, K40_ANSWER), way, seconds, generator, models)
        finally:
            await generator.close()

    return asyncio.run(asked())


def test_engine_rewrites(engine: WireEngine) -> None:
    engine.say("How much grease do", " the bearings of the K40 get?\n\n", "It is 35 g.")
    assert searched(engine, "And how much grease?") == Search("How much grease do the bearings of the K40 get?", "yes")
    [asked] = engine.asked
    assert (asked.body["model"], asked.body["temperature"]) == ("wire-1b", 0)
    prompt = asked.body["messages"][-1]["content"]
    assert K40 in prompt
    assert K40_ANSWER in prompt
    assert prompt.endswith("And how much grease?")


def test_engine_says_that_it_stands_alone(engine: WireEngine) -> None:
    engine.say("Who reads the meter?")
    assert searched(engine, "Who reads the meter?") == Search("Who reads the meter?", "no")


def by_the_rules(question: str) -> Search:
    return by_rules(question, talk(K40, K40_ANSWER))


def test_small_model_and_the_other_ways(engine: WireEngine) -> None:
    engine.say("How much grease do the bearings of the K40 get?")
    question = "And how much grease?"
    assert searched(engine, question, small=True) == by_the_rules(question)
    assert searched(engine, question, way="rules") == by_the_rules(question)
    assert searched(engine, question, way="off") == Search(question, "no")
    assert engine.asked == []
    assert searched(engine, question, way="engine", small=True) == Search(engine.reply.tokens[0], "yes")


def test_engine_that_is_too_slow_is_left_and_told_so(engine: WireEngine) -> None:
    engine.say("How much grease", " do the bearings of the K40 get?", first_delay=30)
    assert searched(engine, "And how much grease?", seconds=0.2) == by_the_rules("And how much grease?")
    assert engine.last().gone.wait(10)


@pytest.mark.parametrize(
    "reply",
    [
        {"status": 500, "error": "no"},
        {"error": "out of memory"},
        {"cut": True},
        {"tokens": ()},
        {"tokens": ("Every hour.",)},
    ],
    ids=["refused", "broke off", "cut", "silent", "answered"],
)
def test_engine_that_fails_leaves_it_to_the_rules(engine: WireEngine, reply: dict[str, Any]) -> None:
    engine.say(*reply.pop("tokens", ("How much",)), **reply)
    assert searched(engine, "And how much grease?") == by_the_rules("And how much grease?")


def test_engine_that_is_down_leaves_it_to_the_rules(engine: WireEngine) -> None:
    engine.stop()
    assert searched(engine, "And how much grease?") == by_the_rules("And how much grease?")


# the flow


def texts(service: Service, answer: dict[str, Any]) -> list[str]:
    return [hit["text"] for hit in service.interaction(answer["interaction_id"])["hits"]]


def said(*texts: str) -> list[dict[str, str]]:
    return [turn.model_dump() for turn in talk(*texts)]


def test_follow_up_finds_what_its_standalone_form_finds(service: Service) -> None:
    turns = said("How often must the oil of the K40 be changed?", "The documents say nothing about this.")
    found = service.answer("What about the H75?", messages=turns, top_k=1)
    alone = service.answer("How often must the oil of the H75 be changed?", top_k=1)
    assert "Change the oil" in texts(service, found)[0]
    assert texts(service, found) == texts(service, alone)
    assert found["search"] == "How often must the oil of the H75 be changed? What about the H75?"
    assert service.interaction(found["interaction_id"])["search"] == found["search"]
    assert found["timings_ms"]["rewrite"] >= 0
    assert alone["search"] is None
    assert "rewrite" not in alone["timings_ms"]


def test_chinese_follow_up(service: Service) -> None:
    turns = said("工作满一年不满十年的员工每年有多少天年休假？", "7天。")
    found = service.answer("满二十年的呢？", messages=turns)
    assert "16天" in texts(service, found)[0]
    assert found["search"].startswith(turns[0]["content"])


def test_question_that_stands_alone_is_not_dragged_to_the_old_subject(service: Service) -> None:
    turns = said("How often must the oil of the H75 be changed?", "Every 4,000 running hours.")
    found = service.answer("How many days of annual leave do employees have?", messages=turns, top_k=1)
    assert "27 days" in texts(service, found)[0]
    assert found["search"] is None
    unsure = service.answer("Who gets leave?", messages=turns, top_k=2)  # too short to tell: both are there
    first, second = texts(service, unsure)
    assert "27 days" in first
    assert "Change the oil" in second


def test_caller_says_what_to_search_for(service: Service, wire: WireEngine) -> None:
    found = service.answer("And how often?", search="annual leave of employees", top_k=1)
    assert "27 days" in texts(service, found)[0]
    assert found["search"] == "annual leave of employees"
    assert wire.last().body["messages"][-1]["content"].endswith("And how often?")


def test_engine_rewrites_in_the_flow_and_the_prompt_has_the_question(service: Service, wire: WireEngine) -> None:
    wire.say("How often must the bearings of the K40 be greased?")
    found = service.answer("And the bearings?", messages=said("How often is the K40 greased?", "Often."), top_k=1)
    assert found["search"] == "How often must the bearings of the K40 be greased?"
    assert "Grease the K40 bearings" in texts(service, found)[0]
    assert len(wire.asked) == 2
    assert wire.last().body["messages"][-1]["content"].endswith("And the bearings?")


def test_chunks_that_the_answer_before_cites_stay_candidates(service: Service) -> None:
    before = service.answer()
    assert before["citations"][0]["path"] == "docs/pumps/heron.md"
    fields = {"search": "annual leave of employees", "top_k": 3}
    without = service.answer("And then?", **fields)
    assert not any("white iron" in text for text in texts(service, without))
    found = service.answer("And then?", previous=before["interaction_id"], **fields)
    assert "white iron" in texts(service, found)[-1]
    assert texts(service, found)[:2] == texts(service, without)[:2]
    elsewhere = service.answer(
        "And then?", previous=before["interaction_id"], filters={"path": "docs/policies"}, **fields
    )
    assert not any("white iron" in text for text in texts(service, elsewhere))


def test_previous_that_is_not_there_or_of_another_collection(service: Service) -> None:
    missing = service.ask("And then?", previous="nobody-asked-this")
    assert (missing.status_code, "nobody-asked-this" in missing.json()["detail"]) == (404, True)
    before = service.answer()["interaction_id"]
    assert service.http.put("/collections/others", json={}).status_code == 200
    refused = service.ask("And then?", previous=before, collection="others")
    assert refused.status_code == 422
    assert "'default', not of 'others'" in refused.json()["detail"]
    service.http.delete("/collections/others")


def test_query_on_the_command_line_follows_up(service: Service, wire: WireEngine, tmp_path: Path) -> None:
    first = service.answer()["interaction_id"]
    file = tmp_path / "answer.json"
    done = run_graft(service.home, "query", "And the casing?", "--previous", first, "--json", str(file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    held = service.interaction(json.loads(file.read_text())["interaction_id"])
    assert [turn["content"] for turn in held["turns"]] == [
        service.interaction(first)[key] for key in ("question", "answer")
    ]


def prompts(asked: list[Asked]) -> str:
    return "\n".join(message["content"] for one in asked for message in one.body["messages"])


@pytest.mark.slow
def test_previous_shows_nothing_that_may_not_be_seen_any_more(tmp_path: Path, wire: WireEngine) -> None:
    groups = {"ann": ["a"], "ben": ["b"], "key-admin": ["admin"]}
    known = [
        {"id": key, "sha256": hashlib.sha256(key.encode()).hexdigest(), "groups": of} for key, of in groups.items()
    ]
    (tmp_path / "keys.json").write_text(json.dumps(known))
    root = write(
        tmp_path / "root", {"a/pay.md": "The director is paid 93,000 crowns.", "b/canteen.md": "Open at noon."}
    )
    settings = {"SERVICE_LLM_URL": wire.url, "SERVICE_API_KEYS_FILE": str(tmp_path / "keys.json")}
    with running(tmp_path / "home", root, "--no-engine", key="key-admin", **settings) as service:
        assert service.ingest(root)["state"] == "succeeded"
        assert service.ingest(root / "a", acl=["a"])["state"] == "succeeded"
        until(lambda: is_ready(service), 60)
        wire.say("The director is paid 93,000 crowns.")

        def ask(key: str, question: str, **fields: Any) -> httpx.Response:
            body = QueryRequest.model_validate({"question": question, **fields}).model_dump(exclude_unset=True)
            return service.http.post("/query", json=body, headers={"authorization": f"Bearer {key}"})

        def found(reply: httpx.Response, key: str) -> set[str]:
            identity = reply.json()["interaction_id"]
            held = service.http.get(f"/interactions/{identity}", headers={"authorization": f"Bearer {key}"}).json()
            return {hit["path"] for hit in held["hits"]}

        before = ask("ann", "How much is the director paid?").json()["interaction_id"]
        again = {"previous": before, "search": "canteen open noon", "top_k": 2}
        assert found(ask("ann", "And then?", **again), "ann") == {"a/pay.md", "b/canteen.md"}
        for other in ("ben", "key-admin"):
            assert ask(other, "And then?", **again).status_code == 404
        assert service.ingest(root / "a", acl=["b"])["state"] == "succeeded"
        wire.asked.clear()
        assert found(ask("ann", "And then?", **again), "ann") == {"b/canteen.md"}
        assert "93,000" not in prompts(wire.asked)
