"""What the command line shows: progress, answers with their sources, reports, JSON."""

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from service.client import Client
from service.schemas import Answer, Job, QueryRequest

out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)


def follow(client: Client, job: Job) -> Job:
    """Shows a job's progress until it ends; Ctrl-C cancels it."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[chunks]} chunks"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(f"ingesting {Path(job.path).name}", total=None, chunks=0)

        def show(now: Job) -> None:
            at = now.progress
            progress.update(task, total=at.files_total, completed=at.files, chunks=at.chunks)

        try:
            return client.wait(job.job_id, show)
        except KeyboardInterrupt:
            client.cancel(job.job_id)
            return client.wait(job.job_id, show)


def ask_streaming(client: Client, request: QueryRequest) -> Answer:
    def show(text: str) -> None:
        out.print(escape(text), end="")

    answer = client.query(request, show)
    out.print()
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


def print_report(job: Job) -> None:
    assert job.report is not None
    files = ", ".join(f"{count} {state}" for state, count in job.report.files.model_dump().items() if count)
    chunks = ", ".join(f"{count} {state}" for state, count in job.report.chunks.model_dump().items() if count)
    out.print(
        f"files: {files or 'none'}; chunks: {chunks or 'none changed'}; {job.report.seconds.get('total', 0):.1f} s"
    )
    for failure in job.report.failures:
        out.print(f"  [red]failed[/] {escape(failure.path)}: {escape(failure.reason)}")
    for skip in job.report.skips:
        out.print(f"  [dim]skipped {escape(skip.path)}: {escape(skip.reason)}[/]")
    for note in job.report.notes:
        out.print(f"  [yellow]note:[/] {escape(note)}")


def write_json(value: BaseModel | list[Any], target: str) -> None:
    plain = [one.model_dump(mode="json") for one in value] if isinstance(value, list) else value.model_dump(mode="json")
    text = json.dumps(plain, ensure_ascii=False, indent=1) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text)


def escape(text: str) -> str:
    return text.replace("[", "\\[")
