"""The `graft` command. Everything but `up` and `doctor` goes through the typed client (`cli_options.connected`)."""

import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from pydantic import ValidationError
from rich.table import Table

from ingest.errors import GraftError
from service import cli_adapters, cli_indexes, cli_ingest, cli_prompts
from service.cli_options import CollectionsOption, JsonOption, asked_of, connected, ingest_settings, service_settings
from service.schemas import QueryRequest, SearchRequest
from service.show import ask_streaming, err, escape, out, print_answer, print_notes, write_json

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Cited answers from your documents.",
)
app.command()(cli_ingest.ingest)
app.add_typer(cli_ingest.documents_app, name="documents")
app.add_typer(cli_ingest.jobs_app, name="jobs")
app.add_typer(cli_indexes.collections_app, name="collections")
app.command()(cli_indexes.reindex)
app.add_typer(cli_indexes.index_app, name="index")
app.add_typer(cli_adapters.app, name="adapters")
app.add_typer(cli_prompts.app, name="prompts")


def main() -> None:
    """Errors of ours are one line and exit status 1; no stack trace reaches the user."""
    for command in entry_points(group="graft.commands"):  # of the packages above this one
        command.load()(app)
    try:
        app()
    except GraftError as error:
        err.print(f"[bold red]graft:[/] {escape(str(error))}")
        sys.exit(1)
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        err.print(f"[bold red]graft:[/] {escape(said)}")
        sys.exit(2)
    except OSError as error:
        err.print(f"[bold red]graft:[/] {escape(str(error))}")
        sys.exit(1)


@app.command()
def up(
    model: Annotated[
        str | None, typer.Option(help="A folder or hub name for the engine; default SERVICE_MODEL.")
    ] = None,
    root: Annotated[
        list[Path] | None, typer.Option(help="Another folder that may be ingested; may be repeated.")
    ] = None,
    ingest: Annotated[list[Path] | None, typer.Option(help="A folder to ingest before the service is ready.")] = None,
    ask: Annotated[str | None, typer.Option(help="A question to ask once it is ready.")] = None,
    engine: Annotated[bool, typer.Option(help="Start the local engine.")] = True,
) -> None:
    """Starts the engine and the service, and stays up until Ctrl-C."""
    from service.up import run

    settings = service_settings(root)
    if model:
        settings = settings.model_copy(update={"model": model})
    uvloop.run(run(settings, ingest_settings(), [path.absolute() for path in ingest or []], ask, engine, err))


@app.command()
def query(
    question: str,
    collection: CollectionsOption = None,
    top_k: Annotated[int | None, typer.Option(min=1, max=100)] = None,
    previous: Annotated[str | None, typer.Option(help="The interaction that this question follows up.")] = None,
    to: JsonOption = None,
) -> None:
    """Asks a question; the answer streams, its sources follow."""
    fields: dict[str, Any] = {"question": question, **asked_of(collection)}
    if top_k:
        fields["top_k"] = top_k
    request = QueryRequest(**fields)
    with connected(needs_engine=True) as client:
        if previous:
            request = QueryRequest(**fields, previous=previous, messages=client.turns(previous))
        if to:
            write_json(client.query(request), to)
        else:
            answer = ask_streaming(client, request)
            print_answer(answer)
            err.print(f"  [dim]to follow it up: --previous {answer.interaction_id}[/]")


@app.command()
def retrieve(
    question: str,
    collection: CollectionsOption = None,
    top_k: Annotated[int | None, typer.Option(min=1, max=100)] = None,
    by_document: Annotated[bool, typer.Option(help="One hit a document.")] = False,
    to: JsonOption = None,
) -> None:
    """Shows the passages that a question finds, with their scores."""
    fields: dict[str, Any] = {"question": question, **asked_of(collection)}
    if top_k:
        fields["top_k"] = top_k
    if by_document:
        fields["group_by"] = "document"
    with connected() as client:
        found = client.retrieve(SearchRequest(**fields))
    if to:
        write_json(found, to)
        return
    table = Table("score", "dense", "BM25", "where", "text")
    for hit in found.hits:
        named = f"{hit.collection}: " if "collections" in fields else ""
        where = named + hit.path + (f", page {hit.page}" if hit.page else "")
        scores = [
            f"{score:.3f}" if score is not None else "-" for score in (hit.score, hit.dense_score, hit.sparse_score)
        ]
        table.add_row(*scores, escape(where), escape(" ".join(hit.text.split())[:160]))
    out.print(table)
    print_notes(found.notes)


@app.command()
def doctor(to: JsonOption = None) -> None:
    """Shows what is installed, which engine and models would be used, what is missing, and the remedy."""
    from service.doctor import examine

    findings = examine(service_settings(None), ingest_settings())
    if to:
        write_json(findings, to)
    else:
        for finding in findings:
            sign = {"ok": "[green]ok[/]     ", "missing": "[red]missing[/]", "note": "[dim]note[/]   "}[finding.state]
            out.print(f"{sign}  {finding.name}: {escape(finding.found)}")
            if finding.state == "missing":
                out.print(f"         -> {escape(finding.remedy)}")
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)
