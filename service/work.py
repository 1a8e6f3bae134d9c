"""What each kind of job does, and what changes documents and indexes outside of a job. All of it blocks."""

import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ingest import reader, remote
from ingest.catalog import Catalog, Collection, index_name, now
from ingest.embed import Embedder, index_fingerprint
from ingest.errors import ConflictError, InvalidError, NotFoundError
from ingest.generations import Generation, Generations
from ingest.index import Index, delete_documents, indexes_of
from ingest.members import MARK
from ingest.pipeline import Cancelled, IngestJob, Options, Source
from ingest.reindex import ReindexJob
from ingest.schemas import ChunkCounts, Chunking, FileCounts, Progress, Report, Retrieval
from ingest.settings import IngestSettings
from ingest.source import Reader, Remote
from ingest.sync import SIDECAR, Folder, Labelling
from ingest.writer import Target
from service.jobs import DumpPayload, IngestPayload, LoadPayload, ReindexPayload, Work
from service.prompt_store import AUTO
from service.records import JobKind, Records
from service.retrieve import Retriever
from service.schemas import CollectionSettings, IndexView
from service.settings import ServiceSettings

DEFAULT = "default"
SAMPLES = 50  # questions that a new index is compared on
Stop = Callable[[], bool]  # whether the job is asked to
Tell = Callable[[Progress], None]


class Documents:
    """Collections and their documents: the one place that writes them for the service."""

    def __init__(
        self,
        catalog: Catalog,
        index: Index,
        retriever: Retriever,
        records: Records,
        settings: ServiceSettings,
        ingest: IngestSettings,
    ) -> None:
        self.catalog = catalog
        self.generations = Generations(catalog.engine)
        self.index = index
        self.retriever = retriever
        self.records = records
        self.settings = settings
        self.ingest = ingest
        shutil.rmtree(ingest.scratch, ignore_errors=True)  # of a killed job

    # collections

    def ensure_collection(self, name: str) -> Collection:
        try:
            return self.catalog.collection(name)
        except NotFoundError:
            return self.put_collection(name, CollectionSettings())

    def put_collection(self, name: str, given: CollectionSettings) -> Collection:
        """Raises InvalidError, ConflictError (another embedder or chunking meets documents), SettingsError; NotFoundError for a
        query adapter.
        """
        try:
            held: Collection | None = self.catalog.collection(name)
        except NotFoundError:
            held = None
        fields = given.model_fields_set
        embedder = self.retriever.embedder(given.embedder or (held.embedder if held else self.ingest.embedder))
        chunking = given.chunking or (held.chunking if held else Chunking())
        collection = Collection(
            name=name,
            embedder=embedder.name,
            chunking=chunking,
            fingerprint=index_fingerprint(embedder, chunking),
            retrieval=given.retrieval or (held.retrieval if held else Retrieval()),
            prompt=held.prompt if held else AUTO,
            threshold=given.threshold if "threshold" in fields or not held else held.threshold,
            created_at=held.created_at if held else now(),
        )
        if given.retrieval and given.retrieval.query_adapter:
            self.retriever.query_adapter(given.retrieval.query_adapter, embedder)
        self.catalog.put_collection(collection)
        if held is None:
            for left in indexes_of(self.index, name):  # by an earlier one of this name, whose deletion was cut off
                self.index.drop(left)
        elif held.fingerprint != collection.fingerprint:
            self.index.drop(held.index)
        return collection

    def delete_collection(self, name: str) -> None:
        """Raises NotFoundError."""
        self.catalog.collection(name)
        for index in indexes_of(self.index, name):
            self.index.drop(index)
        self.generations.forget(name)
        self.catalog.delete_collection(name)
        shutil.rmtree(self.uploads(name), ignore_errors=True)

    # indexes

    def indexes(self, name: str) -> list[IndexView]:
        """Raises NotFoundError."""
        found = self.generations.of(self.catalog.collection(name))
        return [IndexView(**one.model_dump(), chunks=self.index.count(one.index)) for one in found]

    def reindexing(self, name: str, fingerprint: str) -> ReindexPayload:
        """-> the job that makes an earlier or a ready index live again. Raises NotFoundError, ConflictError, InvalidError."""
        collection = self.catalog.collection(name)
        wanted = self.generations.generation(collection, fingerprint)
        if wanted.fingerprint == collection.fingerprint:
            raise InvalidError(f"index {fingerprint!r} is the live one of collection {name!r}")
        return ReindexPayload(collection=name, embedder=wanted.embedder, chunking=wanted.chunking)

    def drop_index(self, name: str, fingerprint: str) -> Generation:
        """Raises NotFoundError, ConflictError (it is the live one)."""
        collection = self.catalog.collection(name)
        wanted = self.generations.generation(collection, fingerprint)
        if wanted.fingerprint == collection.fingerprint:
            raise ConflictError(
                f"index {fingerprint!r} is the live one of collection {name!r}; make another one live first"
            )
        self.generations.forget(name, wanted.fingerprint)
        self.index.drop(wanted.index)
        return wanted

    # documents

    def uploads(self, collection: str) -> Path:
        return self.ingest.home / "uploads" / collection

    def remove(self, document_id: str) -> None:
        """A document, or an archive with its members, leaves every index and the kept texts; an uploaded file goes too.

        A file of a folder stays where it is, and is kept out of later jobs. Raises NotFoundError.
        """
        document = self.catalog.document(document_id)
        members = self.catalog.stamps(document.collection, [document.uri + MARK])
        ids = [document_id, *(row["id"] for row in members.values())]
        self.catalog.remove(ids)  # first, so that a running job writes no more of them
        delete_documents(self.index, document.collection, ids)
        uploads = self.uploads(document.collection)
        uploaded = uploads / document.path
        if document.uri == Folder(uploaded, uploads).uris()[0]:
            for path in (uploaded, Path(f"{uploaded}{SIDECAR}")):
                path.unlink(missing_ok=True)

    # jobs

    def kinds(self) -> dict[JobKind, Work]:
        return {"ingest": self.run_ingest, "reindex": self.run_reindex, "dump": self.run_dump, "load": self.run_load}

    def run_ingest(self, payload: IngestPayload, cancelled: Stop, tell: Tell) -> Report:
        collection = self.ensure_collection(payload.collection)
        embedder = self.retriever.embedder(collection.embedder)
        if index_fingerprint(embedder, collection.chunking) != collection.fingerprint:
            raise ConflictError(
                f"embedder {collection.embedder!r} is not the one any more that collection {collection.name!r} was embedded "
                f"with: `graft reindex {collection.name} --embedder {collection.embedder}`"
            )
        options = Options(
            Labelling(payload.acl, payload.metadata),
            payload.allow_empty,
            payload.restore,
            payload.only_failed,
            self.settings.ingest_urls,
        )
        with self._scratch() as spool:
            return IngestJob(
                self.catalog,
                self._target(collection.index, embedder),
                self.ingest,
                collection,
                self._source(payload, spool, cancelled),
                options,
                runtime=embedder.runtime,
                reads=embedder.languages,
                cancelled=cancelled,
                report_progress=tell,
            ).run()

    def run_reindex(self, payload: ReindexPayload, cancelled: Stop, tell: Tell) -> Report:
        collection = self.catalog.collection(payload.collection)
        live = self.retriever.embedder(collection.embedder)
        embedder = self.retriever.embedder(payload.embedder or collection.embedder)
        chunking = payload.chunking or collection.chunking
        new = index_fingerprint(embedder, chunking)
        return ReindexJob(
            self.catalog,
            self._target(index_name(collection.name, new), embedder),
            self.ingest,
            collection,
            chunking,
            new,
            live=live,
            embedder=embedder,
            questions=self.records.questions(collection.name, SAMPLES),
            flip=payload.flip,
            cancelled=cancelled,
            report_progress=tell,
        ).run()

    def run_dump(self, payload: DumpPayload, cancelled: Stop, tell: Tell) -> Report:
        from ingest import shards, stores

        collection = self.catalog.collection(payload.collection)
        told: dict[str, Any] = {"progress": tell, "cancelled": self._in_time(cancelled)}
        if not stores.is_store(payload.target):
            done = shards.dump(self.catalog, self.index, collection, Path(payload.target), **told)
            note = f"{done.shards} shards, {done.bytes / 1e6:.1f} MB in {payload.target}"
            return _moved(done.documents, done.chunks, done.seconds, note)
        with self._scratch() as folder:
            dumped = shards.dump(self.catalog, self.index, collection, folder, **told)
            pushed = stores.push(folder, payload.target, **told)
        left = f"; {pushed.left_out} documents did not go along" if pushed.left_out else ""
        note = f"{pushed.chunks} chunks in {payload.target}{left}"
        return _moved(dumped.documents, pushed.chunks, dumped.seconds + pushed.seconds, note)

    def run_load(self, payload: LoadPayload, cancelled: Stop, tell: Tell) -> Report:
        """A collection that is not there yet is made as the dumped one was."""
        from ingest import parquet, shards, stores

        told: dict[str, Any] = {"progress": tell, "cancelled": self._in_time(cancelled)}
        with ExitStack() as held:
            folder, foreign = Path(payload.target), 0
            if stores.is_store(payload.target):
                folder = held.enter_context(self._scratch())
                foreign = stores.pull(payload.target, folder, collection=self._held(payload.collection), **told).foreign
            dumped = parquet.read_manifest(folder).collection
            self._check_known(dumped.embedder)
            settings = {"embedder": dumped.embedder, "chunking": dumped.chunking, "retrieval": dumped.retrieval}
            if self._held(payload.collection) is None:
                self.put_collection(payload.collection, CollectionSettings.model_validate(settings))
            collection = self.catalog.collection(payload.collection)
            done = shards.load(self.catalog, self.index, folder, collection, home=self.ingest.home, **told)
        note = f"{done.shards} shards, {done.resumed} of them loaded before"
        note += f"; {foreign} chunks were written by another program" if foreign else ""
        return _moved(done.documents, done.chunks, done.seconds, note)

    def _in_time(self, cancelled: Stop) -> Stop:
        """Raises Cancelled once the job's time is over."""
        deadline = time.monotonic() + self.ingest.job_seconds

        def stop() -> bool:
            if time.monotonic() > deadline:
                raise Cancelled(expired=True)
            return cancelled()

        return stop

    def _check_known(self, embedder: str) -> None:
        """What a dump names is not to be trusted: it might be a server that keys are sent to. Raises ConflictError."""
        known = {self.ingest.embedder, *(one.embedder for one in self.catalog.collections())}
        if embedder not in known and not (self.ingest.models / embedder).is_dir():
            raise ConflictError(
                f"the dump was embedded by {embedder!r}, which is not used here yet; make a collection with it first "
                "(PUT /collections/{name}), and load into that"
            )

    def _held(self, name: str) -> Collection | None:
        with suppress(NotFoundError):
            return self.catalog.collection(name)
        return None

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        folder = self.ingest.scratch / uuid.uuid4().hex
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _source(self, payload: IngestPayload, spool: Path, cancelled: Stop) -> Source:
        if payload.reader is not None:
            reader.allowed(payload.reader.name, self.settings.ingest_readers)
            return Reader(payload.reader, spool, cancelled, self.ingest.job_seconds)
        if remote.is_remote(payload.target):
            return Remote(payload.target, self.settings.ingest_urls)
        return Folder(Path(payload.target), Path(payload.root), tuple(map(Path, payload.only)))

    def _target(self, name: str, embedder: Embedder) -> Target:
        return Target(self.index, name, embedder.dimension, embedder.fingerprint)


def _moved(documents: int, chunks: int, seconds: float, note: str) -> Report:
    return Report(
        files=FileCounts(done=documents), chunks=ChunkCounts(added=chunks), seconds={"total": seconds}, notes=(note,)
    )
