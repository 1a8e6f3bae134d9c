"""What the command line shows: progress, answers with their sources, reports, JSON."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from ingest.schemas import Progress, Report
from service.client import Client
from service.schemas import Answer, QueryRequest
from service.schemas_jobs import Job
from service.tuning import TuneProgress, TuneResult

out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)


def follow(client: Client, job: Job) -> Job:
    """Shows a job's progress until it ends; Ctrl-C cancels it."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
    )
    with ProgressBar(*columns, console=err, transient=True) as bar:
        task = bar.add_task(f"{job.kind} {PurePath(job.path).name or job.collection}", total=None, said="")

        def show(now: Job) -> None:
            at = now.progress
            by_bytes = at.bytes_total is not None and at.bytes_total > 0
            total, done = (at.bytes_total, at.bytes) if by_bytes else (at.files_total, at.files)
            if now.tuning is not None:
                total, done = now.tuning.steps or None, now.tuning.step
            bar.update(task, total=total, completed=done, said=how_far(now))

        try:
            return client.wait(job.job_id, show)
        except KeyboardInterrupt:
            client.cancel(job.job_id)
            return client.wait(job.job_id, show)


def how_far(job: Job) -> str:
    """What a job in progress is doing, or what it waits for."""
    if job.waiting_for:
        return f"waits for {'a worker' if job.waiting_for == 'worker' else f'the {job.waiting_for}'}: {job.hint}"
    if job.state == "queued":
        return "queued"
    if job.kind == "tune":
        return f"{job.tuning.stage} {said_of_training(job.tuning)}".rstrip() if job.tuning else "starting"
    return said(job.progress)


def said_of_training(at: TuneProgress) -> str:
    """As "step 40/200, loss 1.312, held out 1.405, 310 tokens/s, 4:20 left"; empty before the first step."""
    parts = [f"step {at.step}/{at.steps}"] if at.steps else []
    if at.loss is not None:
        parts.append(f"loss {at.loss:.4g}")
    if at.eval_loss is not None:
        parts.append(f"held out {at.eval_loss:.4g}")
    if at.reward is not None:
        parts.append(f"reward {at.reward:.4g}")
    if at.tokens_per_second:
        parts.append(f"{at.tokens_per_second:.0f} tokens/s")
    if at.seconds_left:
        parts.append(f"{clock(at.seconds_left)} left")
    return ", ".join(parts)


def clock(seconds: float) -> str:
    """As 3:20, or 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def said(at: Progress) -> str:
    """As "37/100 files, 12 pages, 3.4 of 9.0 MB, 812 chunks, 45 a second, 1:20 left"."""
    parts = [f"{at.files}/{at.files_total} files" if at.files_total is not None else f"{at.files} files"]
    if at.pages:
        parts.append(f"{at.pages} pages")
    if at.bytes_total:
        parts.append(f"{at.bytes / 1e6:.1f} of {at.bytes_total / 1e6:.1f} MB")
    parts.append(f"{at.chunks} chunks")
    if at.chunks_per_second:
        parts.append(f"{at.chunks_per_second:g} a second")
    if at.seconds_left:
        parts.append(f"{clock(at.seconds_left)} left")
    return ", ".join(parts)


def ask_streaming(client: Client, request: QueryRequest) -> Answer:
    sent: list[str] = []

    def show(text: str) -> None:
        sent.append(text)
        out.print(escape(text), end="")

    answer = client.query(request, show)
    out.print()
    if "".join(sent).strip() != answer.answer:  # what was sent is taken back (SERVICE_UNSUPPORTED=refuse)
        out.print(escape(answer.answer))
    return answer


def print_answer(answer: Answer) -> None:
    """The sources of an answer that has been printed while it streamed."""
    for citation in answer.citations:
        where = citation.path + (f", page {citation.page}" if citation.page else "")
        heading = f" ({citation.heading})" if citation.heading else ""
        out.print(f"  \\[{citation.n}] {escape(where + heading)}")
        out.print(f"      [dim]{escape(' '.join(citation.quote.split()))}[/]")
    if not answer.citations:
        out.print("  [dim]no passage supports this answer[/]")
    print_notes(answer.notes)


def print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        out.print(f"  [yellow]note:[/] {escape(note)}")


def summary(report: Report) -> str:
    files = ", ".join(f"{count} {state}" for state, count in report.files.model_dump().items() if count)
    chunks = ", ".join(f"{count} {state}" for state, count in report.chunks.model_dump().items() if count)
    return f"files: {files or 'none'}; chunks: {chunks or 'none changed'}; {report.seconds.get('total', 0):.1f} s"


def print_report(job: Job) -> None:
    assert job.report is not None
    out.print(summary(job.report), markup=False)
    for failure in job.report.failures:
        out.print(f"  [red]failed[/] {escape(failure.path)}: {escape(failure.reason)}")
    for skip in job.report.skips:
        out.print(f"  [dim]skipped {escape(skip.path)}: {escape(skip.reason)}[/]")
    print_notes(job.report.notes)


def print_result(result: TuneResult) -> None:
    """What a training left."""
    registered = f", adapter {result.adapter}{' (live)' if result.live else ''}" if result.adapter else ""
    out.print(f"trained: {result.folder}{registered}", markup=False)
    print_notes(result.notes)


def write_json(value: BaseModel | list[Any], target: str) -> None:
    plain = [one.model_dump(mode="json") for one in value] if isinstance(value, list) else value.model_dump(mode="json")
    text = json.dumps(plain, ensure_ascii=False, indent=1) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text)


def escape(text: str) -> str:
    return text.replace("[", "\\[")
