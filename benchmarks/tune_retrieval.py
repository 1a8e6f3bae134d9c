"""A query adapter tuned on SciFact's training questions, and what it does to others: nDCG@10, cross-fitted in five folds.

Each fold is scored by a map that was learned, and whose strength was chosen, on the other four alone; questions that share an
abstract are in one fold. Beside it, folds of questions alone: other claims about the same abstracts are learned from, as where
users ask about documents that others have asked about. XQuAD's English questions, which nothing is tuned on, are scored by all
five maps. All go through the product's own index and fusion, with the default settings and by vectors alone.
"""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.report import Options, Row, at_least, median, say, settings, shown, skipped
from eval.cases import read_dataset
from eval.groups import connected
from eval.resample import compared
from eval.schemas import Case, DataSet, Difference
from finetune.hooks import SILENT
from finetune.passages import METRIC, Searched, searched
from finetune.query_adapter import Learned, learn_from
from finetune.retrieval_recipe import read_retrieval_recipe
from finetune.retrieval_rows import Asked, Sides, split_asked
from finetune.retrieval_run import Ready, Searchable, embedded
from finetune.settings import FinetuneSettings
from ingest.embed import Embedder, Vectors, load_embedder
from ingest.query_adapter import QueryAdapter
from ingest.schemas import Chunking, Retrieval

FOLDS = 5
GAIN, LOSS = 0.03, -0.01
WAYS = {"default": Retrieval(), "vectors alone": Retrieval(dense_weight=1)}


class Set(NamedTuple):
    dataset: DataSet
    found: Searchable


def run(options: Options) -> list[Row]:
    scifact, xquad = options.folder("scifact_train"), options.folder("xquad")
    if scifact is None or xquad is None:
        return [skipped("query adapter", "it needs --data with scifact_train/ and xquad/")]
    configured = settings(options.scratch)
    embedder = load_embedder(configured.embedder, configured)
    tuned_on = read_set(read_dataset(scifact, limit=60 if options.quick else None), embedder, options)
    other = read_set(read_dataset(xquad / "xquad.en.json", limit=60 if options.quick else None), embedder, options)
    cases = tuned_on.dataset.cases
    maps, seconds = _maps(folds_of(cases), tuned_on, embedder)
    shared, _ = _maps(folds_of(cases, apart=False), tuned_on, embedder)
    rows = [
        shown(
            "learned, one fold",
            median(seconds),
            "s",
            f"{len(cases)} questions, {len(tuned_on.found.passages.texts):,} passages",
        )
    ]
    with searched(tuned_on.found.passages, tuned_on.found.vectors, embedder.languages) as search:
        for name, how in WAYS.items():
            found = _cross_fitted(search, cases, tuned_on.found.of(cases), maps, how)
            said = f"{found.before:.4f} -> {found.after:.4f}, {interval(found)}"
            rows.append(at_least(f"SciFact, nDCG@10 beyond untuned, {name}", found.difference, "", GAIN, said))
        for name, how in WAYS.items():
            found = _cross_fitted(search, cases, tuned_on.found.of(cases), shared, how)
            said = f"{found.before:.4f} -> {found.after:.4f}, {interval(found)}"
            rows.append(shown(f"the same, folds of questions alone, {name}", found.difference, "", said))
    held = other.dataset.cases
    with searched(other.found.passages, other.found.vectors, embedder.languages) as search:
        for name, how in WAYS.items():
            asked = other.found.of(held)
            before = search.scores(held, asked, how)
            after = np.mean([search.scores(held, adapter.apply(asked), how) for _, adapter in maps], axis=0)
            found = compared(METRIC, [case.id for case in held], before, after)
            said = f"{found.before:.4f} -> {found.after:.4f}, {interval(found)}; the mean of {FOLDS} maps"
            rows.append(at_least(f"XQuAD English, nDCG@10 beyond untuned, {name}", found.difference, "", LOSS, said))
    return rows


def _maps(
    folds: Sequence[list[int]], tuned_on: Set, embedder: Embedder
) -> tuple[list[tuple[list[int], QueryAdapter]], list[float]]:
    """-> folds with the map of the others, and the seconds that each took to learn."""
    maps, seconds = list[tuple[list[int], QueryAdapter]](), list[float]()
    for number, fold in enumerate(folds, 1):
        started = time.perf_counter()
        others = [case for at, case in enumerate(tuned_on.dataset.cases) if at not in set(fold)]
        made = _learned(others, tuned_on)
        seconds.append(time.perf_counter() - started)
        say(f"fold {number}: penalty {made.penalty}, scale {made.scale:.0f}, {seconds[-1]:.0f} s")
        maps.append((fold, QueryAdapter(made.matrix, embedder.name, embedder.fingerprint)))
    return maps, seconds


def folds_of(cases: Sequence[Case], seed: int = 0, *, apart: bool = True) -> list[list[int]]:
    """-> places. `apart`: questions that share a document are together."""
    groups: list[list[int]] = [[at] for at in range(len(cases))]
    if apart:
        groups = connected([[one for one, grade in case.relevant.items() if grade > 0] for case in cases])
    random.Random(seed).shuffle(groups)
    folds: list[list[int]] = [[] for _ in range(FOLDS)]
    for group in groups:
        min(folds, key=len).extend(group)
    return folds


def read_set(dataset: DataSet, embedder: Embedder, options: Options) -> Set:
    say(f"{dataset.name}: {len(dataset.documents):,} documents")
    recipe = read_retrieval_recipe("query-adapter")
    if options.quick:
        wanted = {one for case in dataset.cases for one in case.relevant}
        dataset = dataset.model_copy(update={"documents": tuple(one for one in dataset.documents if one.id in wanted)})
    nothing = Sides((), (), ())
    ready = Ready(
        recipe,
        Asked(dataset, {}, ""),
        nothing,
        embedder,
        Chunking(),
        Path(),
        settings(options.scratch),
        FinetuneSettings(),
        SILENT,
    )
    return Set(dataset, embedded(ready))


def _learned(cases: Sequence[Case], tuned_on: Set) -> Learned:
    """As `graft tune query-adapter` does, without its held-out part, which the fold is here."""
    recipe = read_retrieval_recipe("query-adapter")
    sides = split_asked(cases, recipe.data.stop, 0.0, recipe.seed)
    return learn_from(
        sides.learn, sides.held_out, tuned_on.found.of, tuned_on.found.passages, tuned_on.found.vectors, recipe.adapter
    )


def _cross_fitted(
    search: Searched,
    cases: Sequence[Case],
    asked: Vectors,
    maps: Sequence[tuple[list[int], QueryAdapter]],
    how: Retrieval,
) -> Difference:
    before = search.scores(cases, asked, how)
    after = np.zeros(len(cases))
    for fold, adapter in maps:
        after[fold] = search.scores([cases[at] for at in fold], adapter.apply(asked[fold]), how)
    return compared(METRIC, [case.id for case in cases], before, after)


def interval(found: Difference) -> str:
    return f"95 % [{found.low:+.3f}, {found.high:+.3f}], p {found.p:.4f}"
