"""`graft adapters`: what may answer, what does, and the way back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from service.cli_options import JsonOption, connected
from service.schemas_adapters import ActivateRequest, AdapterView, Move, RegisterRequest, RollbackRequest
from service.show import escape, out, write_json

app = typer.Typer(no_args_is_help=True, help="Registers LoRA adapters, activates them, rolls back.")
CollectionOption = Annotated[
    str | None,
    typer.Option("--collection", "-c", help="Only for this collection; else for all without one of their own."),
]
WhyOption = Annotated[str | None, typer.Option(help="Kept with the move.")]


@app.command()
def add(
    folder: Path,
    label: Annotated[str | None, typer.Option(help="Begins its name; default the folder's name.")] = None,
    to: JsonOption = None,
) -> None:
    """Checks a PEFT LoRA folder and registers a copy of it."""
    with connected() as client:
        adapter = client.register_adapter(RegisterRequest(path=str(folder.absolute()), label=label))
    if to:
        write_json(adapter, to)
    else:
        out.print(adapter.name)


@app.command("list")
def list_adapters(to: JsonOption = None) -> None:
    """Lists the registered adapters; the live one is marked."""
    with connected() as client:
        found = client.adapters()
    if to:
        write_json(found, to)
        return
    table = Table("", Column("name", no_wrap=True), "base", "rank", "size", "checked", "registered", "collections")
    for one in found:
        table.add_row("*" if one.live else "", one.name, *_facts(one))
    out.print(table)


@app.command()
def show(name: str, to: JsonOption = None) -> None:
    """Shows where an adapter comes from."""
    with connected() as client:
        adapter = client.adapter(name)
    if to:
        write_json(adapter, to)
        return
    for field, value in adapter.model_dump(mode="json").items():
        out.print(f"{field:>15}  {escape(str(value))}")


@app.command()
def activate(name: str, collection: CollectionOption = None, why: WhyOption = None, to: JsonOption = None) -> None:
    """Sends every query from now on to this adapter."""
    with connected() as client:
        move = client.activate_adapter(name, ActivateRequest(collection=collection, why=why))
    _shown(move, to)


@app.command()
def rollback(
    base: Annotated[bool, typer.Option("--base", help="To the bare base instead of the adapter before.")] = False,
    collection: CollectionOption = None,
    why: WhyOption = None,
    to: JsonOption = None,
) -> None:
    """Goes back to the adapter before the present one."""
    with connected() as client:
        move = client.roll_back(RollbackRequest(to="base" if base else "previous", collection=collection, why=why))
    _shown(move, to)


@app.command()
def rm(name: str, to: JsonOption = None) -> None:
    """Deletes an adapter that does not answer now."""
    with connected() as client:
        client.delete_adapter(name)
    if to:
        write_json([name], to)


@app.command()
def history(to: JsonOption = None) -> None:
    """Lists every move: who, when, from, to, why."""
    with connected() as client:
        found = client.adapter_moves()
    if to:
        write_json(found, to)
        return
    table = Table("when", "who", "collection", "kind", *(Column(one, no_wrap=True) for one in ("from", "to")), "why")
    for move in found:
        table.add_row(f"{move.at:%Y-%m-%d %H:%M:%S}", *_row(move))
    out.print(table)


def _facts(one: AdapterView) -> Sequence[str]:
    where = ", ".join(one.collections)
    size = f"{one.size / 2**20:.1f} MB"
    return (one.base, str(one.rank), size, one.checked or "-", f"{one.created_at:%Y-%m-%d %H:%M}", where)


def _row(move: Move) -> Sequence[str]:
    names = (move.from_name or "-", move.to_name or "-")
    return (move.principal, move.collection or "all", move.kind, *names, escape(move.why or ""))


def _shown(move: Move, to: str | None) -> None:
    if to:
        write_json(move, to)
        return
    nothing = "the live adapter" if move.collection else "the base"
    where = f"collection {move.collection}" if move.collection else "all collections"
    out.print(f"{where}: {move.from_name or nothing} -> {move.to_name or nothing}")
