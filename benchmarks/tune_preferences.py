"""What a second stage is worth: DPO from the adapter of `tune_answers`, on pairs made of the same rows, asked the same questions.

It goes on in that benchmark's scratch folder, so that must have run with the same --scratch.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import Options, Row, shown, skipped
from benchmarks.service_process import with_engine
from benchmarks.tune_answers import (
    SAMPLE,
    SETS,
    SPAN_SETS,
    answers,
    answers_of,
    exported,
    f1,
    gold_passages,
    graft,
    mean,
    registered,
)
from eval.resample import compared
from eval.schemas import AnswerCase
from service.client import Client

PAIRS = 400
FAULTS = ("unsupported", "wrong", "miscited")  # that the adapter still has: it cites, and it refuses enough
RATE = "5e-5"


def run(options: Options) -> list[Row]:
    scratch = options.scratch / "tune_answers"
    before = scratch / "answers-2"
    if not (before / "manifest.json").exists() or not all(
        (scratch / one / "tuned-missing.json").exists() for one in SETS
    ):
        return [skipped("preferences", "run tune_answers first, with the same --scratch")]
    after = exported(_tuned(scratch, before, options.quick))
    sample = 4 if options.quick else SAMPLE
    settings = {"SERVICE_ADAPTER_ROOTS": str(scratch), "SERVICE_MAX_TOKENS": "96"}
    with with_engine(scratch / "home", **settings) as url, Client(url) as client:
        graft(["check", str(after)], url)
        name = registered(client, after)
        for one in SETS:
            folder = scratch / one
            collection = str(answers_of(folder / "tuned.json").configuration["collection"])
            given = ("--adapter", name, "--collection", collection)
            answers(url, folder / "preferred.json", str(folder / "held-out.json"), sample, *given)
            answers(url, folder / "preferred-missing.json", str(folder / "missing.json"), sample, "--adapter", name)
    return _rows_of(scratch)


def _tuned(scratch: Path, before: Path, quick: bool) -> Path:
    pairs, after = scratch / "pairs.jsonl", scratch / "preferred"
    if not pairs.exists():
        kept = [part for one in FAULTS for part in ("--fault", one)]
        graft(["dataset", "preferences", str(scratch / "rows.jsonl"), "--out", str(pairs), *kept])
    if not (after / "manifest.json").exists():
        more = ["--set", "max_steps=4"] if quick else ["--set", f"max_rows={PAIRS}"]
        more += ["--set", f"learning_rate={RATE}", "--set", f"parent={before}"]
        graft(["tune", "dpo-lora", "--data", str(pairs), "--out", str(after), *more])
    return after


def _rows_of(scratch: Path) -> list[Row]:
    old, new = (_cases(scratch, name, SPAN_SETS) for name in ("tuned", "preferred"))
    gone_old, gone_new = (_cases(scratch, f"{name}-missing", tuple(SETS)) for name in ("tuned", "preferred"))
    there = [(one, other) for one, other in zip(old, new, strict=True) if gold_passages(one)]
    said = [(a, b) for a, b in zip(old, new, strict=True) if "faithfulness" in a.scores and "faithfulness" in b.scores]
    return [
        _gain("F1", [(one.case.id, f1(one), f1(other)) for one, other in zip(old, new, strict=True)]),
        _gain("faithfulness", [(a.case.id, a.scores["faithfulness"], b.scores["faithfulness"]) for a, b in said]),
        _gain(
            "refused, where the passage is missing",
            [(a.case.id, a.refused, b.refused) for a, b in zip(gone_old, gone_new, strict=True)],
        ),
        _gain("refused, though the answer is shown", [(a.case.id, a.refused, b.refused) for a, b in there]),
    ]


def _cases(scratch: Path, name: str, sets: Sequence[str]) -> list[AnswerCase]:
    return [case for one in sets for case in answers_of(scratch / one / f"{name}.json").cases]


def _gain(title: str, scores: Sequence[tuple[str, float, float]]) -> Row:
    ids, before, after = zip(*scores, strict=True)
    found = compared(title, ids, before, after, 0)
    said = (
        f"before {mean(before):.3f}; {found.difference:+.3f} [{found.low:.3f}, {found.high:.3f}], {len(ids)} questions"
    )
    return shown(f"{title}, after DPO", mean(after), "", said)
