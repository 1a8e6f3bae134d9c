"""An alignment as a page in the look of `eval`'s reports: one HTML file that needs nothing beside it, and no script.

What people asked and models said can hurt to read. None of it is on the page as it opens: single cases stand behind a click, in a
`<details>` that is closed. Everything is escaped, and the page's own policy forbids it to run or load anything.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from jinja2 import ChoiceLoader, Environment, FileSystemLoader

from eval.report_page import environment
from eval.resample import DRAWS
from finetune.align_figures import SHARES, STAGES, Aligned, Held, Measured, Stage, preferred
from finetune.declines import declines
from finetune.schemas import Message
from ingest.errors import InvalidError
from ingest.files import write_whole

SHOWN, CUT = 8, 1_500  # cases of a kind; characters of a text
NAMES: dict[Stage, str] = {"before": "Before", "sft": "After imitation", "after": "After preferences"}
METRICS = {  # of a training
    "eval_loss": "held-out loss",
    "eval_rewards/accuracies": "held-out pairs told rightly",
    "accuracy": "held-out accuracy",
    "held_out_reward": "held-out reward",
    "reward": "reward",
    "kl": "KL in nats an answer",
}
CARDS = ("prefers_chosen", "judge", "declines_en", "declines_zh", "answers_benign", "helpful_f1")


class Case(NamedTuple):
    """`turns`: what was said before, by role. `said`: answers, by what they are called."""

    id: str
    note: str
    turns: list[tuple[str, str]]
    said: list[tuple[str, str]]


class Cases(NamedTuple):
    title: str
    note: str
    cases: list[Case]


def write_report(
    found: Aligned,
    held: Held,
    measured: Mapping[Stage, Measured],
    judge: Mapping[str, Mapping[str, float]],
    path: Path,
) -> None:
    """Raises InvalidError where the page cannot be written."""
    page = render(found, held, measured, judge).encode("utf-8", errors="replace")
    try:
        write_whole(path, page)
    except OSError as error:
        raise InvalidError(f"the report cannot be written to {str(path)!r}: {error.strerror}") from error


def render(
    found: Aligned, held: Held, measured: Mapping[Stage, Measured], judge: Mapping[str, Mapping[str, float]]
) -> str:
    """-> the page; the same for the same measurements."""
    cards = [one for one in found.figures if one.metric in CARDS]
    return (
        _environment()
        .get_template("align.html.j2")
        .render(
            found=found,
            cards=cards,
            shares=SHARES,
            stages=STAGES,
            names=NAMES,
            metrics=METRICS,
            draws=DRAWS,
            cases=[one for one in _cases(held, measured, judge) if one.cases],
        )
    )


def _environment() -> Environment:
    shared = environment()
    own = FileSystemLoader(Path(__file__).parent / "templates")
    return shared.overlay(loader=ChoiceLoader([own, *([shared.loader] if shared.loader else [])]))


def _cases(held: Held, measured: Mapping[Stage, Measured], judge: Mapping[str, Mapping[str, float]]) -> Iterable[Cases]:
    said = {stage: one.answers for stage, one in measured.items()}
    then, now = (preferred(measured[stage].odds, by_token=True) for stage in ("before", "after"))
    for title, ids in (
        ("Pairs whose chosen answer is now the likelier one", [one for one in sorted(now) if now[one] > then[one]]),
        ("Pairs whose rejected answer is now the likelier one", [one for one in sorted(now) if now[one] < then[one]]),
    ):
        cases = [
            Case(one, "", _turns(row.prompt), [("Chosen", _cut(row.chosen)), ("Rejected", _cut(row.rejected))])
            for one in ids[:SHOWN]
            for row in [held.pairs[one]]
        ]
        yield Cases(title, _count(len(ids), len(now)), cases)
    worst = sorted(held.prompts, key=lambda one: (judge["after"][one], one))
    yield Cases(
        "Answers that the judge finds worst",
        f"the {min(SHOWN, len(worst))} lowest of {len(worst)}",
        [
            Case(one, _rewards(judge["before"][one], judge["after"][one]), _turns(held.prompts[one].prompt),
                 _answers(one, said)) for one in worst[:SHOWN]
        ],
    )  # fmt: skip
    for title, wanted in (("Requests that were not declined", True), ("Harmless requests that were declined", False)):
        wrong = [
            name
            for name, one in held.requests.items()
            if one.declined == wanted and declines(said["after"][name]) != wanted
        ]
        cases = [Case(one, "", _turns(held.requests[one].prompt), _answers(one, said)) for one in wrong[:SHOWN]]
        asked = sum(one.declined == wanted for one in held.requests.values())
        yield Cases(title, _count(len(wrong), asked), cases)


def _rewards(before: float, after: float) -> str:
    return f"reward {before:.2f} → {after:.2f}".replace("-", "−")


def _count(found: int, among: int) -> str:
    return f"{found} of {among}" + (f", {SHOWN} are shown" if found > SHOWN else "")


def _answers(name: str, said: Mapping[Stage, Mapping[str, str]]) -> list[tuple[str, str]]:
    return [(NAMES[stage], _shortened(said[stage][name])) for stage in STAGES]


def _turns(messages: Iterable[Message]) -> list[tuple[str, str]]:
    return [(one.role, _shortened(one.content)) for one in messages]


def _cut(messages: Iterable[Message]) -> str:
    return _shortened("\n\n".join(one.content for one in messages))


def _shortened(text: str) -> str:
    return text if len(text) <= CUT else f"{text[:CUT]} …"
