"""A judge at the wire: what it says counts when it is a judgement, and is told as "not evaluated" when it is not."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from eval.judge import check_judge, judge
from eval.schemas import Case
from eval.settings import EvalSettings
from ingest.errors import SettingsError

IRON = Case(id="1", question="What is the impeller made of?", answers=("white iron",), slices={"language": "en"})
ANSWER = "It is made of white iron [1]. It is painted."
PASSAGES = ["The impeller is made of white iron."]
FAITHFULNESS, ACCURACY, CORRECTNESS = "judge_faithfulness", "judge_answer_accuracy", "judge_factual_correctness"


class Judge:
    """Speaks chat completions. `says`: the prompt -> the content of the reply, or a status to fail with."""

    def __init__(self) -> None:
        self.says: Callable[[str], str | int] = well
        self.finish = "stop"
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.release = threading.Event()  # of those that hang
        judged = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                judged.asked.append(body)
                judged.keys.append(self.headers["authorization"])
                said = judged.says(body["messages"][0]["content"])
                choice = {"message": {"role": "assistant", "content": said}, "finish_reason": judged.finish}
                data = json.dumps({"choices": [choice]}).encode()
                self.send_response(said if isinstance(said, int) else 200)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=[0.05], daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def settings(self, **others: Any) -> EvalSettings:
        return EvalSettings(**{"judge_url": self.url, "judge_model": "wise", "judge_seconds": 20, **others})


@pytest.fixture
def at_the_wire() -> Iterator[Judge]:
    found = Judge()
    yield found
    found.release.set()
    found.server.shutdown()
    found.server.server_close()


def well(prompt: str) -> str:
    """Two statements, of which the passages bear out one; a rating of 4 from one side and 2 from the other."""
    asked = prompt.rpartition("input: ")[2]
    if '"user_answer"' in asked:
        return json.dumps({"rating": 4 if '"user_answer": "It is' in asked else 2})
    if '"context"' in asked:
        return json.dumps({"statements": [verdict("iron", 1), verdict("painted", 0)]})
    if '"answer"' in asked:
        return json.dumps({"statements": ["The impeller is of white iron.", "The impeller is painted."]})
    return json.dumps({"claims": ["It is of white iron.", "It is painted."]})


def verdict(statement: str, value: Any) -> dict[str, Any]:
    return {"statement": statement, "reason": "so it says", "verdict": value}


def test_a_judgement(at_the_wire: Judge) -> None:
    found = judge(at_the_wire.settings(judge_api_key="secret"), IRON, ANSWER, PASSAGES)
    assert found.scores == {FAITHFULNESS: 1 / 2, ACCURACY: 3 / 4}
    assert found.not_evaluated == {}
    assert {one["model"] for one in at_the_wire.asked} == {"wise"}
    assert set(at_the_wire.keys) == {"Bearer secret"}
    assert PASSAGES[0] in at_the_wire.asked[1]["messages"][0]["content"]
    assert "[1]" not in at_the_wire.asked[0]["messages"][0]["content"].rpartition("input: ")[2]


def test_a_free_answer_is_compared_claim_by_claim(at_the_wire: Judge) -> None:
    found = judge(at_the_wire.settings(), IRON.model_copy(update={"kind": "free"}), ANSWER, PASSAGES)
    assert found.scores[CORRECTNESS] == 0.5  # one claim of two, in both directions


def test_json_in_a_fence_and_after_thinking_is_json(at_the_wire: Judge) -> None:
    at_the_wire.says = lambda prompt: f"<think>hm {{</think>\n```json\n{well(prompt)}\n```\n"
    assert judge(at_the_wire.settings(), IRON, ANSWER, PASSAGES).scores == {FAITHFULNESS: 1 / 2, ACCURACY: 3 / 4}


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (lambda _: '{"rating": 4, "statements": [', "in the form asked for"),
        (lambda _: "I think it is good.", "in the form asked for"),
        (lambda _: '{"rating": NaN, "statements": NaN}', "in the form asked for"),
        (lambda prompt: '{"rating": 3}' if '"user_answer"' in prompt else "rated 3", "rated 3"),
        (lambda _: 500, "answered 500"),
        (lambda _: 401, "answered 401"),
    ],
)
def test_what_is_no_judgement_is_not_evaluated(at_the_wire: Judge, says: Callable[[str], str | int], why: str) -> None:
    at_the_wire.says = says
    found = judge(at_the_wire.settings(), IRON, ANSWER, PASSAGES)
    assert found.scores == {}
    assert set(found.not_evaluated) == {FAITHFULNESS, ACCURACY}
    assert all(why in reason for reason in found.not_evaluated.values())


@pytest.mark.parametrize(
    ("verdicts", "why"),
    [
        ([], "found no claim"),
        ([verdict("iron", 1)], "1 verdicts on 2 claims"),
        ([verdict("iron", 1), verdict("painted", 7)], "verdict is 7"),
        ([verdict("iron", 1), verdict("painted", None)], "in the form asked for"),
    ],
)
def test_verdicts_that_do_not_fit_the_claims(at_the_wire: Judge, verdicts: list[Any], why: str) -> None:
    at_the_wire.says = lambda prompt: (
        json.dumps({"statements": verdicts}) if '"context"' in prompt.rpartition("input: ")[2] else well(prompt)
    )
    found = judge(at_the_wire.settings(), IRON.model_copy(update={"kind": "free"}), ANSWER, PASSAGES)
    assert found.scores == {ACCURACY: 3 / 4}
    assert why in found.not_evaluated[FAITHFULNESS]
    assert why in found.not_evaluated[CORRECTNESS]


def test_one_rater_alone_is_no_judgement(at_the_wire: Judge) -> None:
    at_the_wire.says = lambda prompt: (
        "?" if '"user_answer": "white iron' in prompt.rpartition("input: ")[2] else well(prompt)
    )
    found = judge(at_the_wire.settings(), IRON, ANSWER, PASSAGES)
    assert found.scores == {FAITHFULNESS: 1 / 2}
    assert "in the form asked for" in found.not_evaluated[ACCURACY]


def test_a_judge_that_hangs_is_left(at_the_wire: Judge) -> None:
    at_the_wire.says = lambda _: str(at_the_wire.release.wait(30))
    found = judge(at_the_wire.settings(judge_seconds=0.3), IRON, ANSWER, PASSAGES)
    assert found.scores == {}
    assert set(found.not_evaluated.values()) == {"the judge took more than 0.3 s"}


def test_a_reply_that_was_cut_off_is_none(at_the_wire: Judge) -> None:
    at_the_wire.finish = "length"
    assert "cut off" in judge(at_the_wire.settings(), IRON, ANSWER, PASSAGES).not_evaluated[ACCURACY]


def test_a_judge_that_is_gone(at_the_wire: Judge) -> None:
    settings = at_the_wire.settings()
    at_the_wire.server.shutdown()
    at_the_wire.server.server_close()
    found = judge(settings, IRON, ANSWER, PASSAGES)
    assert found.scores == {}
    assert all("does not answer" in reason for reason in found.not_evaluated.values())


def test_what_there_is_nothing_to_judge_by(at_the_wire: Judge) -> None:
    found = judge(at_the_wire.settings(), IRON.model_copy(update={"answers": ()}), ANSWER, [])
    assert found.scores == {}
    assert found.not_evaluated == {
        FAITHFULNESS: "no passage was in the prompt",
        ACCURACY: "the case has no gold answer",
    }
    assert at_the_wire.asked == []


def test_half_a_judge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EVAL_JUDGE_MODEL", raising=False)
    with pytest.raises(SettingsError, match="EVAL_JUDGE_MODEL"):
        check_judge(EvalSettings(judge_url="http://127.0.0.1:1/v1"))
