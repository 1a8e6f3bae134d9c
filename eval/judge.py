"""Scores of a judge: Ragas' metrics, over any endpoint that speaks OpenAI's chat completions. Optional: `EVAL_JUDGE_*`.

A judgement that fails, or is not a number, is no judgement: the case is "not evaluated" for it, with the reason. Ragas
itself is lenient (an exception or an unknown rating of one of its two raters is passed over, an answer without claims or a
claim without a verdict counts as nothing), so each reply is checked before Ragas sees it, and one that fails spoils the
judgement. Replies are fetched here rather than with Ragas' own clients, which report their use to its makers.

`judge_faithfulness`: the share of the answer's statements that the passages bear out. `judge_answer_accuracy`: agreement with
the gold answer, rated 0, 2 or 4 from both sides, over 4. `judge_factual_correctness`: F1 of the claims of a free answer and of
the gold one. Ragas' answer relevancy needs embeddings and is left out.
"""

import asyncio
import math
import os
import re
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from eval.answer_metrics import plain
from eval.schemas import Case
from eval.settings import EvalSettings
from ingest.errors import SettingsError

if TYPE_CHECKING:
    from ragas.llms.base import InstructorBaseRagasLLM

Metric = Callable[[Any], Coroutine[Any, Any, Any]]  # Ragas' judge -> its result, which has a `value`
Output = TypeVar("Output", bound=BaseModel)
RATINGS = {0, 2, 4}
MAX_TOKENS = 2048  # of a judge's reply
_FENCE = re.compile(r"\A\s*```(?:json)?|```\s*\Z")
_THINKING = re.compile(r"\A.*</think>", re.DOTALL)


class Judged(NamedTuple):
    scores: dict[str, float]
    not_evaluated: dict[str, str]


class JudgeError(Exception):
    """A reply that cannot be taken for a judgement; the message says why."""


def check_judge(settings: EvalSettings) -> None:
    """Raises SettingsError where a judgement could not even begin."""
    if not settings.judge_url or not settings.judge_model:
        raise SettingsError("a judge needs EVAL_JUDGE_URL (as https://host/v1) and EVAL_JUDGE_MODEL")
    os.environ.setdefault("RAGAS_DO_NOT_TRACK", "true")  # read by ragas
    try:
        import ragas.metrics.collections  # noqa: F401
    except ImportError as error:
        raise SettingsError(f"a judge needs the extra packages `graft[judge]` ({error})") from error


def judge(settings: EvalSettings, case: Case, answer: str, passages: Sequence[str]) -> Judged:
    """Of an answer that is no refusal; `passages`: the texts that were in its prompt. Blocks."""
    scores, missing = dict[str, float](), dict[str, str]()
    for name, ascore in _metrics(case, plain(answer), list(passages)).items():
        if isinstance(ascore, str):
            missing[name] = ascore
            continue
        try:
            scores[name] = asyncio.run(asyncio.wait_for(_score(settings, ascore), settings.judge_seconds))
        except TimeoutError:
            missing[name] = f"the judge took more than {settings.judge_seconds:g} s"
        except JudgeError as error:
            missing[name] = str(error)
        except Exception as error:  # whatever Ragas makes of a reply
            missing[name] = f"{type(error).__name__}: {error}"
    return Judged(scores, missing)


def gold_answer(case: Case) -> str:
    return " ".join(one for one in (f"{case.answers[0]}." if case.answers else "", case.long_answer) if one)


def _metrics(case: Case, said: str, passages: list[str]) -> dict[str, Metric | str]:
    """-> by name, how it is scored, or why it is not."""
    from ragas.metrics.collections import AnswerAccuracy, FactualCorrectness, Faithfulness

    asked, gold = {"user_input": case.question, "response": said}, gold_answer(case)
    found: dict[str, Metric | str] = {
        "judge_faithfulness": lambda llm: Faithfulness(llm).ascore(**asked, retrieved_contexts=passages),
        "judge_answer_accuracy": lambda llm: AnswerAccuracy(llm, max_retries=1).ascore(**asked, reference=gold),
    }
    if case.kind == "free":
        found["judge_factual_correctness"] = lambda llm: FactualCorrectness(llm).ascore(response=said, reference=gold)
    if not gold:
        found |= dict.fromkeys(found.keys() - {"judge_faithfulness"}, "the case has no gold answer")
    if not passages:
        found["judge_faithfulness"] = "no passage was in the prompt"
    return found


async def _score(settings: EvalSettings, ascore: Metric) -> float:
    """Raises JudgeError."""
    key = settings.judge_api_key
    headers = {"authorization": f"Bearer {key.get_secret_value()}"} if key else {}
    async with httpx.AsyncClient(headers=headers, timeout=None) as http:
        llm, failures = _asking(http, settings)
        try:
            value = float((await ascore(llm)).value)
        except Exception:
            if failures:
                raise failures[0] from None
            raise
    if failures:
        raise failures[0]
    if not math.isfinite(value):
        raise JudgeError("the judgement is not a number")
    return value


def _asking(http: httpx.AsyncClient, settings: EvalSettings) -> tuple["InstructorBaseRagasLLM", list[JudgeError]]:
    """-> (what Ragas asks, where its failures are kept, since Ragas may pass over them)."""
    from ragas.llms.base import InstructorBaseRagasLLM

    failures: list[JudgeError] = []
    expected: list[int] = []

    class Judge(InstructorBaseRagasLLM):
        def generate(self, prompt: str, response_model: Any) -> Any:
            raise NotImplementedError("the judge is asked asynchronously")

        async def agenerate(self, prompt: str, response_model: Any) -> Any:
            try:
                return _checked(await _reply(http, settings, prompt), response_model, expected)
            except JudgeError as error:
                failures.append(error)
                raise

    return Judge(), failures


async def _reply(http: httpx.AsyncClient, settings: EvalSettings, prompt: str) -> str:
    """Raises JudgeError."""
    body = {
        "model": settings.judge_model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "response_format": {"type": "json_object"},
    }
    try:
        reply = await http.post(f"{str(settings.judge_url).rstrip('/')}/chat/completions", json=body)
        if not reply.is_success:
            raise JudgeError(f"the judge answered {reply.status_code}: {reply.text[:200]}")
        choice = reply.json()["choices"][0]
        text = choice["message"]["content"]
    except httpx.HTTPError as error:
        raise JudgeError(f"the judge does not answer ({error or type(error).__name__})") from error
    except (ValueError, LookupError, TypeError) as error:
        raise JudgeError("the judge's reply is not a chat completion") from error
    if choice.get("finish_reason") == "length":
        raise JudgeError(f"the judge's reply was cut off after {MAX_TOKENS} tokens")
    return str(text)


def _checked(text: str, form: type[Output], expected: list[int]) -> Output:
    """`expected`: how many claims the reply before named, each of which needs a verdict. Raises JudgeError."""
    bare = _FENCE.sub("", _THINKING.sub("", text)).strip()
    try:
        output = form.model_validate_json(bare)
    except ValidationError as error:
        raise JudgeError(f"the judge did not answer in the form asked for: {bare[:100]!r}") from error
    for value in dict(output).values():
        if isinstance(value, list):
            _check_list(value, expected)
    if getattr(output, "rating", 0) not in RATINGS:
        raise JudgeError(f"the judge rated {getattr(output, 'rating', None)}, not 0, 2 or 4")
    return output


def _check_list(items: list[Any], expected: list[int]) -> None:
    if not items:
        raise JudgeError("the judge found no claim")
    if isinstance(items[0], str):
        expected[:] = [len(items)]
        return
    if expected and len(items) != expected[0]:
        raise JudgeError(f"the judge gave {len(items)} verdicts on {expected[0]} claims")
    strange = [one.verdict for one in items if one.verdict not in (0, 1)]
    if strange:
        raise JudgeError(f"the judge's verdict is {strange[0]}, not 0 or 1")
