"""`graft sweep`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli_options import finetune_settings, with_rows
from service.cli_options import JsonOption, ingest_settings, service_settings
from service.show import escape, out, write_json

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
    metric: Annotated[str, typer.Option(help="Of the held-out rows; of a loss, less is better.")] = "eval_loss",
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
    from finetune.recipe import read_recipe
    from finetune.sweep import Plan
    from finetune.sweep import sweep as run
    from finetune.train import require_stack

    for file in (to, write, page):
        check_writable(str(file) if file else None)
    chosen = read_recipe(recipe, settings or ())
    chosen = with_rows(chosen, data, eval_data, base or chosen.model.base or service_settings(None).model)
    ingest = ingest_settings()
    where = storage if storage is None or "://" in storage else Path(storage)
    plan = Plan(
        chosen, parse_space(space), ingest.home / "studies", trials, read_sampler(sampler), metric, folds, prune, seed,
        study, where, workers,
    )  # fmt: skip
    require_stack()
    with ended_by_signal():
        swept = run(plan, finetune_settings(), ingest.models, ingest.home, say_trial)
    _leave(swept, write, page)
    if to:
        write_json(swept, to)
    if to != "-":
        _print(swept, write, page)


def _leave(swept: "Swept", write: Path | None, page: Path | None) -> None:
    from eval.study_page import write_study
    from finetune.sweep import best_recipe

    if page:
        facts = {"Rows": swept.rows, "Value": swept.metric, "Folds": str(swept.folds or "none")}
        write_study(swept.study, page, swept.metric, facts)
    if write:
        write.write_text(best_recipe(swept), encoding="utf-8")


def _print(swept: "Swept", write: Path | None, page: Path | None) -> None:
    from eval.show_search import print_trials

    study = swept.study
    out.print(f"study {escape(study.name)}: {len(study.trials)} trials ({study.sampler})")
    print_trials(study, swept.metric)
    if study.best is None:
        out.print("no trial has a value")
        return
    if swept.weights:
        out.print(f"  the best one's weights are in {escape(str(swept.weights))}", soft_wrap=True)
    if page:
        out.print(f"  page: {escape(str(page))}", soft_wrap=True)
    if write:
        out.print(f"  next: graft tune {escape(str(write))}", soft_wrap=True)
