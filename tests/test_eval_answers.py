"""`graft eval answers` against the real service, with an engine that is replaced at the wire."""

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from service_fixtures import IMPELLER, IMPELLER_ANSWER, Service, WireEngine

from eval.answer_totals import by_slice, totals
from eval.answers import Asked, Asking, ask_all, derange
from eval.cli_answers import answers, report
from eval.schemas import AnswerCase, AnswersRun, Case
from eval.settings import EvalSettings
from ingest.errors import GraftError, SettingsError, UnavailableError
from ingest.schemas import Retrieval
from service.client import Client
from service.prompt import REFUSAL

HERON, KESTREL, LEAVE = "docs/pumps/heron.md", "docs/pumps/kestrel.md", "docs/policies/leave.md"
EN = {"language": "en"}
IRON = Case(id="iron", question=IMPELLER, relevant={HERON: 1}, answers=("high-chromium white iron",), slices=EN)
BEARINGS = Case(
    id="bearings", question="How often are the K40 bearings greased?", relevant={KESTREL: 1}, answers=("2,000 running hours",),
    slices=EN,
)  # fmt: skip
DAYS = Case(
    id="days", question="How many days of annual leave are there?", relevant={LEAVE: 1}, answers=("27 days",), slices=EN
)
NOWHERE = Case(id="nowhere", question="Who won the cup in 1966?", answerable=False, slices=EN)
HELD = {HERON: "of high-chromium white iron", KESTREL: "every 2,000 running hours", LEAVE: "have 27 days"}


def asking(**others: Any) -> Asking:
    known: dict[str, Any] = {
        "collection": "default",
        "retrieval": Retrieval(),
        "name_of": lambda path: path,
        "text_of": HELD.get,
        "threads": 2,
    }
    return Asking(**known | others)


def ask(service: Service, *cases: Case, **others: Any) -> Asked:
    with Client(service.url) as client:
        return ask_all(client, cases, asking(**others))


def one(service: Service, case: Case, **others: Any) -> AnswerCase:
    [found] = ask(service, case, **others).cases
    return found


def test_a_right_answer(service: Service) -> None:
    found = one(service, IRON)
    assert found.answer == "".join(IMPELLER_ANSWER)
    assert found.scores["contains"] == found.scores["good"] == found.scores["faithfulness"] == 1
    assert found.scores["citation_precision"] == found.scores["citation_recall"] == found.scores["gold_citation"] == 1
    assert found.scores["exact_match"] == 0
    assert (found.good, found.refused, found.blame) == (True, False, None)
    assert found.passages[0].document == HERON
    assert found.passages[0].in_prompt
    assert found.timings_ms["total"] > 0
    assert found.usage["completion_tokens"] > 0
    assert service.interaction(found.interaction_id)["source"] == "eval"


def test_a_wrong_answer_is_blamed(service: Service, wire: WireEngine) -> None:
    wire.say("The casing is of grey cast iron, painted twice.")
    found = one(service, IRON)
    assert (found.good, found.blame) == (False, "ignored")
    assert found.scores["faithfulness"] == 1
    wire.say("Grease the K40 bearings every 2,000 running hours.")
    assert one(service, IRON).blame == "cited_wrongly"
    wire.say("The impeller", finish="length")
    assert one(service, IRON).blame == "truncated"


def test_a_gold_passage_that_was_not_retrieved_is_looked_for_further_down(service: Service, wire: WireEngine) -> None:
    wire.say("Nobody knows.")
    elsewhere = IRON.model_copy(update={"relevant": {LEAVE: 1}, "answers": ("45 days",)})
    with Client(service.url) as client:
        held = client.collection("default").retrieval
        view = service.http.put("/collections/default", json={"retrieval": {**held.model_dump(), "top_k": 1}})
        assert view.status_code == 200
        try:
            [found] = ask_all(client, [elsewhere], asking()).cases
        finally:
            service.http.put("/collections/default", json={"retrieval": held.model_dump()})
    assert len(found.passages) == 1
    assert found.blame == "not_retrieved"
    rank = re.fullmatch(r"found at rank (\d+); 1 were retrieved", found.blame_detail)
    assert rank
    assert int(rank.group(1)) > 1


def test_a_document_that_is_not_there_is_not_in_the_corpus(service: Service) -> None:
    found = one(service, IRON.model_copy(update={"relevant": {"docs/gone.md": 1}, "answers": ("steel",)}))
    assert found.blame == "not_in_corpus"


def test_refusals(service: Service, wire: WireEngine) -> None:
    wire.say(REFUSAL)
    right, wrong = one(service, NOWHERE), one(service, IRON)
    assert (right.refused, right.good, right.scores["abstained"]) == (True, True, 1)
    assert (wrong.refused, wrong.good, wrong.blame) == (True, False, "ignored")
    assert wrong.scores["f1"] == 0
    assert wrong.not_evaluated["faithfulness"] == "refused"
    wire.say("England won.")
    made_up = one(service, NOWHERE)
    assert (made_up.good, made_up.blame) == (False, "not_in_corpus")


def test_turns_go_with_the_question(service: Service, wire: WireEngine) -> None:
    turns = [{"role": "user", "content": "Tell me of the H75."}, {"role": "assistant", "content": "It is a pump."}]
    one(service, Case.model_validate({**IRON.model_dump(), "turns": turns}))
    said = [message["content"] for message in wire.last().body["messages"]]
    assert "It is a pump." in said


def test_an_engine_that_fails_is_not_a_wrong_answer(service: Service, wire: WireEngine) -> None:
    wire.say(status=500, error="out of memory")
    found = one(service, IRON)
    assert found.scores == {}
    assert "out of memory" in found.not_evaluated["answer"]
    assert (found.good, found.blame, found.finish_reason) == (False, None, "error")
    assert totals([found]).metrics == {}
    assert totals([found]).counts == {"cases": 1, "errors": 1}


def test_a_judge_that_fails_is_no_verdict(service: Service, wire: WireEngine) -> None:
    nobody = EvalSettings(judge_url="http://127.0.0.1:9/v1", judge_model="wise")
    found = one(service, IRON, judge=nobody)
    assert found.good
    assert not any(name.startswith("judge_") for name in found.scores)
    assert "does not answer" in found.not_evaluated["judge_faithfulness"]
    assert "judge_faithfulness" not in totals([found]).metrics
    wire.say(REFUSAL)
    assert not any(name.startswith("judge_") for name in one(service, IRON, judge=nobody).not_evaluated)


def test_an_unknown_adapter_and_the_bare_base(service: Service, adapter: str, wire: WireEngine) -> None:
    one(service, IRON, adapter=(adapter,))
    assert wire.last().body["model"] == adapter
    one(service, IRON, adapter=(None,))
    assert wire.last().body["model"] != adapter
    assert "nobody" in one(service, IRON, adapter=("nobody",)).not_evaluated["answer"]


# controls


def test_without_passages(service: Service, wire: WireEngine) -> None:
    wire.say("The casing is of grey cast iron.")
    found = one(service, IRON, control="none")
    assert not any(passage.in_prompt for passage in found.passages)
    assert "high-chromium" not in json.dumps(wire.last().body)
    assert found.blame is None
    assert found.not_evaluated["faithfulness"] == "no passage was in the prompt"


def test_with_the_passages_of_another_question(service: Service, wire: WireEngine) -> None:
    found = ask(service, IRON, DAYS, control="wrong", threads=1).cases
    best = {case.case.id: case.passages[0].document for case in found}
    assert best == {"iron": LEAVE, "days": HERON}
    asked = wire.asked[-2].body["messages"][-1]["content"]
    assert IMPELLER in asked


def test_a_derangement_gives_each_case_another_of_other_documents() -> None:
    cases = [
        Case(id=str(n), question=f"q{n}", relevant={f"d{n // 3}": 1, f"e{n // 2}": 1}, slices=EN) for n in range(12)
    ]
    others = derange(cases, 1)
    assert sorted(others) == sorted(case.id for case in cases)
    assert sorted(other.id for other in others.values()) == sorted(case.id for case in cases)
    for case in cases:
        assert not set(case.relevant) & set(others[case.id].relevant)
    assert derange(cases, 1) == others
    assert derange(cases, 2) != others


def test_a_case_without_another_is_left_out_of_the_control(service: Service) -> None:
    assert derange([IRON], 0) == {}
    assert "no other question" in one(service, IRON, control="wrong").not_evaluated["answer"]


# the run


def test_means_are_over_the_cases_that_have_the_score() -> None:
    def scored(identity: str, scores: dict[str, float], **others: Any) -> AnswerCase:
        fields = {
            "answer": "x",
            "refused": False,
            "finish_reason": "stop",
            "interaction_id": "i",
            "good": False,
            **others,
        }
        slices = {"language": "en", "type": "a" if identity in "12" else "b"}
        return AnswerCase(case=Case(id=identity, question="?", slices=slices), scores=scores, **fields)

    cases = [
        scored("1", {"f1": 1.0, "judge_faithfulness": 1.0}, timings_ms={"total": 10, "first_token": 5}),
        scored(
            "2", {"f1": 0.5}, not_evaluated={"judge_faithfulness": "NaN"}, timings_ms={"total": 30, "first_token": 0}
        ),
        scored("3", {"f1": 0.0}, blame="ignored", usage={"prompt_tokens": 7}),
        scored("4", {}, finish_reason="error", not_evaluated={"answer": "gone"}),
    ]
    found = totals(cases)
    assert found.metrics == {"f1": 0.5, "judge_faithfulness": 1.0}
    assert found.counts == {"cases": 4, "errors": 1, "f1": 3, "judge_faithfulness": 1, "ignored": 1}
    assert found.latency_ms["total"]["p50"] == 20
    assert found.latency_ms["first_token"]["mean"] == 5
    assert found.tokens == {"prompt_tokens": 7}
    assert by_slice(cases, ["f1"]) == {("type", "a"): {"f1": (0.75, 2)}, ("type", "b"): {"f1": (0.0, 1)}}


def test_a_service_that_goes_ends_the_run_with_what_is_done(service: Service) -> None:
    with passing_on(service, queries=2) as url, Client(url) as client:
        found = ask_all(client, [IRON, BEARINGS, DAYS, NOWHERE], asking(threads=1))
    assert [case.case.id for case in found.cases] == ["iron", "bearings"]
    assert isinstance(found.ended, UnavailableError)
    assert "graft up" in str(found.ended)


def test_ctrl_c_keeps_what_is_done(service: Service) -> None:
    def stop(done: int, total: int) -> None:
        assert (done, total) == (1, 3)
        raise KeyboardInterrupt

    with Client(service.url) as client:
        found = ask_all(client, [IRON, BEARINGS, DAYS], asking(threads=1), stop)
    assert isinstance(found.ended, KeyboardInterrupt)
    assert found.cases[0].case.id == "iron"


@contextmanager
def passing_on(service: Service, queries: int) -> Iterator[str]:
    """-> the address of a service that is gone once it has answered so many queries."""
    left = queries

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def _pass(self) -> None:
            nonlocal left
            if self.path == "/query":
                left -= 1
            if left < 0:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            kind = {"content-type": self.headers.get("content-type", "")}
            reply = service.http.request(self.command, self.path, content=body, headers=kind)
            self.send_response(reply.status_code)
            self.send_header("content-length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)

        do_GET = do_POST = _pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# the command


def squad(path: Path) -> Path:
    texts = {
        "Heron": ("The impeller of the H75 is made of high-chromium white iron.", IMPELLER, "high-chromium white iron"),
        "Leave": ("Full-time employees have 27 days of annual leave.", "How many days of leave are there?", "27 days"),
    }
    data = [
        {
            "title": title,
            "paragraphs": [
                {
                    "context": text,
                    "qas": [{"id": title, "question": asked, "answers": [{"text": gold, "answer_start": 0}]}],
                }
            ],
        }
        for title, (text, asked, gold) in texts.items()
    ]
    path.write_text(json.dumps({"data": data}))
    return path


@pytest.fixture
def command(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands talk to `service`."""
    monkeypatch.setenv("GRAFT_URL", service.url)
    monkeypatch.delenv("GRAFT_API_KEY", raising=False)
    for name in ("URL", "MODEL", "API_KEY", "SECONDS"):
        monkeypatch.delenv(f"EVAL_JUDGE_{name}", raising=False)


@pytest.mark.slow
@pytest.mark.usefixtures("command")
def test_the_command_asks_a_data_set_and_leaves_nothing_behind(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, first, page = squad(tmp_path / "pumps.json"), tmp_path / "first.json", tmp_path / "page.html"
    held = {view["name"] for view in service.http.get("/collections").json()}
    answers(data, to=str(first))
    assert re.search(r"good\W+0\.500\W+2", capsys.readouterr().out)
    run = AnswersRun.model_validate_json(first.read_bytes())
    assert {case.case.id: case.good for case in run.cases} == {"Heron": True, "Leave": False}
    assert run.metrics["good"] == run.metrics["contains"] == 0.5
    assert run.counts["good"] == 2
    assert run.configuration["seed"] == 0
    assert run.configuration["base_model"]
    assert {view["name"] for view in service.http.get("/collections").json()} == held
    answers(data, control="none", against=first, html=page)
    assert "change" in capsys.readouterr().out
    assert "</html>" in page.read_text()
    page.unlink()
    report(first, html=page)
    assert "</html>" in page.read_text()


@pytest.mark.usefixtures("command")
def test_what_is_done_is_kept_when_the_service_goes(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": str(n), "question": IMPELLER, "relevant": [HERON], "answers": ["iron"]} for n in range(4)]
    data = tmp_path / "asked.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    with passing_on(service, queries=2) as url:
        monkeypatch.setenv("GRAFT_URL", url)
        with pytest.raises(GraftError, match="2 of 4 questions were asked, then it ended: no service answers"):
            answers(data, collection="default", to=str(tmp_path / "run.json"), threads=1)
    run = AnswersRun.model_validate_json((tmp_path / "run.json").read_bytes())
    assert run.counts["cases"] == run.counts["good"] == 2


@pytest.mark.usefixtures("command")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dataset": "nowhere.json"}, "nowhere.json"),
        ({"control": "both"}, "neither none nor wrong"),
        ({"adapter": "nobody"}, "nobody"),
        ({"against": "pumps.json"}, "pumps.json"),
    ],
)
def test_what_cannot_be_asked_says_so(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    squad(tmp_path / "pumps.json")
    given = {name: tmp_path / one if name in {"dataset", "against"} else one for name, one in options.items()}
    with pytest.raises(GraftError, match=said):
        answers(**{"dataset": tmp_path / "pumps.json", **given})


@pytest.mark.usefixtures("command")
def test_half_a_judge_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVAL_JUDGE_URL", "http://127.0.0.1:1/v1")
    with pytest.raises(SettingsError, match="EVAL_JUDGE_MODEL"):
        answers(squad(tmp_path / "pumps.json"))
