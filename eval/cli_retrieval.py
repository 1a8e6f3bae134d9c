"""`graft eval retrieval` and `graft eval compare`."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from eval.schemas import AnswerCase, Difference, RetrievalCase, RetrievalRun, Run
from ingest.errors import InvalidError
from service.cli_options import JsonOption, connected
from service.show import err, escape, out, write_json

if TYPE_CHECKING:
    from eval.collection import Told

SHOWN = 5  # cases that won and lost most, each
WIDTH = 24  # of a bar
MAX_VALUES = 12  # of a slice that is shown


def retrieval(
    dataset: Annotated[
        Path, typer.Argument(help="A folder in BEIR layout, a SQuAD JSON file, or a JSONL of questions.")
    ],
    split: Annotated[str | None, typer.Option(help="Of a BEIR folder with several.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask so many of the questions.")] = None,
    seed: Annotated[int, typer.Option(help="Which, with --limit.")] = 0,
    collection: Annotated[
        str | None, typer.Option("--collection", "-c", help="Ask this one as it is; ingest nothing.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the collection that is made.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="As dense_weight=.5, chunking.tokens=128, embedder=NAME; may be repeated.",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=64, help="Questions asked at once.")] = 4,
    to: JsonOption = None,
    against: Annotated[Path | None, typer.Option(metavar="FILE", help="A run from --json to compare with.")] = None,
) -> None:
    """Measures how well a data set's questions find their documents. Needs no engine."""
    from eval.cases import read_dataset
    from eval.collection import parse_settings, placed
    from eval.compare import read_run
    from eval.retrieval import run_retrieval

    tried, before = parse_settings(settings or []), read_run(against) if against else None
    check_writable(to)
    asked = read_dataset(dataset, split, limit, seed)
    if before is not None and (before.kind, before.facts.dataset) != ("retrieval", asked.name):
        raise InvalidError(
            f"{str(against)!r} is a run of {before.kind} on {before.facts.dataset!r}, and this is one of retrieval on "
            f"{asked.name!r}; compare two of the same"
        )
    sample = {"split": split, "limit": limit, "seed": seed, "set": settings or []}
    with ended_by_signal(), connected() as client:
        with (
            progress() as tell,
            placed(
                client, asked, collection=collection, keep=keep, tried=tried, on_progress=tell("documents")
            ) as place,
        ):
            for identity, reason in list(place.left_out.items())[:SHOWN]:
                err.print(f"[yellow]note:[/] document {escape(identity)} is not in the collection: {escape(reason)}")
            name = ", ".join(settings or []) or "default"
            run = run_retrieval(
                client, asked, place, name=name, configuration=sample, threads=threads, on_progress=tell("questions")
            )
        if to:
            write_json(run, to)
        if to != "-":
            print_run(run)
            if keep and collection is None:
                out.print(f"kept as collection {place.view.name}: --collection {place.view.name} asks it again")
    if before is not None and to != "-":
        print_comparison(before, run, "ndcg@10")


def compare(
    before: Annotated[Path, typer.Argument(help="A run that --json wrote.")],
    after: Annotated[Path, typer.Argument(help="Another one, of the same data set.")],
    metric: Annotated[
        str | None, typer.Option(help="That the cases are shown by; default ndcg@10, or f1 of answers.")
    ] = None,
    to: JsonOption = None,
) -> None:
    """Compares two runs: each metric with a paired test, and the cases that won and lost most."""
    from eval.compare import differences, read_run

    old, new = read_run(before), read_run(after)
    if to:
        check_writable(to)
        write_json(differences(old, new), to)
    if to != "-":
        print_comparison(old, new, metric)


def check_writable(to: str | None) -> None:
    """A run takes minutes, so that its file can be written is seen before. Raises InvalidError."""
    if to and to != "-":
        folder = Path(to).absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(to).is_dir():
            raise InvalidError(f"{to!r} cannot be written; name a file in a folder that is there")


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, so that what it made is removed."""
    held = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, held)


@contextmanager
def progress() -> "Iterator[Callable[[str], Told]]":
    """-> what makes a bar, which appears with its first count."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=WIDTH), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:

        def tell(what: str) -> "Told":
            task = bars.add_task(what, total=None, visible=False)
            return lambda done, total: bars.update(task, completed=done, total=total, visible=True)

        yield tell


def print_run(run: RetrievalRun) -> None:
    counts = run.counts
    left = f", {counts['left_out']} without a relevant document left out" if counts["left_out"] else ""
    out.print(
        f"{escape(run.facts.dataset)}: {counts['cases']} questions over {counts['documents']} documents{left}; "
        f"{run.facts.seconds:.1f} s"
    )
    table = Table("metric", Column("mean", justify="right"), "")
    for name, value in run.metrics.items():
        table.add_row(name, f"{value:.3f}", bar(value))
    out.print(table)
    for key in dict.fromkeys(name for one in run.cases for name in one.case.slices):
        _print_slice(run, key)
    table = Table(
        f"ms, {run.facts.configuration['threads']} at once", *(Column(one, justify="right") for one in ("p50", "p99"))
    )
    for name, times in run.latency_ms.items():
        table.add_row(escape(name), f"{times['p50']:.1f}", f"{times['p99']:.1f}")
    out.print(table)


def _print_slice(run: RetrievalRun, key: str) -> None:
    """Of few values, each with a bar; one alone says nothing, and many are for the report."""
    values: dict[str, list[float]] = {}
    for one in run.cases:
        if key in one.case.slices:
            values.setdefault(one.case.slices[key], []).append(one.metrics["ndcg@10"])
    if not 2 <= len(values) <= MAX_VALUES:
        return
    table = Table(escape(key), Column("questions", justify="right"), Column("ndcg@10", justify="right"), "")
    for value, each in sorted(values.items(), key=lambda one: -len(one[1])):
        mean = sum(each) / len(each)
        table.add_row(escape(value), str(len(each)), f"{mean:.3f}", bar(mean))
    out.print(table)


def bar(share: float) -> str:
    """Of 0 to 1, in eighths of a character."""
    eighths = round(max(0.0, min(1.0, share)) * WIDTH * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


def print_comparison(before: Run, after: Run, metric: str | None) -> None:
    """Raises InvalidError."""
    from eval.compare import differences

    found = {one.metric: one for one in differences(before, after)}
    chosen = metric or next((one for one in ("ndcg@10", "f1") if one in found), next(iter(found), ""))
    if chosen not in found:
        raise InvalidError(f"both runs have no metric {chosen!r}; there are {', '.join(found) or 'none'}")
    counts = [len(before.cases), len(after.cases)]
    common = max(one.cases for one in found.values())
    if counts != [common, common]:
        err.print(f"[yellow]note:[/] {common} cases are in both, of {counts[0]} before and {counts[1]} after")
    out.print(f"{escape(before.facts.dataset)}: {escape(before.facts.name)} -> {escape(after.facts.name)}")
    titles = ("metric", "before", "after", "change", "95 %", "p", "won", "lost")
    columns = (Column(one, justify="right", no_wrap=True) for one in titles[1:])
    table = Table(Column(titles[0], no_wrap=True), *columns, box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    for one in found.values():
        table.add_row(*_row(one))
    out.print(table)
    _print_cases("won most", found[chosen].won, before, after, chosen)
    _print_cases("lost most", found[chosen].lost, before, after, chosen)


def _row(one: Difference) -> list[str]:
    interval = f"{one.low:+.3f} to {one.high:+.3f}"
    sure = "[green]" if one.p < 0.05 and one.difference > 0 else "[red]" if one.p < 0.05 else ""
    change = f"{sure}{one.difference:+.3f}" + ("[/]" if sure else "")
    p = f"{one.p:.4f}"
    numbers = [f"{one.before:.3f}", f"{one.after:.3f}", change, interval, p, str(len(one.won)), str(len(one.lost))]
    return [escape(one.metric), *numbers]


def _print_cases(title: str, cases: Sequence[str], before: Run, after: Run, metric: str) -> None:
    if not cases:
        return
    old: Mapping[str, RetrievalCase | AnswerCase] = {one.case.id: one for one in before.cases}
    new: Mapping[str, RetrievalCase | AnswerCase] = {one.case.id: one for one in after.cases}
    titles = (f"{title}, by {metric}", "before", "after")
    table = Table(*(Column(one, ratio=1, overflow="fold") for one in titles), expand=True)
    for identity in cases[:SHOWN]:
        was, now = old[identity], new[identity]
        wanted = ", ".join(was.case.relevant if was.case.relevant else was.case.answers)
        question = f"{escape(was.case.question)}\n[dim]{escape(identity)}\nwanted: {escape(wanted[:200]) or '-'}[/]"
        table.add_row(question, _outcome(was, metric), _outcome(now, metric), end_section=True)
    out.print(table)


def _outcome(one: RetrievalCase | AnswerCase, metric: str) -> str:
    """Its score, and the best documents with the relevant ones marked, or the answer."""
    if isinstance(one, AnswerCase):
        return f"{one.scores[metric]:.3f}\n{escape(one.answer[:300])}"
    best = [
        f"{'[green]*[/] ' if one.case.relevant.get(hit.document, 0) > 0 else '  '}{escape(hit.document)}"
        for hit in one.ranked[:3]
    ]
    return "\n".join([f"{one.metrics[metric]:.3f}", *best])
