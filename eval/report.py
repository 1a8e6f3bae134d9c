"""A run as a page that a person likes to look at: one HTML file that needs nothing beside it, and no script.

Everything in a run is hostile: questions, answers, retrieved texts and names are escaped where they are put in, and the
page's own policy forbids it to run or load anything.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval import plots, report_cases, report_figures
from eval.blame import LEVERS
from eval.compare import differences, shared
from eval.report_figures import Estimate, label
from eval.report_page import environment, write_page
from eval.resample import DRAWS
from eval.schemas import AnswersRun, Difference, RetrievalRun, Run
from ingest.errors import InvalidError

SETTINGS = 80  # rows of the configuration
CONTROLS = {"none": "without passages", "wrong": "with wrong passages"}


class Reasons(NamedTuple):
    cases: int
    reasons: list[tuple[str, int]]


class MetricRow(NamedTuple):
    name: str
    estimate: Estimate
    missing: Reasons


class Setting(NamedTuple):
    name: str
    value: str
    before: str | None  # where it was another


class Control(NamedTuple):
    title: str
    estimates: dict[str, Estimate]
    gains: dict[str, Difference]  # of the run over this control


class Chart(NamedTuple):
    title: str
    note: str
    plot: plots.Plot


def write_report(run: Run, path: Path, before: Run | None = None, controls: Sequence[AnswersRun] = ()) -> None:
    """Writes the page, or leaves what was there. `controls`: of the same cases, for answers.

    Raises InvalidError when the two runs are of different kinds, or the path cannot be written to.
    """
    if before is not None and before.kind != run.kind:
        raise InvalidError(f"a run of {run.kind} is not compared with one of {before.kind}: name two of the same kind")
    write_page(render(run, before, controls), path)


def render(run: Run, before: Run | None = None, controls: Sequence[AnswersRun] = ()) -> str:
    """-> the page; the same for the same runs."""
    heads = report_figures.headlines(run)
    main = heads[0] if heads else None
    common = shared(before, run) if before else ()
    found = _differences(before, run) if before else {}
    won, lost = report_cases.moved(before, run, main) if before and main in found else ([], [])
    estimates = {name: report_figures.estimate(run, name) for name in report_figures.metrics(run)}
    tables, uniform = report_figures.slices(run, main) if main else ([], [])
    cases, bad = report_cases.worst(run, main, before)
    return environment().get_template("report.html.j2").render(
        run=run,
        facts=run.facts,
        before=before,
        common=len(common),
        heads=heads,
        main=main,
        estimates=estimates,
        differences=found,
        won=won,
        lost=lost,
        metrics=[MetricRow(name, one, _missing(run, name)) for name, one in estimates.items()],
        lacking=_lacking(run, main),
        control=CONTROLS.get(run.control or "") if isinstance(run, AnswersRun) else None,
        controls=[_control(run, one, heads) for one in controls],
        timings=report_figures.timings(run),
        usage=report_figures.usage(run) if isinstance(run, AnswersRun) else [],
        charts=_charts(run, before, heads),
        slices=tables,
        uniform=uniform,
        blamed=report_figures.blamed(run) if isinstance(run, AnswersRun) else {},
        levers=LEVERS,
        bad=bad,
        cases=cases,
        zero=sum(1 for value in report_figures.values(run, main) if value == 0) if main else 0,
        settings=_settings(run, before),
        draws=DRAWS,
    )  # fmt: skip


def _differences(before: Run, after: Run) -> dict[str, Difference]:
    """-> by metric; none where the runs cannot be compared, which the page then says."""
    if before.facts.dataset != after.facts.dataset or not shared(before, after):
        return {}
    return {one.metric: one for one in differences(before, after)}


def _missing(run: Run, metric: str) -> Reasons:
    told = Counter(reasons[metric] for reasons in map(report_figures.reasons, run.cases) if metric in reasons)
    return Reasons(sum(told.values()), sorted(told.items(), key=lambda one: (-one[1], one[0]))[:4])


def _lacking(run: Run, main: str | None) -> int:
    """-> how many cases nothing says of whether they are right."""
    return sum(not {main, "good"} & report_figures.scores(one).keys() for one in run.cases)


def _control(run: Run, control: AnswersRun, heads: list[str]) -> Control:
    estimates = {name: report_figures.estimate(control, name) for name in heads}
    return Control(CONTROLS.get(control.control or "", control.facts.name), estimates, _differences(control, run))


def _charts(run: Run, before: Run | None, heads: list[str]) -> list[Chart]:
    charts = []
    for name in heads if run.kind == "answers" else heads[:1]:  # the ranks say what the others would
        held = report_figures.values(run, name)
        earlier = report_figures.values(before, name) if before else []
        if held and (name == heads[0] or len(set(held)) > 3):  # two or three bars say no more than the mean
            note = "Cases by score" + ("; the line is the run before." if earlier else ".")
            charts.append(Chart(label(name), note, plots.score_histogram(held, earlier)))
    if isinstance(run, RetrievalRun) and run.cases:
        ranks = [report_figures.first_relevant(one) for one in run.cases if one.case.relevant]
        if ranks:
            note = "Cases by the rank of the first relevant document; none: not found."
            charts.append(Chart("First relevant document", note, plots.rank_histogram(ranks)))
    if taken := report_figures.total_ms(run):
        plot = plots.latency_histogram(taken)
        charts.append(Chart("Latency", f"Cases by milliseconds, {plot.said}.", plot))
    return charts


def _settings(run: Run, before: Run | None) -> list[Setting]:
    now = _flat(run.facts.configuration)
    then = _flat(before.facts.configuration) if before else now
    names = list(dict.fromkeys([*now, *then]))[:SETTINGS]
    return [
        Setting(name, now.get(name, "not set"), then.get(name, "not set") if then.get(name) != now.get(name) else None)
        for name in names
    ]


def _flat(configuration: dict[str, Any], above: str = "") -> dict[str, str]:
    """-> {"retrieval.top_k": "8"}: nested settings by their paths."""
    flat: dict[str, str] = {}
    for name, value in configuration.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{above}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            flat[above + name] = report_cases.shorten(text, 300)
    return flat
