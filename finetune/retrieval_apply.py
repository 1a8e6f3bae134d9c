"""A collection takes what was tuned for it, if its held-out questions find better; and what that needs, looked for beforehand."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import runs
from ingest.errors import GraftError, InvalidError
from ingest.settings import IngestSettings
from service.cli_options import connected
from service.show import escape, follow, out

if TYPE_CHECKING:
    from eval.schemas import DataSet
    from finetune.retrieval_recipe import RetrievalRecipe
    from finetune.retrieval_rows import Asked
    from service.client import Client


def check_measurable(client: "Client", collection: str, asked: "Asked", recipe: "RetrievalRecipe") -> None:
    """What --apply will need at the end is looked for before anything is learned."""
    from eval.collection import placed
    from eval.flip import FEWEST
    from finetune.retrieval_rows import split_asked

    if asked.is_pairs:
        raise InvalidError(
            "pairs of texts say nothing of a collection's documents, so --apply has nothing to measure with: give "
            '{"question", "relevant": ["PATH"]} in each line, or leave --apply away'
        )
    held_out = len(split_asked(asked.dataset.cases, recipe.data.held_out, recipe.data.stop, recipe.seed).held_out)
    if held_out < FEWEST:
        raise InvalidError(
            f"--apply decides by at least {FEWEST} held-out questions, and {held_out} of {len(asked.dataset.cases)} are held "
            "out: give more questions, or a larger share with --set held_out=0.4"
        )
    with placed(client, asked.dataset, collection=collection):
        pass  # the collection has the documents that the questions name


def apply_to(
    recipe: "RetrievalRecipe",
    collection: str,
    folder: Path,
    dataset: "DataSet",
    ingest: IngestSettings,
    to: str | None,
) -> None:
    """Measures both ways through the service, makes the change where it finds better, and shows the verdict. `dataset`: the
    held-out questions. Raises GraftError.
    """
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
            if not built:
                raise GraftError(f"the index that was built with {str(folder)!r} is gone; give the same command again")
            index = max(built, key=lambda one: one.created_at).fingerprint
            with progress() as tell:
                verdict = flip_if_better(client, collection, index, dataset, on_progress=tell("questions"))
    show_verdict(verdict, to)
    if verdict.made and to != "-":
        back = f"graft collections query-adapter {collection} none"
        if recipe.method == "embedder":
            back = f"graft collections indexes {collection}, then graft collections activate {collection} INDEX"
        out.print(f"  the way back: {escape(back)}", soft_wrap=True)


def check_name(folder: Path) -> str:
    """-> the name of a query adapter, which is its folder's. Raises InvalidError."""
    from ingest.query_adapter import NAME

    name = folder.absolute().name
    if not NAME.fullmatch(name):
        raise InvalidError(
            f"{name!r} is no name of a query adapter: lower-case letters, digits, '.', '_' and '-' make one; name its folder so "
            "with --out DIR"
        )
    return name


def in_home(folder: Path, ingest: IngestSettings) -> str:
    """-> the name under which the service finds a query adapter: it is copied below GRAFT_HOME unless it lies there. Raises
    InvalidError for a name that is taken by another, or does not fit.
    """
    from ingest.query_adapter import FILE, FOLDER

    name, held = check_name(folder), ingest.home / FOLDER
    if folder.absolute().parent == held.absolute():
        return name
    if (held / name).is_dir() and any((held / name).iterdir()) and not _same(folder / FILE, held / name / FILE):
        raise InvalidError(f"there is another query adapter {name!r} in {str(held)!r}: give this one another --out DIR")
    (held / name).mkdir(parents=True, exist_ok=True)
    for file in (FILE, runs.MANIFEST):
        unfinished = held / name / f".{file}"
        shutil.copy(folder / file, unfinished)
        unfinished.replace(held / name / file)
    return name


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()
