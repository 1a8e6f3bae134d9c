"""What `graft eval sweep`, `weights`, `calibrate` and `probe` show."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Column, Table

from eval.calibrate import Calibration
from eval.probe import Probes
from eval.resample import Estimate
from eval.schemas import Difference
from eval.space import Setting
from eval.study import Study, Trial, rank
from eval.sweep import Sweep
from eval.weights import Weights
from service.show import err, escape, out

SHOWN = 15  # trials, settings


def say_trial(trial: Trial) -> None:
    why = "given up" if trial.pruned else "[red]refused[/]"
    said = f"{trial.value:.4f}" if trial.value is not None else f"{why}: {escape(trial.error)}"
    err.print(f"[dim]{trial.number + 1:>3}[/] {said}  {escape(_said(trial.setting))}  [dim]{trial.seconds:.1f} s[/]")


def _said(setting: Setting) -> str:
    return ", ".join(
        f"{key.removeprefix('retrieval.')} {value:.4g}"
        if isinstance(value, float)
        else f"{key.removeprefix('retrieval.')} {value}"
        for key, value in setting.items()
    )


def print_trials(study: Study, metric: str) -> None:
    """The best first."""
    table = Table(Column("trial", justify="right"), Column(metric, justify="right"), "setting")
    for trial in sorted(study.trials, key=lambda one: rank(one, study.minimize))[:SHOWN]:
        value = f"{trial.value:.4f}" if trial.value is not None else "given up" if trial.pruned else "refused"
        table.add_row(
            str(trial.number + 1), value, escape(_said(trial.setting) + (f" ({trial.error})" if trial.error else ""))
        )
    out.print(table)


def print_sweep(found: Sweep, storage: Path) -> None:
    study = found.study
    out.print(
        f"{escape(found.dataset)}: {len(study.trials)} settings ({study.sampler}) on {found.searched} questions, "
        f"{found.collections} indexes; study {escape(study.name)} in {escape(str(storage))}"
    )
    print_trials(study, found.metric)
    out.print(f"default: {escape(_said(found.default))}\nchosen:  {escape(_said(found.chosen))}")
    if found.chosen == found.default:
        out.print("keep: nothing that was tried is better than the default")
        return
    rows = sorted(found.held_out, key=lambda one: one.metric != found.metric)
    _print_differences(f"on {found.held_out_questions} held-out questions", "default", "chosen", rows)
    first = rows[0]
    sure = "is better" if first.p < 0.05 and first.difference > 0 else "is worse" if first.p < 0.05 else "may be chance"
    out.print(f"by {found.metric} the chosen setting {sure}")


def print_weights(found: Weights, apply: bool) -> None:
    unread = f", {found.unread} not read by the embedder" if found.unread else ""
    out.print(
        f"{escape(found.dataset)} in {escape(found.collection)}: {found.questions} questions{unread}, {found.candidates} "
        f"candidates of each side, {found.folds} folds; {found.metric} cross-fitted {_interval(found.cross_fitted)}"
    )
    rows = [one.model_copy(update={"metric": name}) for name, one in found.against.items()]
    _print_differences("beside tuned weights", "that setting", "tuned, cross-fitted", rows)
    table = Table("setting", Column(f"{found.metric}, all questions", justify="right"))
    for one in sorted(found.settings, key=lambda one: -one.score)[:SHOWN]:
        table.add_row(str(one.fusion), f"{one.score:.4f}")
    out.print(table)
    out.print(f"by fold: {'; '.join(str(one) for one in found.by_fold)}")
    if found.agreement < 1:
        err.print(f"[yellow]note:[/] the service orders {1 - found.agreement:.0%} of the checked questions otherwise")
    if found.verdict == "keep":
        out.print(f"keep {found.present.fusion}: tuning brings nothing that could not be chance")
    else:
        out.print(f"{'set' if apply else 'proposed'}: {found.best.fusion}" + ("" if apply else " (--apply sets it)"))


def print_calibration(found: Calibration, apply: bool) -> None:
    made = ", the same without their relevant documents" if found.made else ""
    out.print(
        f"{escape(found.collection)}: {found.answerable} answerable questions, {found.unanswerable} unanswerable{made}; "
        f"by the {found.score}'s score; AUC {_interval(found.auc)}"
    )
    if found.left_out:
        err.print(
            f"[yellow]note:[/] {found.left_out} questions left out: the embedder does not read them, so they have no score"
        )
    if found.nothing_found:
        err.print(
            f"[yellow]note:[/] {found.nothing_found} questions left out: nothing was found, so they are always refused"
        )
    table = Table("", "held-out questions", *(["present threshold"] if found.present else []))
    for name, value in found.held_out:
        present = [_interval(getattr(found.present, name))] if found.present else []
        table.add_row(name.replace("_", " "), _interval(value), *present)
    out.print(table)
    if found.threshold is None:
        out.print(f"no threshold: {escape(found.why_not)}")
    else:
        folds = ", ".join(f"{one:.3f}" for one in found.by_fold)
        out.print(
            f"threshold {found.threshold:.4f} (of the folds: {folds})" + (" is set" if apply else "; --apply sets it")
        )


def print_probes(found: Probes) -> None:
    groups = f" in {found.groups} groups" if found.groups else ""
    what = f"{found.labels} labels" if found.task == "classify" else "numbers"
    out.print(f"{escape(found.data)}: {found.rows} rows{groups}, {what}; baseline {found.metric} {found.baseline:.3f}")
    table = Table(
        Column("features", overflow="fold"), "dimension", f"{found.metric} (95 %)", "control", "selectivity (95 %)", "s"
    )
    for one in found.sources:
        cells = (_interval(one.score), f"{one.control:.3f}", _interval(one.selectivity), f"{one.seconds:.1f}")
        table.add_row(escape(one.source), str(one.dimension), *cells)
    out.print(table)
    if found.differences:
        _print_differences("in the same folds", escape(found.sources[0].source), "", found.differences)
    for note in found.notes:
        err.print(f"[yellow]note:[/] {escape(note)}")


def _print_differences(title: str, before: str, after: str, rows: Sequence[Difference]) -> None:
    heads = (before or "before", after or "this", "change (95 %)", "p", "won", "lost")
    table = Table(title, *(Column(one, justify="right") for one in heads))
    for one in rows:
        sure = "[green]" if one.p < 0.05 and one.difference > 0 else "[red]" if one.p < 0.05 else ""
        change = f"{sure}{one.difference:+.3f}{'[/]' if sure else ''} ({one.low:+.3f} to {one.high:+.3f})"
        counts = (str(len(one.won)), str(len(one.lost)))
        table.add_row(escape(one.metric), f"{one.before:.3f}", f"{one.after:.3f}", change, f"{one.p:.4f}", *counts)
    out.print(table)


def _interval(one: Estimate) -> str:
    return f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})"
