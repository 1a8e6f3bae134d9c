"""`graft eval flip`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli_options import JsonOption, connected
from service.show import escape, out, write_json

if TYPE_CHECKING:
    from eval.flip import Verdict


def flip(
    collection: Annotated[str, typer.Argument(help="Its live index is compared with the other.")],
    index: Annotated[str, typer.Argument(help="The first characters of it; `graft collections indexes` lists them.")],
    dataset: Annotated[Path, typer.Argument(help="Questions of the collection that nothing was tuned on.")],
    split: Annotated[str | None, typer.Option(help="Of a BEIR folder with several.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask so many of the questions.")] = None,
    threads: Annotated[int, typer.Option(min=1, max=64, help="Questions asked at once.")] = 4,
    to: JsonOption = None,
) -> None:
    """Makes an index that was built with `graft reindex --no-flip` live, if the questions find better in it."""
    from eval.cases import read_dataset
    from eval.cli_retrieval import check_writable, ended_by_signal, progress
    from eval.flip import flip_if_better

    check_writable(to)
    asked = read_dataset(dataset, split, limit)
    with ended_by_signal(), connected() as client, progress() as tell:
        verdict = flip_if_better(client, collection, index, asked, threads, tell("questions"))
    show_verdict(verdict, to)


def show_verdict(verdict: "Verdict", to: str | None) -> None:
    if to:
        write_json(verdict, to)
    if to != "-":
        sign = "[green]made[/]" if verdict.made else "[yellow]not made[/]"
        out.print(f"{escape(verdict.change)} of collection {escape(verdict.collection)}: {sign}")
        out.print(f"  {escape(verdict.why)}", soft_wrap=True)
