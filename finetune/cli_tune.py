"""`graft tune`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from finetune.cli_options import finetune_settings, with_rows
from finetune.retrieval_recipe import about as about_retrieval
from finetune.retrieval_recipe import is_retrieval, retrieval_recipes
from ingest.errors import InvalidError
from service.cli_options import JsonOption, ingest_settings, service_settings
from service.show import err, escape, out, write_json

if TYPE_CHECKING:
    from finetune.recipe import Recipe
    from finetune.train import Split


def tune(
    recipe: Annotated[
        str | None, typer.Argument(help="One of the product's recipes (--list), or a .toml file.")
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="Rows to train on.")] = None,
    eval_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Held-out rows; left out, a share of the rows.")
    ] = None,
    to_folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Left out: below FINETUNE_FOLDER.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Of the recipe, as max_steps=100; may be repeated."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="DIR|NAME", help="The model to start from; left out, the one that is served.")
    ] = None,
    to: JsonOption = None,
    llamafactory: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A training YAML of LLaMA-Factory, in place of a recipe.")
    ] = None,
    ignore_unknown: Annotated[
        bool, typer.Option("--ignore-unknown", help="Go on without the keys of that file that mean nothing here.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew where the folder holds another run, or a finished one.")
    ] = False,
    split: Annotated[str | None, typer.Option(help="Of a BEIR folder with several; of questions alone.")] = None,
    collection: Annotated[
        str | None, typer.Option("--collection", "-c", help="That an embedder or a query adapter is for.")
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Let the collection take it, if held-out questions find better.")
    ] = False,
    listed: Annotated[bool, typer.Option("--list", help="List the recipes.")] = False,
) -> None:
    """Trains by a recipe. A run that was ended goes on when the same command is given again."""
    if listed:
        _list()
        return
    if is_retrieval(recipe):
        if llamafactory is not None or eval_data is not None:
            raise InvalidError(f"recipe {recipe!r} takes questions alone: leave --llamafactory and --eval-data away")
        from finetune.cli_retrieval import tune_retrieval

        tune_retrieval(
            recipe or "",
            settings=settings or (),
            data=data,
            split=split,
            collection=collection,
            apply=apply,
            to_folder=to_folder,
            base=base,
            to=to,
            restart=restart,
            finetune=finetune_settings(),
        )
        return
    if split or collection or apply:
        raise InvalidError(
            f"--split, --collection and --apply are for {', '.join(retrieval_recipes())}; an adapter is registered with "
            "`graft adapters add`"
        )
    chosen, factory_out = _recipe(recipe, settings or (), llamafactory, ignore_unknown)
    chosen = with_rows(chosen, data, eval_data, base or chosen.model.base or service_settings(None).model)
    from finetune.train import require_stack

    require_stack()
    _train(chosen, to_folder or factory_out, to, restart)


def _train(recipe: "Recipe", to_folder: Path | None, to: str | None, restart: bool) -> None:
    from finetune import runs
    from finetune.arguments import refuse_unknown
    from finetune.base_folder import find_base
    from finetune.hooks import Hooks
    from finetune.show_training import print_summary, shown
    from finetune.train import read_data, train

    settings, ingest = finetune_settings(), ingest_settings()
    refuse_unknown(recipe)
    recipe = runs.as_parent(recipe)
    folder = find_base(recipe.model.base, ingest.models)
    data = read_data(recipe)
    target = to_folder or runs.default_out(recipe, data.everything.digest, folder, settings, ingest.home)
    if runs.writes():
        _report(recipe, data, folder, settings.memory_share)
    with shown() as show:
        manifest = train(
            recipe,
            out=target,
            settings=settings,
            models=ingest.models,
            home=ingest.home,
            hooks=Hooks(progress=show),
            restart=restart,
            data=data,
        )
    if to and runs.writes():
        write_json(manifest, to)
    if to != "-" and runs.writes():
        print_summary(manifest, target)


def _recipe(
    name: str | None, settings: Any, llamafactory: Path | None, ignore_unknown: bool
) -> tuple["Recipe", Path | None]:
    """-> the recipe, and where LLaMA-Factory's file wants the result."""
    from finetune.recipe import read_recipe, with_settings

    if llamafactory is None:
        if name is None:
            raise InvalidError("name a recipe (`graft tune --list` shows them), or give --llamafactory FILE")
        return read_recipe(name, settings), None
    if name is not None:
        raise InvalidError(f"give either the recipe {name!r} or --llamafactory, not both")
    from finetune.llamafactory import read_llamafactory

    found = read_llamafactory(llamafactory, ignore_unknown)
    for note in found.notes:
        err.print(f"[yellow]note:[/] {escape(note)}")
    return with_settings(found.recipe, settings), found.out


def _report(recipe: "Recipe", data: "Split", base: Path, share: float) -> None:
    """What the rows are like, and the memory that the run will take. Raises UnavailableError where it is not free."""
    from finetune.hardware import free_memory
    from finetune.memory import check_fits, estimate, longest_taken
    from finetune.row_report import report, show
    from ingest.model_files import read_tokenizer
    from service.base_model import chat_template

    found = report(data.learn, data.held_out, read_tokenizer(base), longest_taken(recipe), chat_template(base))
    show(found.model_copy(update={"method": recipe.method}))
    estimated = estimate(recipe, base, data.learn)
    out.print(escape(str(estimated)))
    check_fits(estimated, free_memory(), share, recipe)


def _list() -> None:
    from finetune.recipe import about, recipes

    table = Table("recipe", "what it does", box=None)
    for name in recipes():
        table.add_row(name, escape(about(name)))
    for name in retrieval_recipes():
        table.add_row(name, escape(about_retrieval(name)))
    out.print(table)
