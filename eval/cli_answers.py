"""`graft eval answers` and `graft eval report`."""

import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from eval.schemas import AnswersRun, DataSet, RunFacts
from eval.settings import EvalSettings
from ingest.catalog import now
from ingest.errors import GraftError, InvalidError, NotFoundError, SettingsError
from ingest.runtime import processor
from service.cli_options import JsonOption, connected
from service.client import Client
from service.show import err, escape, out, write_json

if TYPE_CHECKING:
    from eval.answers import Asked, Control
    from eval.collection import Placed

SHOWN = ("f1", "exact_match", "contains", "accuracy", "rouge_l", "citation_precision", "citation_recall", "gold_citation",
         "faithfulness", "faithful_numbers", "answered", "abstained", "abstention_f1", "good")  # fmt: skip
SLICED = ("f1", "exact_match", "accuracy", "faithfulness", "answered", "abstained", "good")
HtmlOption = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a report to look at.")]
AgainstOption = Annotated[
    Path | None, typer.Option("--against", metavar="FILE", help="An earlier run (its --json) to compare with.")
]


def answers(
    dataset: Annotated[
        Path, typer.Argument(help="A BEIR folder, a SQuAD, PubMedQA or BeerQA file, or a JSONL of questions.")
    ],
    split: Annotated[str | None, typer.Option(help="Of a BEIR folder.")] = None,
    collection: Annotated[
        str | None, typer.Option("--collection", "-c", help="Ask this one; left out, one is made, and removed again.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the collection that was made.")] = False,
    adapter: Annotated[
        str | None, typer.Option(help="Who answers; base is the bare model. Left out: the one that is live.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Ask this many, drawn by --seed.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the sample and of wrong passages.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="Ask all.")] = False,
    control: Annotated[
        str | None, typer.Option(metavar="none|wrong", help="Without passages, or with wrong ones.")
    ] = None,
    to: JsonOption = None,
    html: HtmlOption = None,
    against: AgainstOption = None,
    threads: Annotated[int, typer.Option(min=1, max=64, help="Questions asked at a time.")] = 4,
) -> None:
    """Asks a data set's questions and scores the answers, their citations and refusals."""
    from eval.answers import Asking, ask_all
    from eval.cases import read_dataset
    from eval.collection import placed
    from eval.compare import read_run

    checked, judge = _control(control), _judge()
    before = read_run(against) if against else None
    if before is not None and not isinstance(before, AnswersRun):
        raise InvalidError(f"{str(against)!r} is a run of {before.kind}; --against takes one of answers")
    data = read_dataset(dataset, split, None if full else sample, seed)
    with connected(needs_engine=True) as client:
        if adapter and adapter != "base":
            client.adapter(adapter)  # there is one of this name
        started, ended = time.perf_counter(), None
        try:
            with (
                _Bars() as bars,
                placed(client, data, collection=collection, keep=keep, on_progress=bars.of("documents")) as place,
            ):
                asking = Asking(
                    collection=place.view.name,
                    retrieval=place.view.retrieval,
                    name_of=place.document,
                    text_of=_texts(client, data, place.view.name, place.left_out),
                    adapter=() if adapter is None else (None if adapter == "base" else adapter,),
                    control=checked,
                    judge=judge,
                    threads=threads,
                    seed=seed,
                )
                asked = ask_all(client, data.cases, asking, bars.of("questions"))
                chosen = {"control": control, "sample": None if full else sample, "seed": seed}
                run = _run(data, place, asked, chosen, judge, time.perf_counter() - started)
                _finish(run, to, html, before)
                if asked.ended is not None:
                    why = str(asked.ended) or "interrupted"
                    said = f"{len(run.cases)} of {len(data.cases)} questions were asked, then it ended: {why}"
                    ended = GraftError(said)
                    raise ended from asked.ended
        except GraftError as error:  # a collection that was made could not be removed
            if ended is None or error is ended:
                raise
            raise GraftError(f"{ended}; {error}") from error


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run: what --json of retrieval or answers wrote.")],
    html: Annotated[Path, typer.Option("--html", metavar="FILE", help="The page to write.")] = Path("report.html"),
    against: AgainstOption = None,
    control: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A control of a run of answers; may be repeated.")
    ] = None,
) -> None:
    """Writes a run as one page, beside the run before and its controls."""
    from eval.compare import read_run
    from eval.report import write_report

    read = [read_run(path) for path in control or ()]
    controls = [one for one in read if isinstance(one, AnswersRun)]
    if len(controls) < len(read):
        raise InvalidError("--control takes runs of answers")
    write_report(read_run(run), html, read_run(against) if against else None, controls)
    out.print(str(html), markup=False)


def _control(given: str | None) -> "Control | None":
    match given:
        case None | "none" | "wrong":
            return given
    raise InvalidError(f"--control {given!r} is neither none nor wrong")


def _judge() -> EvalSettings | None:
    """-> where a judge is set, its settings. Raises SettingsError."""
    try:
        settings = EvalSettings()
    except ValidationError as error:
        said = "; ".join(f"EVAL_{str(one['loc'][0]).upper()}: {one['msg']}" for one in error.errors())
        raise SettingsError(f"a setting does not fit: {said}; docs/settings.md lists them") from error
    if settings.judge_url is None and settings.judge_model is None:
        return None
    from eval.judge import check_judge

    check_judge(settings)
    return settings


def _texts(client: Client, data: DataSet, collection: str, left_out: Any) -> Callable[[str], str | None]:
    """-> the text of a document by its id, None where the collection does not hold it."""
    own = {one.id: one.text for one in data.documents if one.id not in left_out}
    if data.documents:
        return own.get

    @lru_cache(maxsize=256)
    def text_of(path: str) -> str | None:
        found = [one for one in client.documents(collection, path=path) if one.path == path and one.chunks]
        try:
            return client.document_text(found[0].id) if found else None
        except NotFoundError:
            return None

    return text_of


class _Bars(Progress):
    """A bar for each thing that is counted, while there is something of it to do."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        super().__init__(*columns, console=err, transient=True)

    def of(self, what: str) -> Callable[[int, int], None]:
        """-> (done, of how many) -> None."""
        task = self.add_task(what, total=None, visible=False)
        return lambda done, total: self.update(task, completed=done, total=total, visible=done < total)


def _run(
    data: DataSet,
    place: "Placed",
    asked: "Asked",
    chosen: dict[str, Any],
    judge: EvalSettings | None,
    seconds: float,
) -> AnswersRun:
    from eval.answer_totals import totals

    configuration = {
        **place.settings(),
        "prompt": place.view.prompt,
        "threshold": place.view.threshold,
        **asked.configuration,
        **chosen,
        "judge": judge.judge_model if judge else None,
    }
    control = chosen["control"]
    name = f"{data.name} {configuration.get('adapter') or 'base'}" + (f", control {control}" if control else "")
    facts = RunFacts(
        name=name,
        dataset=data.name,
        created_at=now(),
        configuration=configuration,
        machine=processor(),
        seconds=round(seconds, 3),
    )
    return AnswersRun(facts=facts, control=control, cases=asked.cases, **totals(asked.cases)._asdict())


def _finish(run: AnswersRun, to: str | None, html: Path | None, before: AnswersRun | None) -> None:
    if to:
        write_json(run, to)
    if html:
        from eval.report import write_report

        write_report(run, html, before)
    if to == "-":
        return
    _print(run)
    if before:
        _print_differences(before, run)


def _print(run: AnswersRun) -> None:
    from eval.answer_totals import by_slice
    from eval.blame import LEVERS

    means = Table("score", "mean", "cases", title=escape(run.facts.name))
    judged = [name for name in run.metrics if name.startswith("judge_")]
    for name in [one for one in (*SHOWN, *judged) if one in run.metrics]:
        means.add_row(name, f"{run.metrics[name]:.3f}", str(run.counts[name]))
    out.print(means)
    names = [name for name in SLICED if name in run.metrics]
    slices = by_slice(run.cases, names)
    if slices:
        table = Table("slice", "cases", *names)
        for (key, value), held in slices.items():
            cells = [f"{held[name][0]:.3f}" if name in held else "" for name in names]
            table.add_row(escape(f"{key}: {value}"), str(max((n for _, n in held.values()), default=0)), *cells)
        out.print(table)
    blamed = [name for name in LEVERS if name in run.counts]
    if blamed:
        table = Table("bad answers", "cases", "what helps")
        for one in sorted(blamed, key=lambda one: -run.counts[one]):
            table.add_row(one, str(run.counts[one]), LEVERS[one])
        out.print(table)
    for stage in ("total", "first_token"):
        if stage in run.latency_ms:
            spread = run.latency_ms[stage]
            out.print(f"{stage}: p50 {spread['p50']:.0f} ms, p99 {spread['p99']:.0f} ms")
    errors = [one.not_evaluated["answer"] for one in run.cases if one.finish_reason == "error"]
    if errors:
        out.print(f"[yellow]not evaluated:[/] {len(errors)} of {len(run.cases)}, the first: {escape(errors[0])}")


def _print_differences(before: AnswersRun, run: AnswersRun) -> None:
    from eval.compare import differences

    table = Table("score", "before", "now", "change, 95 %", "p", "cases", "won/lost")
    for one in differences(before, run):
        change = f"{one.difference:+.3f} ({one.low:+.3f} to {one.high:+.3f})"
        counts = (str(one.cases), f"{len(one.won)}/{len(one.lost)}")
        table.add_row(one.metric, f"{one.before:.3f}", f"{one.after:.3f}", change, f"{one.p:.3f}", *counts)
    out.print(table)
