"""`graft sweep`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli_options import finetune_settings, with_rows
from finetune.retrieval_recipe import is_retrieval
from ingest.errors import InvalidError
from ingest.files import write_whole
from service.cli_options import JsonOption, ingest_settings, service_settings
from service.show import err, escape, out, write_json

if TYPE_CHECKING:
    from finetune.sweep import Swept


def sweep(
    recipe: Annotated[str, typer.Argument(help="One of the product's recipes (`graft tune --list`), or a .toml file.")],
    space: Annotated[
        list[str],
        typer.Option(
            "--space",
            metavar="KEY=VALUES|FILE",
            help="As learning_rate=1e-5..1e-3:log, r=8,16,32, num_train_epochs=1..4; or a TOML file; may be repeated.",
        ),
    ],
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="Rows to train on.")] = None,
    eval_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Held-out rows; left out, a share of the rows.")
    ] = None,
    sampler: Annotated[
        str, typer.Option(metavar="tpe|grid|random|gp|nsga2|cmaes|pso", help="How settings are chosen.")
    ] = "tpe",
    trials: Annotated[
        int, typer.Option(min=1, help="Settings that are tried, earlier ones of the study counted.")
    ] = 20,
    folds: Annotated[
        int, typer.Option(min=0, max=20, help="Train each setting so often, each row held out once; 0: once.")
    ] = 0,
    metric: Annotated[
        str | None, typer.Option(help="Of the held-out rows; of a loss, less is better. Default: the loss, or reward.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Of the recipe, for all trials; may be repeated."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="DIR|NAME", help="The model to start from; left out, the one that is served.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL|FILE", help="Where the study lies, as postgresql://...; default: below GRAFT_HOME."),
    ] = None,
    study: Annotated[str | None, typer.Option(metavar="NAME", help="The same name goes on where it was.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Trials at a time, here.")] = 1,
    prune: Annotated[
        bool, typer.Option("--prune", help="Give up trials that are worse than most at the same point.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the search and of the folds.")] = 0,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="The best setting, as a recipe for `graft tune`.")
    ] = None,
    page: Annotated[Path | None, typer.Option(metavar="FILE.html", help="What mattered, as a page.")] = None,
    to: JsonOption = None,
) -> None:
    """Searches settings of a recipe: each trial trains, and is judged by what is held out."""
    from eval.cli_retrieval import check_writable, ended_by_signal
    from eval.samplers import read_sampler
    from eval.show_search import say_trial
    from eval.space import parse_space
    from eval.study_storage import storage_of
    from finetune.recipe import read_recipe
    from finetune.sweep import METRIC, Plan, best_recipe
    from finetune.sweep import sweep as run
    from finetune.train import require_stack

    for file in (to, write, page):
        check_writable(str(file) if file else None)
    if is_retrieval(recipe):
        raise InvalidError(
            f"recipe {recipe!r} trains what finds passages, which is not searched: give one of an answerer"
        )
    chosen = read_recipe(recipe, settings or ())
    chosen = with_rows(chosen, data, eval_data, base or chosen.model.base or service_settings(None).model)
    ingest = ingest_settings()
    plan = Plan(
        chosen,
        parse_space(space),
        ingest.home / "studies",
        trials,
        read_sampler(sampler),
        metric or METRIC.get(chosen.method, "eval_loss"),
        folds,
        prune,
        seed,
        study,
        storage_of(storage) if storage else None,
        workers,
    )
    require_stack()
    try:
        with ended_by_signal():
            swept = run(plan, finetune_settings(), ingest.models, ingest.home, say_trial)
    except (KeyboardInterrupt, SystemExit):
        err.print("ended: what was tried is kept, and the same command goes on")
        raise
    _write_page(swept, page)
    if to:
        write_json(swept, to)
    if to != "-":
        _print(swept, page)
    best = best_recipe(swept)
    if write:
        _write(best, write)
        if to != "-":
            out.print(f"  next: graft tune {escape(str(write))}", soft_wrap=True)


def _write(recipe: str, file: Path) -> None:
    """Raises InvalidError."""
    try:
        write_whole(file, recipe)
    except (OSError, ValueError) as error:
        raise InvalidError(f"{str(file)!r} cannot be written: {error}; name another file with --write") from error


def _write_page(swept: "Swept", page: Path | None) -> None:
    from eval.study_page import write_study

    if page:
        write_study(swept.study, page, swept.metric, {"Rows": swept.rows, "Folds": str(swept.folds or "none")})


def _print(swept: "Swept", page: Path | None) -> None:
    from eval.show_search import print_trials

    study = swept.study
    out.print(f"study {escape(study.name)}: {len(study.trials)} trials ({study.sampler})")
    print_trials(study, swept.metric)
    if swept.weights:
        out.print(f"  the best one's weights are in {escape(str(swept.weights))}", soft_wrap=True)
    if page:
        out.print(f"  page: {escape(str(page))}", soft_wrap=True)
