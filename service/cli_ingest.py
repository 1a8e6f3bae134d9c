"""`graft ingest`, `graft documents` and `graft jobs`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from ingest.errors import GraftError, InvalidError
from ingest.reader import ReaderSpec, args_of
from ingest.remote import is_remote
from service.cli_options import CollectionOption, JsonOption, connected, ingest_settings
from service.schemas_jobs import IngestRequest, Job
from service.show import (
    err,
    escape,
    follow,
    how_far,
    out,
    print_report,
    print_result,
    said_of_training,
    write_json,
)

documents_app = typer.Typer(no_args_is_help=True, help="What was taken in: list, add, delete.")
jobs_app = typer.Typer(no_args_is_help=True, help="Jobs: list, follow, cancel, retry.")
AclOption = Annotated[list[str] | None, typer.Option(help="A group that may see these documents; may be repeated.")]
MetadataOption = Annotated[str | None, typer.Option(metavar="JSON", help="An object that is set on these documents.")]


def ingest(
    source: Annotated[str | None, typer.Argument(help="A folder, a file, or a URL as s3://bucket/prefix.")] = None,
    collection: CollectionOption = "default",
    watch: Annotated[bool, typer.Option(help="Follow changes of the folder until Ctrl-C.")] = False,
    allow_empty: Annotated[bool, typer.Option(help="Let an empty source empty its part of the index.")] = False,
    restore: Annotated[bool, typer.Option(help="Bring back documents that were deleted by their ids.")] = False,
    acl: AclOption = None,
    metadata: MetadataOption = None,
    reader: Annotated[
        str | None, typer.Option(metavar="MODULE:CLASS", help="Take the documents of a LlamaIndex reader.")
    ] = None,
    arg: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="For the reader; may be repeated.")] = None,
    to: JsonOption = None,
) -> None:
    """Brings documents into a collection and keeps it in step with their source: run it again after changes."""
    fields: dict[str, Any] = {"collection": collection, "allow_empty": allow_empty, "restore": restore}
    if reader is not None:
        fields["reader"] = ReaderSpec(name=reader, args=args_of(arg or []))
    if source is not None:
        fields["path"] = source if is_remote(source) else str(Path(source).absolute())
    if acl is not None:
        fields["acl"] = acl
    if metadata is not None:
        fields["metadata"] = _object(metadata)
    request = IngestRequest(**fields)
    if watch and (request.path is None or is_remote(request.path)):
        raise InvalidError("--watch follows a folder; for any other source, run the command again from time to time")
    with connected() as client:
        report(follow(client, client.ingest(request)), to)
        if watch:
            from service.watch import follow_changes

            follow_changes(client, request, ingest_settings().watch_reconcile_seconds, err)


@documents_app.command("list")
def list_documents(
    collection: CollectionOption = "default",
    path: Annotated[str | None, typer.Option(help="This file, or those of this folder.")] = None,
    state: Annotated[str | None, typer.Option(help="done, failed, skipped, writing or removed.")] = None,
    to: JsonOption = None,
) -> None:
    """Lists documents, with what went wrong with them."""
    with connected() as client:
        found = client.documents(collection, limit=10_000, path=path, state=state)
    if to:
        write_json(found, to)
        return
    table = Table(Column("path", overflow="fold"), "state", "chunks", "groups", Column("id", no_wrap=True))
    for one in found:
        said = f"{one.state}: {one.reason}" if one.reason else one.state
        table.add_row(escape(one.path), escape(said), str(one.chunks), escape(", ".join(one.acl)) or "-", one.id)
    out.print(table)


@documents_app.command("add")
def add_documents(
    files: list[Path],
    collection: CollectionOption = "default",
    acl: AclOption = None,
    metadata: MetadataOption = None,
    to: JsonOption = None,
) -> None:
    """Uploads files: the service keeps them. One of an earlier one's name is its new version."""
    with connected() as client:
        job = client.upload(files, collection, acl, None if metadata is None else _object(metadata))
        report(follow(client, job), to)


@documents_app.command("rm")
def remove_documents(
    documents: Annotated[list[str], typer.Argument(help="Ids, or paths as `graft documents list` shows them.")],
    collection: CollectionOption = "default",
) -> None:
    """Deletes documents: they leave every search and the kept texts at once. An archive goes with its members."""
    with connected() as client:
        for named in documents:
            ids = [one.id for one in client.documents(collection, path=named) if one.path == named] or [named]
            for identity in ids:
                client.delete_document(identity)
            out.print(f"deleted {escape(named)}")


@jobs_app.command("list")
def list_jobs(
    collection: Annotated[str | None, typer.Option("--collection", "-c", help="Of this one alone.")] = None,
    to: JsonOption = None,
) -> None:
    """The latest jobs."""
    with connected() as client:
        found = client.jobs(collection)
    if to:
        write_json(found, to)
        return
    table = Table(Column("job", no_wrap=True), "kind", "collection", "state", Column("done", overflow="fold"))
    for job in found:
        done = how_far(job) if job.state in {"queued", "running"} else job.error or _left(job)
        table.add_row(job.job_id, job.kind, job.collection, job.state, escape(done))
    out.print(table)


@jobs_app.command("follow")
def follow_job(job_id: str, to: JsonOption = None) -> None:
    """Shows a job's progress and what it leaves; Ctrl-C cancels it."""
    with connected() as client:
        report(follow(client, client.job(job_id)), to)


@jobs_app.command("cancel")
def cancel_job(job_id: str) -> None:
    """What it has finished is kept."""
    with connected() as client:
        out.print(client.cancel(job_id).state)


@jobs_app.command("retry")
def retry_job(job_id: str, to: JsonOption = None) -> None:
    """Takes the failed files of a job once more; a training goes on from its last checkpoint."""
    with connected() as client:
        report(follow(client, client.retry(job_id)), to)


def report(job: Job, to: str | None) -> None:
    """Raises GraftError when it did not succeed; a report that there is nevertheless is written first."""
    if job.report is not None:
        if to:
            write_json(job.report, to)
        else:
            print_report(job)
    if job.result is not None:
        if to:
            write_json(job.result, to)
        else:
            print_result(job.result)
    if job.state != "succeeded" or (job.report is None and job.result is None):
        raise GraftError(f"the job ended {job.state}: {job.error or 'run it again to go on'}")


def _left(job: Job) -> str:
    """What an ended job did, in a few words."""
    if job.kind != "tune":
        return f"{job.progress.files} files, {job.progress.chunks} chunks"
    at = said_of_training(job.tuning) if job.tuning else "nothing"
    return f"{at}, adapter {job.result.adapter}" if job.result and job.result.adapter else at


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InvalidError(f"--metadata {text!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidError(f'--metadata {text!r} is not an object, as {{"department": "stores"}}')
    return found
