"""`graft eval sweep`, `weights`, `calibrate` and `probe`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from eval.cli_retrieval import check_writable, ended_by_signal, progress
from ingest.errors import InvalidError
from service.cli_options import JsonOption, connected, ingest_settings
from service.show import err, escape, write_json

if TYPE_CHECKING:
    from eval.calibrate import Rule

CollectionChoice = Annotated[
    str | None, typer.Option("--collection", "-c", help="Use this one as it is; ingest nothing.")
]
QueriesOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help='A JSONL of {"question", "relevant"}, whose paths are of the collection.'),
]
SplitOption = Annotated[str | None, typer.Option(help="Of a BEIR folder with several.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use so many of the questions.")]
SeedOption = Annotated[int, typer.Option(help="Of samples, folds, and the search.")]
ApplyOption = Annotated[bool, typer.Option("--apply", help="Set it on the collection.")]


def sweep(
    dataset: Annotated[Path, typer.Argument(help="A data set, as for `graft eval retrieval`.")],
    space: Annotated[
        list[str],
        typer.Option(
            "--space",
            metavar="KEY=VALUES|FILE",
            help="As tokens=64..256:32, dense_weight=0..1.0, strategy=sentence,token; or a TOML file; may be repeated.",
        ),
    ],
    trials: Annotated[
        int, typer.Option(min=1, help="Settings that are tried, earlier ones of the study counted.")
    ] = 30,
    sampler: Annotated[
        str, typer.Option(metavar="tpe|grid|random|gp|nsga2|cmaes|pso", help="How they are chosen.")
    ] = "tpe",
    metric: Annotated[str, typer.Option(help="As ndcg@10; or of answers, as f1, which needs the engine.")] = "ndcg@10",
    holdout: Annotated[float, typer.Option(help="Share of the questions that the search does not see.")] = 0.5,
    split: SplitOption = None,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    collection: CollectionChoice = None,
    name: Annotated[str | None, typer.Option(help="Of the study: the same name goes on where it was.")] = None,
    studies: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: studies below GRAFT_HOME.")] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The best setting, as PUT /collections/{name} takes it.")
    ] = None,
    page: Annotated[Path | None, typer.Option(metavar="FILE.html", help="What mattered, as a page.")] = None,
    to: JsonOption = None,
) -> None:
    """Searches settings of retrieval, and measures the best beside the default on questions held out."""
    from eval.cases import read_dataset
    from eval.retrieval_metrics import MEASURES
    from eval.samplers import read_sampler
    from eval.show_search import print_sweep, say_trial
    from eval.space import parse_space
    from eval.study_page import write_study
    from eval.sweep import Plan
    from eval.sweep import sweep as run

    for file in (to, write, page):
        check_writable(str(file) if file else None)
    storage = studies or ingest_settings().home / "studies"
    plan = Plan(parse_space(space), trials, read_sampler(sampler), metric, holdout, seed, name, storage)
    data = read_dataset(dataset, split, limit, seed)
    with ended_by_signal(), connected(needs_engine=metric not in MEASURES) as client:
        with progress() as tell:
            found = run(client, data, plan, collection, say_trial, tell("documents"), tell("questions"))
        if to:
            write_json(found, to)
        if write:
            write.write_text(json.dumps(found.settings, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        if page:
            write_study(found.study, page, found.metric, {"Data": found.dataset, "Questions": str(found.searched)})
        if to != "-":
            print_sweep(found, storage)


def weights(
    target: Annotated[
        str, typer.Argument(metavar="COLLECTION|DATASET", help="A collection with --queries, or a data set.")
    ],
    queries: QueriesOption = None,
    metric: Annotated[str, typer.Option(help="That is tuned.")] = "ndcg@10",
    folds: Annotated[int, typer.Option(min=2, max=20)] = 5,
    split: SplitOption = None,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    collection: CollectionChoice = None,
    apply: ApplyOption = False,
    to: JsonOption = None,
) -> None:
    """Tunes how dense and BM25 scores are fused, on a collection's own questions, cross-fitted."""
    from eval.cases import read_dataset
    from eval.collection import placed
    from eval.show_search import print_weights
    from eval.weights import tune
    from service.schemas import CollectionSettings

    check_writable(to)
    chosen = collection if queries is None else target
    if apply and chosen is None:
        raise InvalidError("--apply needs a collection that stays: name it with --collection, or before --queries")
    data = read_dataset(target if queries is None else queries, split, limit, seed)
    with ended_by_signal(), connected() as client:
        with (
            progress() as tell,
            placed(client, data, collection=chosen, on_progress=tell("documents")) as place,
        ):
            found = tune(client, place, data.cases, data.name, metric, folds, seed, tell("questions"))
            if apply and found.verdict == "change":
                fused = place.view.retrieval.model_copy(update=found.best.fusion.model_dump())
                client.put_collection(place.view.name, CollectionSettings(retrieval=fused))
        if to:
            write_json(found, to)
        if to != "-":
            print_weights(found, apply)


def calibrate(
    collection: str,
    queries: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help='A JSONL of questions, "answerable": false for what the documents do not say.'
        ),
    ],
    precision: Annotated[
        float | None, typer.Option(min=0, max=1, help="The lowest threshold whose answers are this often answerable.")
    ] = None,
    false_refusals: Annotated[
        float | None, typer.Option(min=0, max=1, help="The highest threshold that refuses at most this share wrongly.")
    ] = None,
    folds: Annotated[int, typer.Option(min=2, max=20)] = 5,
    seed: SeedOption = 0,
    apply: ApplyOption = False,
    to: JsonOption = None,
) -> None:
    """Finds from which score on a collection's questions are answered rather than refused."""
    from eval.calibrate import calibrate as run
    from eval.cases import read_dataset
    from eval.collection import placed
    from eval.show_search import print_calibration
    from service.schemas import CollectionSettings

    check_writable(to)
    rule, data = _rule(precision, false_refusals), read_dataset(queries)
    with ended_by_signal(), connected() as client:
        with placed(client, data, collection=collection) as place, progress() as tell:
            found = run(client, place, data.cases, rule, folds, seed, tell("questions"))
        if to:
            write_json(found, to)
        if to != "-":
            print_calibration(found, apply)
        if apply:
            if found.threshold is None:
                raise InvalidError(f"no threshold is set on {collection!r}: {found.why_not}")
            client.put_collection(collection, CollectionSettings(threshold=found.threshold))


def probe(
    features: Annotated[
        list[str],
        typer.Option("--features", metavar="embedder:NAME|hidden:FOLDER:LAYER", help="May be repeated, to compare."),
    ],
    data: Annotated[Path, typer.Option(metavar="FILE", help='A JSONL of {"text", "label"}, maybe with "group".')],
    task: Annotated[str | None, typer.Option(metavar="classify|regress", help="Left out: by the labels.")] = None,
    folds: Annotated[int, typer.Option(min=2, max=20)] = 5,
    regularisation: Annotated[float, typer.Option(min=1e-6, help="Of the head: 1/C, or the ridge's alpha.")] = 1.0,
    seed: SeedOption = 0,
    to: JsonOption = None,
) -> None:
    """Learns a labelled set from frozen features: how good are they, before anybody reindexes?"""
    from eval.probe import probe as run
    from eval.show_search import print_probes

    check_writable(to)
    found = run(
        data,
        features,
        ingest_settings(),
        _task(task),
        folds,
        regularisation,
        seed,
        lambda source: err.print(f"[dim]{escape(source)}[/]"),
    )
    if to:
        write_json(found, to)
    if to != "-":
        print_probes(found)


def _task(given: str | None) -> Literal["classify", "regress"] | None:
    match given:
        case None | "classify" | "regress":
            return given
    raise InvalidError(f"--task {given!r} is neither classify nor regress")


def _rule(precision: float | None, false_refusals: float | None) -> "Rule":
    from eval.calibrate import BALANCED, Rule

    if precision is not None and false_refusals is not None:
        raise InvalidError("--precision and --false-refusals are two rules; give one")
    if precision is not None:
        return Rule("precision", precision)
    return BALANCED if false_refusals is None else Rule("false_refusals", false_refusals)
