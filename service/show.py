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
from service.schemas import Answer, Job, QueryRequest

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
            bar.update(task, total=total, completed=done, said="queued" if now.state == "queued" else said(at))

        try:
            return client.wait(job.job_id, show)
        except KeyboardInterrupt:
            client.cancel(job.job_id)
            return client.wait(job.job_id, show)


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
        parts.append(f"{int(at.seconds_left) // 60}:{int(at.seconds_left) % 60:02} left")
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


def write_json(value: BaseModel | list[Any], target: str) -> None:
    plain = [one.model_dump(mode="json") for one in value] if isinstance(value, list) else value.model_dump(mode="json")
    text = json.dumps(plain, ensure_ascii=False, indent=1) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text)


def escape(text: str) -> str:
    return text.replace("[", "\\[")
