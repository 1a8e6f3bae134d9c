"""A data set as a collection of the service: documents in under names that lead back to their ids, and out again at the end."""

import hashlib
import json
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from eval.case_rows import LISTED, reason
from eval.schemas import DataSet, Document
from ingest.errors import ConflictError, GraftError, InvalidError, NotFoundError
from ingest.schemas import Chunking, Frozen, Retrieval
from service.client import ENDED, Client
from service.schemas import CollectionSettings, CollectionView, DocumentView
from service.schemas_jobs import Job

Kind = TypeVar("Kind", bound=BaseModel)
Made = TypeVar("Made")
BATCH = 500  # documents of one upload, and
BATCH_CHARS = 32_000_000  # characters
PAGE = 10_000  # documents of one listing
REMOVE_SECONDS = 60  # for a cancelled job to stop
Told = Callable[[int, int], None]  # documents done, of how many


class Tried(Frozen):
    """Settings of a run in place of a collection's: fields of `Retrieval` and of `Chunking`."""

    retrieval: dict[str, Any] = {}
    chunking: dict[str, Any] = {}
    embedder: str | None = None


class Placed(NamedTuple):
    """Where a data set's documents are. `ids`: by path, the data set's own; none where it names paths itself.

    `retrieval`: for each request in place of the collection's settings. `left_out`: by id, why a document could not be
    taken in. `other_index`: of the collection, that is asked in place of the live one.
    """

    view: CollectionView
    ids: Mapping[str, str]
    retrieval: Retrieval | None
    left_out: Mapping[str, str]
    other_index: str | None = None

    def document(self, path: str) -> str:
        return self.ids.get(path, path)

    def settings(self) -> dict[str, Any]:
        """Of the collection, as the run's `configuration` has them."""
        return {
            "collection": self.view.name,
            "embedder": self.view.embedder,
            "chunking": self.view.chunking.model_dump(),
            "retrieval": (self.retrieval or self.view.retrieval).model_dump(),
            "fingerprint": self.view.fingerprint,
            "documents": self.view.documents,
            "chunks": self.view.chunks,
        }


def parse_settings(pairs: Sequence[str]) -> Tried:
    """`dense_weight=.5`, `chunking.tokens=128`, `embedder=NAME`. Raises InvalidError."""
    retrieval: dict[str, Any] = {}
    chunking: dict[str, Any] = {}
    embedder = None
    for pair in pairs:
        key, mark, text = pair.partition("=")
        name = key.strip().removeprefix("retrieval.")
        if not mark:
            raise InvalidError(f"--set {pair!r} is not KEY=VALUE")
        if name == "embedder":
            embedder = text
        elif name in Retrieval.model_fields:
            retrieval[name] = _value(text)
        elif name.removeprefix("chunking.") in Chunking.model_fields and name.startswith("chunking."):
            chunking[name.removeprefix("chunking.")] = _value(text)
        else:
            known = [*Retrieval.model_fields, *(f"chunking.{one}" for one in Chunking.model_fields), "embedder"]
            raise InvalidError(f"--set knows no {key!r}; there are {', '.join(known)}")
    _fitting(Retrieval, retrieval)
    _fitting(Chunking, chunking)
    return Tried(retrieval=retrieval, chunking=chunking, embedder=embedder)


@contextmanager
def placed(
    client: Client,
    dataset: DataSet,
    *,
    collection: str | None = None,
    keep: bool = False,
    tried: Tried | None = None,
    on_progress: Told = lambda *_: None,
) -> Iterator[Placed]:
    """A new collection, which is gone again at the end, however that comes; or `collection` as it is. `keep`: a new one stays
    once all documents are in it. Raises InvalidError when `collection` does not fit the data set, and what the service says.
    """
    tried = tried or Tried()
    if collection is not None:
        yield _existing(client, dataset, collection, tried)
        return
    if not dataset.documents:
        raise InvalidError(
            f"{dataset.name!r} has questions alone: name the collection that they are about (--collection)"
        )
    name, is_whole = _name(dataset), False
    try:
        _to_its_end(lambda: client.put_collection(name, _settings(tried)))
        left_out = _fill(client, name, dataset, on_progress)
        view = client.collection(name)
        if not view.documents:
            raise GraftError(f"no document of {dataset.name!r} could be taken in: {next(iter(left_out.values()), '')}")
        is_whole = True
        yield Placed(view, _ids(dataset), None, left_out)
    finally:
        if not (keep and is_whole):
            _remove(client, name)


def document_name(document: Document) -> str:
    """Of its file: it stands for id, title and text, so that a collection's names tell whether it holds this data set."""
    digest = hashlib.sha256(json.dumps([document.id, document.title, document.text]).encode()).hexdigest()
    return f"{digest[:32]}.{'md' if document.title.strip() else 'txt'}"


def document_content(document: Document) -> str:
    """-> what its file says."""
    title = " ".join(document.title.split())
    return f"# {title}\n\n{document.text}\n" if title else document.text


def _existing(client: Client, dataset: DataSet, name: str, tried: Tried) -> Placed:
    if tried.chunking or tried.embedder:
        raise InvalidError(
            f"collection {name!r} is split and embedded as it is; chunking and embedder are set for a new one, without "
            "--collection"
        )
    view = client.collection(name)
    merged = {**view.retrieval.model_dump(), **tried.retrieval}
    retrieval = _fitting(Retrieval, merged) if tried.retrieval else None
    listed = documents_of(client, name)
    if not dataset.documents:
        _check_paths(dataset, {one.path for one in listed if one.chunks}, name)
        return Placed(view, {}, retrieval, {})
    ids, held = _ids(dataset), {one.path for one in listed}
    if held != ids.keys():
        raise InvalidError(
            f"collection {name!r} was not made from {dataset.name!r}: {len(ids.keys() - held)} of its {len(ids)} documents are "
            f"not there, and {len(held - ids.keys())} others are; leave --collection away to make one"
        )
    left_out = {ids[one.path]: one.reason or one.state for one in listed if not one.chunks}
    return Placed(view, ids, retrieval, left_out)


def _check_paths(dataset: DataSet, held: set[str], name: str) -> None:
    missing = [
        f"line {dataset.lines[one.id]}: {path!r}" for one in dataset.cases for path in one.relevant if path not in held
    ]
    if missing:
        more = f"\n  and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        said = "".join(f"\n  {one}" for one in missing[:LISTED])
        raise InvalidError(
            f"{dataset.name!r} names documents that collection {name!r} does not have; `graft documents list -c {name}` shows "
            f"its paths:{said}{more}"
        )


def _fill(client: Client, name: str, dataset: DataSet, on_progress: Told) -> dict[str, str]:
    """-> by id, why a document could not be taken in. The next upload is made while one is worked on."""
    ids, left_out, done = _ids(dataset), dict[str, str](), 0
    waiting: list[tuple[Job, int]] = []
    batches = _batches(dataset.documents)
    while batch := next(batches, []):
        waiting.append((_upload(client, name, batch), len(batch)))
        if len(waiting) > 1:
            done += _ended(client, waiting.pop(0), ids, left_out, done, on_progress)
    for one in waiting:
        done += _ended(client, one, ids, left_out, done, on_progress)
    return left_out


def _ended(
    client: Client, uploaded: tuple[Job, int], ids: Mapping[str, str], left_out: dict[str, str], done: int, tell: Told
) -> int:
    """Waits for a job. -> its documents."""
    job, count = uploaded
    job = client.wait(job.job_id, lambda now: tell(done + min(now.progress.files, count), len(ids)))
    if job.state != "succeeded" or job.report is None:
        raise GraftError(
            f"the documents could not be taken in: the job ended {job.state}: {job.error or 'see the logs'}"
        )
    failed = [(one.path, one.reason) for one in job.report.failures]
    for path, why in [*failed, *((one.path, one.reason) for one in job.report.skips)]:
        left_out[ids.get(PurePosixPath(path).name, path)] = why
    return count


def _upload(client: Client, name: str, documents: Sequence[Document]) -> Job:
    with tempfile.TemporaryDirectory(prefix="graft-eval-") as folder:
        files = []
        for one in documents:
            file = Path(folder) / document_name(one)
            file.write_bytes(document_content(one).encode())
            files.append(file)
        return _to_its_end(lambda: client.upload(files, name))


def _to_its_end(request: Callable[[], Made]) -> Made:
    """Ctrl-C waits for the reply: the service would do what was asked all the same, after `_remove` has looked for it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(request).result()


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    batch, chars = list[Document](), 0
    for one in filter(_says_something, documents):
        if batch and (len(batch) == BATCH or chars + len(one.text) > BATCH_CHARS):
            yield batch
            batch, chars = [], 0
        batch.append(one)
        chars += len(one.text)
    if batch:
        yield batch


def _says_something(document: Document) -> bool:
    return bool(document.title.strip() or document.text.strip())


def _ids(dataset: DataSet) -> dict[str, str]:
    return {document_name(one): one.id for one in dataset.documents if _says_something(one)}


def documents_of(client: Client, name: str) -> list[DocumentView]:
    found: list[DocumentView] = []
    while page := client.documents(name, limit=PAGE, offset=len(found)):
        found.extend(page)
    return found


def _remove(client: Client, name: str) -> None:
    """Raises GraftError when it could not be."""
    try:
        for job in client.jobs(name, limit=100):
            if job.state not in ENDED:
                client.cancel(job.job_id)
        deadline = time.monotonic() + REMOVE_SECONDS
        while True:
            try:
                client.delete_collection(name)
                return
            except ConflictError:  # a cancelled job has not stopped yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
    except NotFoundError:
        return
    except GraftError as error:
        said = f"collection {name!r} could not be removed ({error}); `graft collections rm {name}` does it"
        raise GraftError(said) from error


def _settings(tried: Tried) -> CollectionSettings:
    fields: dict[str, Any] = {"embedder": tried.embedder} if tried.embedder else {}
    if tried.retrieval:
        fields["retrieval"] = _fitting(Retrieval, tried.retrieval)
    if tried.chunking:
        fields["chunking"] = _fitting(Chunking, tried.chunking)
    return CollectionSettings(**fields)


def _name(dataset: DataSet) -> str:
    plain = re.sub(r"[^a-z0-9]+", "-", dataset.name.lower()).strip("-")[:40]
    return f"eval-{plain or 'set'}-{uuid.uuid4().hex[:8]}"


def _fitting(kind: type[Kind], fields: Mapping[str, Any]) -> Kind:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise InvalidError(f"--set does not fit: {reason(error)}") from error


def _value(text: str) -> Any:
    """JSON where it is some (2, true, null), else the text itself, which the field reads (.5)."""
    try:
        return json.loads(text)
    except ValueError:
        return text
