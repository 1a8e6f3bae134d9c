"""A study as one HTML page that needs nothing beside it: which parameters mattered, how the best value came, and each trial."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from eval import plots
from eval.report_page import environment, write_page
from eval.space import distributions
from eval.study import Study, Trial, rank

LEAST = 4  # trials with a value, from which on it can be told what mattered
SHOWN, DRAWN = 200, 60  # trials in the table; whose way is drawn


class Chart(NamedTuple):
    title: str
    note: str
    plot: plots.Plot | None


class Line(NamedTuple):
    trial: Trial
    value: str
    setting: list[tuple[str, str]]


def write_study(study: Study, path: Path, metric: str, facts: Mapping[str, str]) -> None:
    """`facts`: what else the page says of it. Raises InvalidError where the path cannot be written to."""
    write_page(render_study(study, metric, facts), path)


def render_study(study: Study, metric: str, facts: Mapping[str, str]) -> str:
    order = sorted(study.trials, key=lambda one: rank(one, study.minimize))[:SHOWN]
    states = {
        "with a value": sum(one.value is not None for one in study.trials),
        "given up as hopeless": sum(one.pruned for one in study.trials),
        "refused": sum(one.value is None and not one.pruned for one in study.trials),
    }
    return environment().get_template("study.html.j2").render(
        study=study,
        metric=metric,
        facts=dict(facts),
        counts=", ".join(f"{count} {what}" for what, count in states.items() if count) or "none",
        best=_line(study.best) if study.best else None,
        charts=_charts(study, metric),
        lines=[_line(one) for one in order],
        left_out=len(study.trials) - len(order),
    )  # fmt: skip


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def importances(study: Study) -> dict[str, float]:
    """-> by parameter, the share of the values' variance that it explains (functional ANOVA: Hutter et al., 2014), the largest
    first; empty where too few trials have a value, or all have the same.
    """
    import optuna

    done = [one for one in study.trials if one.value is not None]
    if len(done) < LEAST or len({one.value for one in done}) == 1:
        return {}
    space = distributions(study.space)
    copied = optuna.create_study(direction="minimize" if study.minimize else "maximize")
    for one in done:
        copied.add_trial(optuna.create_trial(params=one.setting, distributions=space, value=one.value))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=study.seed % 2**32)
    return dict(optuna.importance.get_param_importances(copied, evaluator=evaluator))


def _charts(study: Study, metric: str) -> list[Chart]:
    done = [one for one in study.trials if one.value is not None]
    values = [(one.number + 1, one.value or 0.0) for one in done]
    failed = [one.number + 1 for one in study.trials if one.value is None]
    better = min if study.minimize else max
    best = list(zip((number for number, _ in values), accumulate((value for _, value in values), better), strict=True))
    below = "; a dot below: one without a value" if failed else ""
    beyond = "; at the edge: far beyond it" if values and _is_cut(values, best[-1][1]) else ""
    note = f"{metric} by trial, and the best so far{below}{beyond}."
    charts = [Chart("History", note, plots.history(values, best, failed) if values else None)]
    shares = list(importances(study).items())
    told = "Share of the differences between trials that a parameter explains." if shares else (
        f"Not told: that takes {LEAST} trials with different values."
    )  # fmt: skip
    charts.append(Chart("Importance", told, plots.bars(shares[:10]) if shares else None))
    told_on_the_way = sorted(
        (one for one in study.trials if one.intermediate), key=lambda one: rank(one, study.minimize)
    )
    lines = [(sorted(one.intermediate.items()), one.pruned) for one in told_on_the_way[:DRAWN]]
    if lines:
        which = f" of the best {DRAWN}" if len(told_on_the_way) > DRAWN else ""
        note = f"{metric} on the way{which}, by per cent of the run or by fold; dotted: given up."
        charts.append(
            Chart(
                "On the way",
                note,
                plots.curves(lines, *([study.best.value] if study.best and study.best.value is not None else [])),
            )
        )
    return charts


def _is_cut(values: Sequence[tuple[int, float]], best: float) -> bool:
    low, high = plots.limits([value for _, value in values], best)
    return any(not low <= value <= high for _, value in values)


def _line(trial: Trial) -> Line:
    value = number(trial.value) if trial.value is not None else "given up" if trial.pruned else "refused"
    return Line(trial, value, [(key, number(one)) for key, one in trial.setting.items()])
