"""The example questions, asked of the product as `make run` serves it: the bundled model over `examples/`.

An answer counts as right when it holds the gold string, white space aside, and as sourced when a quote of its citations
does. Shown by half of the questions: the prompt was chosen on `dev`; `test` was not looked at.
"""

import json
import re
from typing import NamedTuple

from benchmarks.report import Options, Row, say, shown, skipped
from benchmarks.service_process import with_engine
from ingest.settings import CHECKOUT
from service.client import Client
from service.schemas import QueryRequest

QUESTIONS = CHECKOUT / "tests" / "example_questions.json"


class Asked(NamedTuple):
    language: str
    split: str
    answerable: bool
    right: bool
    sourced: bool


def run(options: Options) -> list[Row]:
    if not (CHECKOUT / ".venv-vllm").is_dir():
        return [skipped("example answers", "no engine is installed (make engine)")]
    questions = json.loads(QUESTIONS.read_text())
    if options.quick:
        questions = questions[:2]
    with with_engine(options.scratch / "example-answers") as url, Client(url) as client:
        asked = [_ask(client, question) for question in questions]
    rows = []
    for language in ("en", "zh"):
        for split in ("dev", "test"):
            some = [one for one in asked if (one.language, one.split) == (language, split) and one.answerable]
            if some:
                note = f"of {len(some)}; with a quote that holds it: {sum(one.sourced for one in some)}"
                rows.append(shown(f"right answers, {language}, {split}", sum(one.right for one in some), "", note))
    return rows


def _ask(client: Client, question: dict[str, str | None]) -> Asked:
    answer = client.query(QueryRequest(question=str(question["question"]), source="bench"))
    gold = question["answer"]
    right = gold is not None and _bare(gold) in _bare(answer.answer)
    sourced = gold is not None and any(_bare(gold) in _bare(citation.quote) for citation in answer.citations)
    say(f"{'right' if right else 'wrong' if gold else '-----'} {question['question']} | {answer.answer}")
    return Asked(str(question["language"]), str(question["split"]), gold is not None, right, sourced)


def _bare(text: str) -> str:
    return re.sub(r"\s+", "", text).lower()
