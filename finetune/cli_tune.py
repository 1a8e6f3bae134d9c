"""`graft tune`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.table import Table

from finetune.settings import FinetuneSettings
from ingest.errors import InvalidError, SettingsError
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
    listed: Annotated[bool, typer.Option("--list", help="List the recipes.")] = False,
) -> None:
    """Trains by a recipe. A run that was ended goes on when the same command is given again."""
    if listed:
        _list()
        return
    chosen, factory_out = _recipe(recipe, settings or (), llamafactory, ignore_unknown)
    chosen = _with(chosen, data, eval_data, base or chosen.model.base or service_settings(None).model)
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

    settings, ingest = _settings(), ingest_settings()
    refuse_unknown(recipe)
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


def _with(recipe: "Recipe", data: Path | None, eval_data: Path | None, base: str) -> "Recipe":
    given = {name: path for name, path in (("data", data), ("eval_data", eval_data)) if path is not None}
    rows, model = recipe.data.model_copy(update=given), recipe.model.model_copy(update={"base": base})
    return recipe.model_copy(update={"data": rows, "model": model})


def _report(recipe: "Recipe", data: "Split", base: Path, share: float) -> None:
    """What the rows are like, and the memory that the run will take. Raises UnavailableError where it is not free."""
    from finetune.hardware import free_memory
    from finetune.memory import MAX_LENGTH, check_fits, estimate
    from finetune.row_report import report, show
    from ingest.model_files import read_tokenizer
    from service.base_model import chat_template

    most = recipe.whole("max_length", MAX_LENGTH)
    show(report(data.learn, data.held_out, read_tokenizer(base), most, chat_template(base)))
    estimated = estimate(recipe, base, data.learn)
    out.print(escape(str(estimated)))
    check_fits(estimated, free_memory(), share, recipe)


def _list() -> None:
    from finetune.recipe import about, recipes

    table = Table("recipe", "what it does", box=None)
    for name in recipes():
        table.add_row(name, escape(about(name)))
    out.print(table)


def _settings() -> FinetuneSettings:
    try:
        return FinetuneSettings()
    except ValidationError as error:
        said = "; ".join(f"FINETUNE_{str(one['loc'][0]).upper()}: {one['msg']}" for one in error.errors())
        raise SettingsError(f"a setting does not fit: {said}; docs/settings.md lists them") from error
