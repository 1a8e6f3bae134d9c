"""One run of a retrieval model, from questions to a folder: what an embedder, a reranker and a query adapter share.

The folder is as that of any run: `run.json` from the start, checkpoints while it trains, `manifest.json` last. What is measured
at the end are the held-out questions, which nothing has learned from and nothing was stopped by.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from eval.resample import compared
from eval.schemas import Case, Difference
from finetune import hardware, runs
from finetune.hooks import Hooks
from finetune.passages import METRIC, Passages, passages_of, vectors_of
from finetune.retrieval_recipe import RetrievalMethod, RetrievalRecipe
from finetune.retrieval_rows import Asked, Sides, split_asked
from finetune.settings import FinetuneSettings
from ingest.catalog import now
from ingest.embed import Embedder, Vectors, index_fingerprint, load_counter, load_embedder
from ingest.errors import InvalidError, NotFoundError
from ingest.model_files import find_model, onnx_file
from ingest.schemas import Chunking, Frozen
from ingest.settings import IngestSettings
from service.tuning import TuneProgress

SERVERS = ("http://", "https://")
LIBRARIES = ("numpy", "scipy", "torch", "transformers", "sentence-transformers", "onnxruntime")


class Exported(Frozen):
    """What the CPU runtime gives beside what was trained: cosines of vectors, or a reranker's probabilities."""

    measure: Literal["cosine", "probability"]
    texts: int
    mean_difference: float
    most_difference: float
    bound: float


class RetrievalManifest(Frozen):
    """Written last. `held_out`: ids of the questions that measured; `scores`: of them, before and after, by what was searched."""

    made_by: Literal["graft"] = "graft"
    version: int = 1
    created_at: datetime
    recipe: dict[str, Any]
    method: RetrievalMethod
    seed: int
    data: str
    data_digest: str
    questions: int  # learned from
    stopping: int
    held_out: tuple[str, ...]
    documents: int
    passages: int
    base: str
    base_fingerprint: str
    scores: dict[str, Difference]
    metrics: dict[str, float]
    exported: Exported | None = None
    versions: dict[str, str]
    hardware: dict[str, Any]
    seconds: float
    peak_memory_bytes: int


class Ready(NamedTuple):
    """All that is settled before anything learns. `embedder`: as it is now."""

    recipe: RetrievalRecipe
    asked: Asked
    sides: Sides
    embedder: Embedder
    chunking: Chunking
    out: Path
    ingest: IngestSettings
    settings: FinetuneSettings
    hooks: Hooks


class Searchable(NamedTuple):
    """`questions`: by case id."""

    passages: Passages
    vectors: Vectors
    questions: Mapping[str, Any]

    def of(self, cases: Sequence[Case]) -> Vectors:
        """(cases, dimension)"""
        found = [self.questions[case.id] for case in cases]
        return np.stack(found) if found else np.zeros((0, self.vectors.shape[1]), np.float32)


def ready(
    recipe: RetrievalRecipe,
    asked: Asked,
    embedder: str,
    chunking: Chunking,
    out: Path,
    ingest: IngestSettings,
    settings: FinetuneSettings,
    hooks: Hooks,
) -> Ready:
    """Raises InvalidError, SettingsError."""
    if not asked.dataset.documents:
        raise InvalidError(
            f"{asked.dataset.name!r} has questions alone: name the collection that they are about with --collection NAME"
        )
    sides = split_asked(asked.dataset.cases, recipe.data.held_out, recipe.data.stop, recipe.seed)
    loaded = load_embedder(embedder, ingest, threads=settings.threads)
    index_fingerprint(loaded, chunking)  # refuses chunks that are longer than it reads
    return Ready(recipe, asked, sides, loaded, chunking, out, ingest, settings, hooks)


def identity(
    recipe: RetrievalRecipe, digest: str, models: Sequence[str], chunking: Chunking, ingest: IngestSettings
) -> dict[str, Any]:
    """What makes two runs the same. `models`: names of those it takes; what counts are their weights. Raises SettingsError."""
    held = recipe.model_dump(mode="json", exclude={"name": True, "model": {"base"}})
    base = [one if one.startswith(SERVERS) else weights_digest(find_model(one, ingest)) for one in models]
    return {"recipe": held, "rows": [digest], "base": base, "chunking": chunking.model_dump(mode="json")}


def weights_digest(folder: Path) -> str:
    """SHA-256 of a model's weights and of what its card says of them."""
    file = onnx_file(folder)
    digest = hashlib.sha256()
    for one in (folder / "graft-model.json", *([file] if file else sorted(folder.glob("*.safetensors")))):
        if one.is_file():
            with one.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def embedded(run: Ready, embedder: Embedder | None = None, held: Passages | None = None) -> Searchable:
    """The passages, or those that are `held` already, and all questions, by `embedder` in place of the one that is there."""
    by = embedder or run.embedder
    passages = held
    if passages is None:
        counter = load_counter(run.embedder.name, run.ingest)
        passages = passages_of(run.asked.dataset.documents, counter, run.chunking)
    if not passages.texts:
        raise InvalidError(f"the documents of {run.asked.dataset.name!r} have no text")
    cases = run.asked.dataset.cases

    def tell(stage: Literal["loading", "checking"]) -> Callable[[int, int], None]:
        def told(done: int, total: int) -> None:
            run.hooks.progress(TuneProgress(stage=stage, step=done, steps=total))

        return told

    stage: Literal["loading", "checking"] = "checking" if embedder else "loading"
    vectors = vectors_of(passages.texts, by, run.ingest, tell=tell(stage))
    questions = vectors_of([case.question for case in cases], by, run.ingest, queries=True, tell=tell(stage))
    return Searchable(passages, vectors, dict(zip((case.id for case in cases), questions, strict=True)))


def difference(cases: Sequence[Case], before: Sequence[float], after: Sequence[float]) -> Difference:
    """nDCG@10, without the names of the cases."""
    found = compared(METRIC, [case.id for case in cases], before, after)
    return found.model_copy(update={"won": (), "lost": ()})


def manifest_of(
    run: Ready,
    passages: int,
    scores: dict[str, Difference],
    metrics: dict[str, float],
    seconds: float,
    base: str | None = None,
    exported: Exported | None = None,
) -> RetrievalManifest:
    """`base`: what was tuned, where that is not the embedder."""
    return RetrievalManifest(
        created_at=now(),
        recipe=run.recipe.model_dump(mode="json"),
        method=run.recipe.method,
        seed=run.recipe.seed,
        data=run.asked.dataset.name,
        data_digest=run.asked.digest,
        questions=len(run.sides.learn),
        stopping=len(run.sides.stop),
        held_out=tuple(case.id for case in run.sides.held_out),
        documents=len(run.asked.dataset.documents),
        passages=passages,
        base=base or run.embedder.name,
        base_fingerprint=run.embedder.fingerprint,
        scores=scores,
        metrics=metrics,
        exported=exported,
        versions=_versions(),
        hardware=hardware.hardware(),
        seconds=round(seconds, 1),
        peak_memory_bytes=hardware.peak_memory(),
    )


def read_retrieval_manifest(out: Path) -> RetrievalManifest:
    """Raises NotFoundError, InvalidError."""
    try:
        return RetrievalManifest.model_validate_json((out / runs.MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFoundError(f"{str(out)!r} is no finished run: it has no {runs.MANIFEST}") from error
    except ValueError as error:
        raise InvalidError(f"{str(out / runs.MANIFEST)!r} is not what `graft tune` writes: {error}") from error


def is_finished(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether this very run lies there, finished."""
    try:
        started = json.loads((out / runs.STARTED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (out / runs.MANIFEST).is_file() and started == json.loads(json.dumps(wanted))


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
