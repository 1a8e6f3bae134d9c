"""`graft tune` for what finds passages: embedder, reranker and query-adapter, and what becomes of the result."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune import runs
from finetune.full_disk import writing
from finetune.retrieval_apply import apply_to, check_measurable, check_name
from finetune.settings import FinetuneSettings
from ingest.errors import InvalidError, SettingsError
from ingest.schemas import Chunking
from ingest.settings import IngestSettings
from service.cli_options import connected, ingest_settings, service_settings
from service.show import escape, out, write_json

if TYPE_CHECKING:
    from finetune.retrieval_recipe import RetrievalRecipe
    from finetune.retrieval_rows import Asked
    from finetune.retrieval_run import RetrievalManifest
    from service.client import Client


class Models(NamedTuple):
    """By name. `embedder`: that is tuned, or that finds the passages. `reranker`: that is tuned."""

    embedder: str
    reranker: str | None


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
    from eval.cli_retrieval import check_writable
    from finetune.retrieval_recipe import read_retrieval_recipe
    from finetune.retrieval_rows import read_asked

    recipe = read_retrieval_recipe(recipe_name, settings)
    if data is None:
        raise InvalidError(f"recipe {recipe.name!r} names no questions: give them with --data FILE")
    check_writable(to)
    _refuse_early(recipe, collection, apply)
    asked = read_asked(data, split, recipe.data.max_rows, recipe.seed)
    ingest = ingest_settings()
    about, models, chunking = _about(recipe, asked, collection, base or recipe.model.base, ingest, apply)
    target, wanted = _target(recipe, about, models, chunking, to_folder, ingest, finetune)
    if apply and recipe.method == "query-adapter":
        check_name(target)
    manifest = _tuned(recipe, about, models, chunking, target, wanted, ingest, finetune, restart)
    if to and not apply:
        write_json(manifest, to)
    if to != "-":
        _print(manifest, target)
    if apply and collection is not None:
        kept = {case.id: case for case in asked.dataset.cases}
        measured = asked.dataset.model_copy(update={"cases": tuple(kept[one] for one in manifest.held_out)})
        apply_to(recipe, collection, target, measured, ingest, to)
    elif to != "-":
        out.print(f"  next: {escape(_next(recipe, target, collection, ingest))}", soft_wrap=True)


def _refuse_early(recipe: "RetrievalRecipe", collection: str | None, apply: bool) -> None:
    if recipe.method != "query-adapter":
        from finetune.retrieval_trainer import refuse_unknown, require_sentence_transformers

        require_sentence_transformers()
        refuse_unknown(recipe)
        if runs.processes() > 1:
            raise InvalidError(f"{recipe.method} trains in one process: start it without a launcher")
    if not apply:
        return
    if recipe.method == "reranker":
        raise InvalidError(
            "a reranker is the service's, not a collection's: leave --apply away, and set SERVICE_RERANKER to its folder"
        )
    if collection is None:
        raise InvalidError("--apply changes a collection: name it with --collection NAME")


def _about(
    recipe: "RetrievalRecipe",
    asked: "Asked",
    collection: str | None,
    base: str | None,
    ingest: IngestSettings,
    apply: bool,
) -> tuple["Asked", Models, Chunking]:
    """-> the questions with the documents that they are about, the models that are taken, and how the documents are cut."""
    about, embedder, chunking = asked, ingest.embedder, Chunking()
    if collection is not None:
        with connected() as client:
            view = client.collection(collection)
            embedder, chunking = view.embedder, view.chunking
            if apply:
                check_measurable(client, collection, asked, recipe)
            if not asked.dataset.documents:
                about = _with_documents(client, collection, asked)
    if recipe.method == "reranker":
        return about, Models(embedder, base or service_settings(None).reranker), chunking
    if recipe.method == "query-adapter" and collection is not None and base not in {None, embedder}:
        raise InvalidError(f"collection {collection!r} is embedded with {embedder!r}: leave --base {base!r} away")
    chosen = base or embedder
    if recipe.method == "embedder" and chosen.startswith(("http://", "https://")):
        raise InvalidError(
            f"embedder {chosen!r} is a server's, and its weights are not at hand: name the folder of a model with --base"
        )
    return about, Models(chosen, None), chunking


def _target(
    recipe: "RetrievalRecipe",
    asked: "Asked",
    models: Models,
    chunking: Chunking,
    to_folder: Path | None,
    ingest: IngestSettings,
    finetune: FinetuneSettings,
) -> tuple[Path, dict[str, Any]]:
    """-> the run's folder, and what tells it from others."""
    from finetune.retrieval_run import identity
    from ingest.query_adapter import FOLDER

    wanted = identity(recipe, asked.digest, [one for one in models if one is not None], chunking, ingest)
    where = ingest.home / FOLDER if recipe.method == "query-adapter" else finetune.folder or ingest.home / "runs"
    return to_folder or where / f"{recipe.name}-{runs.digest_of_identity(wanted)[:8]}", wanted


def _tuned(
    recipe: "RetrievalRecipe",
    asked: "Asked",
    models: Models,
    chunking: Chunking,
    target: Path,
    wanted: dict[str, Any],
    ingest: IngestSettings,
    finetune: FinetuneSettings,
    restart: bool,
) -> "RetrievalManifest":
    """-> what was made; a run that is finished already is not done again."""
    from finetune.hooks import Hooks
    from finetune.retrieval_run import is_finished, read_retrieval_manifest, ready
    from finetune.show_training import shown

    if is_finished(target, wanted) and not restart:
        return read_retrieval_manifest(target)
    with runs.claimed(target), shown() as show, writing(target), _advised():
        resume = runs.begin_as(target, wanted, restart) is not None
        run = ready(recipe, asked, models.embedder, chunking, target, ingest, finetune, Hooks(progress=show))
        if recipe.method == "query-adapter":
            from finetune.tune_query_adapter import tune_query_adapter

            manifest = tune_query_adapter(run)
        elif recipe.method == "embedder":
            from finetune.embedder import tune_embedder

            manifest = tune_embedder(run, resume)
        else:
            from finetune.reranker import tune_reranker

            manifest = tune_reranker(run, models.reranker or "", resume)
        runs.finish(target, manifest)
    return manifest


def _with_documents(client: "Client", collection: str, asked: "Asked") -> "Asked":
    """The questions with the kept texts of the collection's documents."""
    from eval.collection import documents_of
    from finetune.retrieval_rows import with_documents

    listed = [one for one in documents_of(client, collection) if one.chunks]
    return with_documents(asked, {one.path: client.document_text(one.id) for one in listed})


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


def _next(recipe: "RetrievalRecipe", folder: Path, collection: str | None, ingest: IngestSettings) -> str:
    from ingest.query_adapter import FOLDER

    name = collection or "COLLECTION"
    measured = f"the same command with --collection {name} --apply, which measures first"
    if recipe.method == "query-adapter":
        is_found = folder.absolute().parent == (ingest.home / FOLDER).absolute()
        return f"{measured}, or graft collections query-adapter {name} {folder.name}" if is_found else measured
    if recipe.method == "embedder":
        return f"{measured}, or graft reindex {name} --embedder {folder.absolute()}"
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
