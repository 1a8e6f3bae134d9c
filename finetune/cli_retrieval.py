"""`graft tune` for what finds passages: embedder, reranker and query-adapter, and what becomes of the result."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import runs
from finetune.settings import FinetuneSettings
from ingest.errors import GraftError, InvalidError, SettingsError
from ingest.schemas import Chunking
from ingest.settings import IngestSettings
from service.cli_options import connected, ingest_settings, service_settings
from service.show import escape, follow, out, write_json

if TYPE_CHECKING:
    from eval.flip import Verdict
    from eval.schemas import DataSet
    from finetune.retrieval_recipe import RetrievalRecipe
    from finetune.retrieval_rows import Asked
    from finetune.retrieval_run import RetrievalManifest
    from service.client import Client


def tune_retrieval(
    recipe_name: str,
    *,
    settings: Sequence[str],
    data: Path | None,
    split: str | None,
    collection: str | None,
    apply: bool,
    to_folder: Path | None,
    base: str | None,
    to: str | None,
    restart: bool,
    finetune: FinetuneSettings,
) -> None:
    """Raises GraftError."""
    from finetune.retrieval_recipe import read_retrieval_recipe
    from finetune.retrieval_rows import read_asked

    recipe = read_retrieval_recipe(recipe_name, settings)
    if data is None:
        raise InvalidError(f"recipe {recipe.name!r} names no questions: give them with --data FILE")
    asked = read_asked(data, split, recipe.data.max_rows, recipe.seed)
    _refuse_early(recipe, collection, apply, asked)
    ingest = ingest_settings()
    base = base or recipe.model.base
    about, embedder, chunking = asked, ingest.embedder, Chunking()
    if collection is not None:
        with connected() as client:
            view = client.collection(collection)
            embedder, chunking = view.embedder, view.chunking
            if not asked.dataset.documents:
                about = _about(client, collection, asked)
    if recipe.method != "reranker" and base is not None:
        if collection is not None and base != embedder and recipe.method == "query-adapter":
            raise InvalidError(f"collection {collection!r} is embedded with {embedder!r}: leave --base {base!r} away")
        embedder = base
    reranker = (base or service_settings(None).reranker) if recipe.method == "reranker" else None
    manifest, folder = _tuned(recipe, about, embedder, reranker, chunking, to_folder, ingest, finetune, restart)
    if to and not apply:
        write_json(manifest, to)
    if to != "-":
        _print(manifest, folder)
    if apply and collection is not None:
        kept = {case.id: case for case in asked.dataset.cases}
        measured = asked.dataset.model_copy(update={"cases": tuple(kept[one] for one in manifest.held_out)})
        verdict = _applied(recipe, collection, folder, measured, ingest)
        if to:
            write_json(verdict, to)
    elif to != "-":
        out.print(f"  next: {escape(_next(recipe, folder, collection))}", soft_wrap=True)


def _refuse_early(recipe: "RetrievalRecipe", collection: str | None, apply: bool, asked: "Asked") -> None:
    if recipe.method != "query-adapter":
        from finetune.retrieval_trainer import require_sentence_transformers

        require_sentence_transformers()
    if not apply:
        return
    if recipe.method == "reranker":
        raise InvalidError(
            "a reranker is the service's, not a collection's: leave --apply away, and set SERVICE_RERANKER to its folder"
        )
    if collection is None:
        raise InvalidError("--apply changes a collection: name it with --collection NAME")
    if asked.is_pairs:
        raise InvalidError(
            "pairs of texts say nothing of a collection's documents, so --apply has nothing to measure with: give "
            '{"question", "relevant": ["PATH"]} in each line, or leave --apply away'
        )


def _tuned(
    recipe: "RetrievalRecipe",
    asked: "Asked",
    embedder: str,
    reranker: str | None,
    chunking: Chunking,
    to_folder: Path | None,
    ingest: IngestSettings,
    finetune: FinetuneSettings,
    restart: bool,
) -> tuple["RetrievalManifest", Path]:
    """-> what was made, and where; a run that is finished already is not done again."""
    from finetune.hooks import Hooks
    from finetune.retrieval_run import identity, is_finished, read_retrieval_manifest, ready
    from finetune.show_training import shown
    from ingest.query_adapter import FOLDER

    wanted = identity(recipe, asked.digest, reranker or embedder, chunking)
    where = ingest.home / FOLDER if recipe.method == "query-adapter" else finetune.folder or ingest.home / "runs"
    target = to_folder or where / f"{recipe.name}-{runs.digest_of_identity(wanted)[:8]}"
    if is_finished(target, wanted) and not restart:
        return read_retrieval_manifest(target), target
    with runs.claimed(target), shown() as show, _advised():
        resume = runs.begin_as(target, wanted, restart) is not None
        run = ready(recipe, asked, embedder, chunking, target, ingest, finetune, Hooks(progress=show))
        if recipe.method == "query-adapter":
            from finetune.tune_query_adapter import tune_query_adapter

            manifest = tune_query_adapter(run)
        elif recipe.method == "embedder":
            from finetune.embedder import tune_embedder

            manifest = tune_embedder(run, resume)
        else:
            from finetune.reranker import tune_reranker

            manifest = tune_reranker(run, reranker or "", resume)
        runs.finish(target, manifest)
    return manifest, target


def _about(client: "Client", collection: str, asked: "Asked") -> "Asked":
    """The questions with the kept texts of the collection's documents."""
    from eval.collection import documents_of
    from finetune.retrieval_rows import with_documents

    listed = [one for one in documents_of(client, collection) if one.chunks]
    return with_documents(asked, {one.path: client.document_text(one.id) for one in listed})


def _applied(
    recipe: "RetrievalRecipe", collection: str, folder: Path, dataset: "DataSet", ingest: IngestSettings
) -> "Verdict":
    from eval.cli_flip import show_verdict
    from eval.cli_retrieval import ended_by_signal, progress
    from eval.flip import adopt_if_better, flip_if_better
    from service.schemas_jobs import ReindexRequest

    with ended_by_signal(), connected() as client:
        if recipe.method == "query-adapter":
            name = in_home(folder, ingest)
            with progress() as tell:
                verdict = adopt_if_better(client, collection, name, dataset, on_progress=tell("questions"))
        else:
            request = ReindexRequest(embedder=str(folder.absolute()), flip=False)
            job = follow(client, client.reindex(collection, request))
            if job.state != "succeeded":
                raise GraftError(
                    f"the new index could not be built: its job ended {job.state}: {job.error or 'see the logs'}"
                )
            built = [one for one in client.indexes(collection) if one.embedder == str(folder.absolute())]
            index = max(built, key=lambda one: one.created_at).fingerprint
            with progress() as tell:
                verdict = flip_if_better(client, collection, index, dataset, on_progress=tell("questions"))
    show_verdict(verdict, None)
    if verdict.made:
        back = f"graft collections query-adapter {collection} none"
        if recipe.method == "embedder":
            back = f"graft collections indexes {collection}, then graft collections activate {collection} INDEX"
        out.print(f"  the way back: {escape(back)}", soft_wrap=True)
    return verdict


def in_home(folder: Path, ingest: IngestSettings) -> str:
    """-> the name under which the service finds a query adapter: it is copied below GRAFT_HOME unless it lies there. Raises
    InvalidError for a name that is taken by another, or does not fit.
    """
    from ingest.query_adapter import FILE, FOLDER, NAME

    name, held = folder.absolute().name, ingest.home / FOLDER
    if not NAME.fullmatch(name):
        raise InvalidError(
            f"folder {name!r} is no name of a query adapter: rename it to lower-case letters, digits, '.', '_' and '-'"
        )
    if folder.absolute().parent == held.absolute():
        return name
    if (held / name / FILE).is_file() and (held / name / FILE).read_bytes() != (folder / FILE).read_bytes():
        raise InvalidError(f"there is another query adapter {name!r} in {str(held)!r}: give this one another --out DIR")
    (held / name).mkdir(parents=True, exist_ok=True)
    for file in (FILE, runs.MANIFEST):
        shutil.copy(folder / file, held / name / file)
    return name


def _print(manifest: "RetrievalManifest", folder: Path) -> None:
    from service.show import clock

    learned = f"{manifest.questions} questions learned, {manifest.stopping} to stop by, {manifest.passages} passages"
    out.print(f"{manifest.method}: {learned}, {clock(manifest.seconds)}", soft_wrap=True)
    for name, found in manifest.scores.items():
        change = f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}], p {found.p:.4f}"
        means = f"{found.metric} {found.before:.3f} -> {found.after:.3f} ({change})"
        out.print(f"  {found.cases} held-out questions, {name}: {means}", highlight=False, soft_wrap=True)
    if manifest.metrics.get("is_identity"):
        out.print("  [yellow]note:[/] no map was better than none on the stopping questions, so it is the identity")
    if manifest.exported:
        made = manifest.exported
        out.print(
            f"  ONNX beside torch: {made.measure} differs by {made.most_difference:.1e} at most over {made.texts} texts"
        )
    out.print(f"  in {escape(str(folder))}", soft_wrap=True)


def _next(recipe: "RetrievalRecipe", folder: Path, collection: str | None) -> str:
    name = collection or "COLLECTION"
    if recipe.method == "query-adapter":
        return f"the same command with --collection {name} --apply, or graft collections query-adapter {name} {folder.name}"
    if recipe.method == "embedder":
        return (
            f"the same command with --collection {name} --apply, or graft reindex {name} --embedder {folder.absolute()}"
        )
    return f"SERVICE_RERANKER={folder.absolute()} graft up"


@contextmanager
def _advised() -> Iterator[None]:
    """Out of memory ends with what helps. Raises SettingsError."""
    from finetune.train import NO_MEMORY

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(said in str(error) for said in NO_MEMORY):
            raise
        raise SettingsError(
            "out of memory: --set per_device_train_batch_size=4 (with gradient_accumulation_steps=4 for the same step), fewer "
            "mining.negatives, or a smaller base"
        ) from error
