"""`graft collections`, `graft reindex` and `graft index`."""

from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.table import Column, Table

from ingest.errors import InvalidError
from ingest.schemas import Chunking, Strategy, with_query_adapter
from service.cli_ingest import report
from service.cli_options import CollectionOption, JsonOption, connected
from service.schemas import CollectionSettings
from service.schemas_jobs import ReindexRequest
from service.show import escape, follow, out, write_json

collections_app = typer.Typer(invoke_without_command=True, help="Collections and their indexes.")
index_app = typer.Typer(no_args_is_help=True, help="An index out as Parquet or to another store, and in again.")


@collections_app.callback()
def collections(context: typer.Context, to: JsonOption = None) -> None:
    """Lists the collections."""
    if context.invoked_subcommand is not None:
        return
    with connected() as client:
        found = client.collections()
    if to:
        write_json(found, to)
        return
    table = Table("name", "documents", "chunks", Column("embedded and split", overflow="fold"), "prompt", "adapter")
    for one in found:
        made = f"{one.embedder}, {one.chunking.strategy} {one.chunking.tokens}"
        table.add_row(one.name, str(one.documents), str(one.chunks), made, one.prompt, one.adapter or "-")
    out.print(table)


@collections_app.command()
def indexes(name: str, to: JsonOption = None) -> None:
    """Lists the indexes of a collection: the live one, and those kept for a way back."""
    with connected() as client:
        found = client.indexes(name)
    if to:
        write_json(found, to)
        return
    table = Table("index", "state", "chunks", "embedder", "chunking", "made")
    for one in found:
        chunking = f"{one.chunking.strategy} {one.chunking.tokens}"
        made = f"{one.created_at:%Y-%m-%d %H:%M}"
        table.add_row(one.fingerprint[:12], one.state, str(one.chunks), one.embedder, chunking, made)
    out.print(table)


@collections_app.command()
def activate(name: str, index: str, to: JsonOption = None) -> None:
    """Brings a kept index up to date and makes it live: the way back."""
    with connected() as client:
        report(follow(client, client.activate_index(name, index)), to)


@collections_app.command()
def drop(name: str, index: str) -> None:
    """Deletes an index that is not live."""
    with connected() as client:
        client.delete_index(name, index)
    out.print(f"dropped {escape(index)}")


@collections_app.command("query-adapter")
def query_adapter(
    name: str, adapter: Annotated[str, typer.Argument(help="Its name in GRAFT_HOME/query-adapters, or `none`.")]
) -> None:
    """Gives a collection a query adapter that `graft tune query-adapter` made, or takes it away."""
    with connected() as client:
        chosen = None if adapter == "none" else adapter
        held = client.collection(name).retrieval
        client.put_collection(name, CollectionSettings(retrieval=with_query_adapter(held, chosen)))
    out.print(f"{escape(name)}: " + (f"questions go through {escape(adapter)}" if chosen else "no query adapter"))


@collections_app.command("rm")
def remove(name: str) -> None:
    """Deletes a collection: its documents, their texts and its indexes. The sources stay."""
    with connected() as client:
        client.delete_collection(name)
    out.print(f"deleted {escape(name)}")


def reindex(
    name: str,
    embedder: Annotated[str | None, typer.Option(help="A folder below GRAFT_MODELS, a path, or a hub name.")] = None,
    chunking: Annotated[str | None, typer.Option(help=f"One of {', '.join(get_args(Strategy))}.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Of a chunk.")] = None,
    overlap: Annotated[int | None, typer.Option(help="Tokens.")] = None,
    parent_tokens: Annotated[int | None, typer.Option(help="Of a parent, for `hierarchical`.")] = None,
    headers: Annotated[bool | None, typer.Option(help="Title and heading path above each chunk.")] = None,
    flip: Annotated[bool, typer.Option(help="Make it live at the end.")] = True,
    to: JsonOption = None,
) -> None:
    """Embeds and splits a collection anew, beside the live index and from the kept texts, and makes the new one live."""
    given = {
        "strategy": chunking,
        "tokens": tokens,
        "overlap": overlap,
        "parent_tokens": parent_tokens,
        "headers": headers,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    with connected() as client:
        fields: dict[str, Any] = {"flip": flip}
        if embedder:
            fields["embedder"] = embedder
        if changes:
            held = client.collection(name).chunking.model_dump(exclude_none=True)
            if changes.get("strategy", held["strategy"]) != "hierarchical":
                held.pop("parent_tokens", None)
            fields["chunking"] = Chunking.model_validate({**held, **changes})
        if len(fields) == 1:
            raise InvalidError(
                "say what changes: --embedder, --chunking, --tokens, --overlap, --parent-tokens or --headers"
            )
        report(follow(client, client.reindex(name, ReindexRequest(**fields))), to)


@index_app.command()
def dump(name: str, target: str, to: JsonOption = None) -> None:
    """Writes a collection's index into a new folder as Parquet, or to a store as chroma:PATH#NAME."""
    with connected() as client:
        report(follow(client, client.dump(name, _place(target))), to)


@index_app.command()
def load(source: str, collection: CollectionOption = "default", to: JsonOption = None) -> None:
    """Takes in what `dump` wrote, or what another store holds."""
    with connected() as client:
        report(follow(client, client.load(collection, _place(source))), to)


def _place(target: str) -> str:
    """Folders are the command's own, so their names are made absolute for the service."""
    from ingest import stores

    if not stores.is_store(target):
        return str(Path(target).absolute())
    store = stores.parse_store(target)
    return f"{store.kind}:{Path(store.place).absolute()}#{store.name}" if store.is_local else target
