"""`graft prompts`: versions of prompts, which one a collection answers with, and the way back."""

from pathlib import Path

import typer
from rich.table import Column, Table

from ingest.errors import InvalidError
from service.cli_options import CollectionOption, JsonOption, connected
from service.schemas import CollectionSettings, PromptMove, PromptRequest
from service.show import escape, out, write_json

app = typer.Typer(no_args_is_help=True, help="Versions of prompts, and which one a collection answers with.")


@app.command("list")
def list_prompts(to: JsonOption = None) -> None:
    """Lists every version, and the collections that answer with it."""
    with connected() as client:
        found, collections = client.prompts(), client.collections()
    if to:
        write_json(found, to)
        return
    table = Table(Column("version", no_wrap=True), "by", "added", "collections")
    for one in found:
        added = f"{one.created_at:%Y-%m-%d %H:%M}" if one.created_at else ""
        where = ", ".join(collection.name for collection in collections if collection.prompt == one.version)
        table.add_row(one.version, one.principal or "graft", added, where)
    out.print(table)


@app.command()
def show(name: str, to: JsonOption = None) -> None:
    """Shows all versions of a prompt, or the one that is named."""
    with connected() as client:
        found = client.prompt(name)
    if to:
        write_json(found, to)
        return
    for one in found:
        out.print(f"[bold]{one.version}[/]")
        out.print(escape(one.source.rstrip()), end="\n\n")


@app.command()
def add(name: str, file: Path, to: JsonOption = None) -> None:
    """Adds a version from a file; earlier ones stay as they are."""
    try:
        source = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidError(f"{str(file)!r} is not text in UTF-8") from error
    with connected() as client:
        added = client.put_prompt(name, PromptRequest(template=source))
    if to:
        write_json(added, to)
    else:
        out.print(added.version)


@app.command()
def use(version: str, collection: CollectionOption = "default", to: JsonOption = None) -> None:
    """Answers for a collection with a version; a bare name is its newest one, `auto` what fits the model."""
    with connected() as client:
        before = client.collection(collection).prompt
        view = client.put_collection(collection, CollectionSettings(prompt=version))
    if to:
        write_json(view, to)
    else:
        out.print(f"collection {collection}: {before} -> {view.prompt}")


@app.command()
def rollback(collection: CollectionOption = "default", to: JsonOption = None) -> None:
    """Goes back to the prompt before the present one."""
    with connected() as client:
        _shown(client.roll_back_prompt(collection), to)


def _shown(move: PromptMove, to: str | None) -> None:
    if to:
        write_json(move, to)
    else:
        out.print(f"collection {move.collection}: {move.from_version} -> {move.to_version}")
