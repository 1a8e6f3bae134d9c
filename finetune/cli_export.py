"""`graft export`."""

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Column, Table

from eval.cli_retrieval import check_writable, ended_by_signal
from service.cli_options import JsonOption, ingest_settings, service_settings
from service.show import escape, write_json
from service.show import out as console

if TYPE_CHECKING:
    from finetune.export import Exported
    from finetune.export_difference import Difference

SHOWN = 3  # weights that are left out
MUCH = 0.25  # of what the training changed of the logits


def export(
    folder: Annotated[Path, typer.Argument(help="What `graft tune` left.")],
    to_folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder that is not there yet.")],
    kind: Annotated[
        Literal["merged", "lora"] | None,
        typer.Option(
            "--as", help="A model's folder, or a LoRA. Left out: LoRA and DoRA are merged, all else becomes a LoRA."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(metavar="R", help="Of the LoRA; default SERVICE_MAX_LORA_RANK, or less where it is exact."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the weights; default float32 for a LoRA, the base's own for a model."),
    ] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Leave out of the LoRA what none can hold: embeddings, norms.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Trained on; a folder or name. Left out: as its recipe has it.")
    ] = None,
    to: JsonOption = None,
) -> None:
    """Makes what was trained into what the engine loads, and measures what is lost by it."""
    from finetune.base_folder import find_base
    from finetune.runs import read_manifest
    from finetune.train import require_stack

    require_stack()
    check_writable(to)
    name = base or read_manifest(folder).recipe.get("model", {}).get("base")
    base_folder = find_base(name, ingest_settings().models)
    from finetune.export import Asked
    from finetune.export import export as run

    served = service_settings(None).max_lora_rank
    with ended_by_signal():
        found = run(folder, to_folder, base_folder, Asked(kind, rank, dtype, lossy, served))
    if to:
        write_json(found, to)
    if to != "-":
        _print(found, served)


def _print(found: "Exported", served: int) -> None:
    size = f"{found.size / 2**20:.1f} MB of {found.dtype}"
    console.print(f"{escape(found.out)}: {size}, {found.seconds:.0f} s")
    table = Table(
        Column("logits, from what was trained"),
        *(Column(one, justify="right") for one in ("mean", "largest", "same token")),
    )
    _row(table, "what was written", found.difference)
    if found.unquantized:
        _row(table, "the adapter on the base as it is served", found.unquantized)
    _row(table, "the untuned base", found.bare)
    console.print(table)
    if found.kind == "merged":
        console.print(f"  serve it: graft up --model {escape(found.out)}")
        return
    _print_modules(found)
    for one in sorted(found.left_out, key=lambda one: -one.update)[:SHOWN]:
        console.print(f"  left out: {escape(one.name)}, which training changed by {one.update:.2%}")
    if len(found.left_out) > SHOWN:
        console.print(f"  and {len(found.left_out) - SHOWN} weights more, which changed less")
    if found.difference.mean > MUCH * found.bare.mean:
        console.print(
            "  [yellow]much of it is lost: a higher --rank keeps more, and a model all of it (--as merged)[/]"
        )
    if found.rank is not None and found.rank > served:
        from finetune.export import RANKS

        needed = next(one for one in RANKS if one >= found.rank)
        console.print(f"  the engine takes it with SERVICE_MAX_LORA_RANK={needed} or more, which it reads at its start")
    console.print(f"  register it: graft adapters add {escape(found.out)}")


def _row(table: Table, what: str, one: "Difference") -> None:
    table.add_row(what, f"{one.mean:.5f}", f"{one.largest:.4f}", f"{one.same:.1%}")


def _print_modules(found: "Exported") -> None:
    """One line for each kind of matrix; each single one is in the JSON."""
    kinds = defaultdict(list)
    for fit in found.modules:
        kinds[fit.module.rpartition(".")[2]].append(fit)
    names = ("matrices", "update", "kept", "error", "largest error")
    table = Table(Column(f"rank {found.rank}"), *(Column(one, justify="right") for one in names))
    for name, fits in kinds.items():
        mean = [sum(getattr(fit, field) for fit in fits) / len(fits) for field in ("update", "kept", "error")]
        worst = max(fit.error for fit in fits)
        table.add_row(name, str(len(fits)), *(f"{value:.2%}" for value in (*mean, worst)))
    console.print(table)
    console.print(f"  kept of the whole update: {found.kept:.2%} of its squared norm")
