"""Follows a folder: what changes is taken in, and now and then the whole folder is compared."""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from watchfiles import Change, watch

from ingest.errors import GraftError, UnavailableError
from service.client import Client
from service.schemas_jobs import IngestRequest, Job
from service.show import escape, summary

QUIET_MS = 800  # after the last change of a burst, before it is taken in
BURST_MS = 5000  # and at most this long after its first
ONLY = 1000  # changes in one go; for more the whole folder is compared
RETRY_SECONDS = 5.0
AGAIN_SECONDS = 60.0  # after a job that failed, before the whole folder is tried


def follow_changes(client: Client, request: IngestRequest, reconcile_seconds: float, console: Console) -> None:
    """Until Ctrl-C, beginning with the whole folder, since it may have changed before it was watched.

    What could not be taken in, since no service answered, is taken in a little later.
    """
    assert request.path is not None
    folder = Path(request.path)
    console.print(f"watching {folder}; Ctrl-C ends it", markup=False)
    due = time.monotonic()
    waiting: set[str] = set()
    for changes in _changes(folder, min(RETRY_SECONDS, reconcile_seconds)):
        if changes is None:
            due = time.monotonic()
            continue
        waiting |= {path for _, path in changes}
        whole = time.monotonic() >= due or len(waiting) > ONLY
        if not waiting and not whole:
            continue
        try:
            job = client.wait(client.ingest(request.model_copy(update=_asked(waiting, whole))).job_id)
        except UnavailableError as error:
            console.print(f"{error}; it is tried again", markup=False)
            continue
        except GraftError as error:  # a folder that is away, say
            console.print(f"{error}; it is tried again in {AGAIN_SECONDS:.0f} s", markup=False)
            due = time.monotonic() + AGAIN_SECONDS
            waiting.clear()
            continue
        if job.state != "succeeded":
            due = min(due, time.monotonic() + AGAIN_SECONDS)
        elif whole:
            due = time.monotonic() + reconcile_seconds
        waiting.clear()
        _tell(job, console)


def _changes(folder: Path, seconds: float) -> Iterator[set[tuple[Change, str]] | None]:
    """-> what has changed, at least an empty set every so many `seconds`; None: some of it could not be told."""
    while True:
        try:
            yield from watch(
                folder,
                watch_filter=lambda _, path: _is_visible(path, folder),
                debounce=BURST_MS,
                step=QUIET_MS,
                rust_timeout=int(seconds * 1000),
                yield_on_timeout=True,
            )
        except KeyboardInterrupt:
            return
        except (RuntimeError, FileNotFoundError):  # a name that is not UTF-8; a folder that is away
            time.sleep(seconds)
            yield None


def _asked(paths: Iterable[str], whole: bool) -> dict[str, object]:
    """What was allowed once, to empty the index or to restore, is not allowed again by itself."""
    only: Sequence[str] = () if whole else sorted(paths)
    return {"only": tuple(only), "allow_empty": False, "restore": False}


def _is_visible(path: str, folder: Path) -> bool:
    return not any(part.startswith(".") for part in Path(path).relative_to(folder).parts)


def _tell(job: Job, console: Console) -> None:
    if job.report is None or job.state != "succeeded":
        console.print(f"the job ended {job.state}: {job.error or ''}", markup=False)
        return
    if any(count for state, count in job.report.files.model_dump().items() if state != "unchanged"):
        console.print(f"{time.strftime('%H:%M:%S')} {summary(job.report)}", markup=False)
    for failure in job.report.failures:
        console.print(f"  [red]failed[/] {escape(failure.path)}: {escape(failure.reason)}")
