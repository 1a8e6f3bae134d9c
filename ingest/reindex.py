"""A collection's index built anew beside the live one, from the kept texts: another embedder, another chunking, a way back.

Sources are not read. While it is built, questions go to the live index; jobs of the collection wait, since jobs on one
collection run one after the other. Then both are asked sample questions, and the collection's row flips. A build that was
killed goes on: chunks that are there already are not embedded again.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress

from ingest.catalog import Catalog, Collection, Document, index_name, now
from ingest.embed import Embedder
from ingest.errors import GraftError, NotFoundError
from ingest.generations import Generation, Generations
from ingest.index import Filter, search
from ingest.language import reads
from ingest.pipeline import Cancelled
from ingest.progress import Meter
from ingest.schemas import ChunkCounts, Chunking, Comparison, Failure, FileCounts, Progress, Report
from ingest.settings import IngestSettings
from ingest.worker import Assignment
from ingest.writer import Outcome, Pending, Target, Writer

SAMPLES = 50  # questions of either kind
FIRST = 10  # documents of each answer that are compared


class ReindexJob:
    """`collection` to `embedder` and `chunking`, of `fingerprint`. `run` is called once, in a thread that may block.

    `questions`: asked of the collection before. `flip`: make it live at the end; else it is left `ready`.
    """

    def __init__(
        self,
        catalog: Catalog,
        target: Target,
        settings: IngestSettings,
        collection: Collection,
        chunking: Chunking,
        fingerprint: str,
        *,
        live: Embedder,
        embedder: Embedder,
        questions: Sequence[str] = (),
        flip: bool = True,
        cancelled: Callable[[], bool] = lambda: False,
        report_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self.catalog = catalog
        self.generations = Generations(catalog.engine)
        self.target = target
        self.collection = collection
        self.live, self.embedder = live, embedder
        self.questions = questions
        self.flip = flip
        self.cancelled = cancelled
        self.report_progress = report_progress
        self.new = Generation(
            collection=collection.name,
            fingerprint=fingerprint,
            embedder=embedder.name,
            chunking=chunking,
            state="building",
            created_at=now(),
        )
        self.deadline = time.monotonic() + settings.job_seconds
        self.meter = Meter()
        self.counts: dict[str, tuple[int, dict[str, int]]] = {}
        self.failures: list[Failure] = []
        self.documents: list[Document] = []
        self.waiting: Iterator[Document] = iter(())
        self.writer = Writer(
            target,
            Assignment(settings, embedder.name, embedder.runtime, chunking),
            self._take,
            self._tick,
            catalog.is_removed,
        )

    def run(self) -> Report:
        """Raises Cancelled, UnavailableError. Until the flip, nothing of use changes; with failures there is none."""
        if self.new.fingerprint == self.collection.fingerprint:  # a job that was killed after its flip
            return Report(notes=(f"index {self.new.fingerprint[:12]} is live already",))
        start = time.perf_counter()
        self.generations.begin(self.new)
        self.target.store.create(self.target.name, self.target.dimension)
        self.documents = [one for one in self.catalog.documents(self.collection.name) if one.text_hash]
        self.waiting = iter(self.documents)
        self.meter.files_total = len(self.documents)
        self.meter.begin(sum(one.size for one in self.documents))
        with self.writer, closing(self.writer.write()) as finished:
            for outcomes in finished:
                self._count(outcomes)
        self._drop_what_is_gone()
        comparison = self._compare()
        self.generations.ready(self.new, comparison)
        self.flip = self.flip and not self.failures
        if self.flip:
            self.generations.flip(self.collection, self.new, self.counts)
        seconds = {stage: round(spent, 3) for stage, spent in self.writer.seconds.items()}
        return Report(
            files=FileCounts(done=len(self.counts), failed=len(self.failures)),
            chunks=ChunkCounts.model_validate(dict(self.writer.chunks)),
            seconds={**seconds, "total": round(time.perf_counter() - start, 3)},
            failures=tuple(self.failures),
            comparison=comparison,
            notes=(self._said(comparison),),
        )

    def _take(self, count: int) -> list[Pending]:
        taken = []
        for document in self.waiting:
            try:
                taken.append(Pending(document, "", "", self.catalog.text(document.id)))
            except NotFoundError:
                if not self.catalog.is_removed(document.id):
                    reason = "its kept text is missing; delete the document and ingest it again"
                    self.failures.append(Failure(path=document.path, stage="read", reason=reason))
            if len(taken) == count:
                break
        return taken

    def _count(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            self.meter.bytes += outcome.document.size
            if outcome.failure:
                stage, reason, _ = outcome.failure
                self.failures.append(
                    Failure.model_validate({"path": outcome.document.path, "stage": stage, "reason": reason})
                )
            else:
                self.counts[outcome.document.id] = (len(outcome.written), dict(outcome.languages))

    def _drop_what_is_gone(self) -> None:
        """What was deleted while it was built; and, of an index that was live before, what was deleted since."""
        kept = {one.id for one in self.catalog.documents(self.collection.name) if one.text_hash}
        index, name = self.target.store, self.target.name
        offset: str | None = None
        gone: set[str] = set()
        while True:
            points, offset = index.scan(name, offset, 1000)
            gone |= {point.id for point in points if point.payload["document_id"] not in kept}
            self._tick()
            if offset is None:
                break
        index.delete(name, sorted(gone))
        index.flush(name)
        self.counts = {document: count for document, count in self.counts.items() if document in kept}

    def _compare(self) -> Comparison:
        known = self._known_questions()
        asked = [*self.questions[:SAMPLES], *(question for question, _ in known)]
        overlaps, firsts = [], 0
        found = {"live": 0, "new": 0}
        sought = dict(known)
        for question in asked:
            self._tick()
            old = self._documents_of(question, self.live, index_name(self.collection.name, self.collection.fingerprint))
            new = self._documents_of(question, self.embedder, self.target.name)
            overlaps.append(len(set(old) & set(new)) / len(old) if old else 1.0)
            firsts += old[:1] == new[:1]
            if question in sought:
                found["live"] += sought[question] in old
                found["new"] += sought[question] in new
        count = max(1, len(asked))
        return Comparison(
            questions=len(asked),
            known=len(known),
            overlap=round(sum(overlaps) / count, 3),
            same_first=round(firsts / count, 3),
            live_found=round(found["live"] / max(1, len(known)), 3),
            new_found=round(found["new"] / max(1, len(known)), 3),
        )

    def _known_questions(self) -> list[tuple[str, str]]:
        """-> (a heading path or a first sentence, its document), of documents taken by chance, the same each time."""
        some = random.Random(0).sample(self.documents, min(SAMPLES, len(self.documents)))
        known = []
        for document in some:
            with suppress(GraftError):
                parsed = self.catalog.text(document.id)
                title = parsed.headings[len(parsed.headings) // 2].title if parsed.headings else ""
                text = " ".join(parsed.text[: parsed.text.find("\n", 200)].split())[:200]
                known.append((f"{title} {text}".strip()[:300], document.id))
        return list(dict(known).items())

    def _documents_of(self, question: str, embedder: Embedder, name: str) -> list[str]:
        """-> the first documents, best first, as a question finds them."""
        dense = embedder.embed_query(question) if reads(embedder.languages, question) else None
        hits = search(self.target.store, name, dense, question, Filter(), self.collection.retrieval, 5 * FIRST)
        return list(dict.fromkeys(hit.document_id for hit in hits))[:FIRST]

    def _said(self, comparison: Comparison) -> str:
        flipped = "it is live now" if self.flip else "it is ready; `graft collections activate` makes it live"
        if self.failures:
            flipped = (
                f"it is not made live, for it lacks {len(self.failures)} documents: mend or delete them, and retry"
            )
        known = f"of {comparison.known} known documents {100 * comparison.new_found:.0f} % are found"
        return (
            f"index {self.new.fingerprint[:12]} beside {self.collection.fingerprint[:12]}, {comparison.questions} questions: "
            f"{100 * comparison.overlap:.0f} % of the first {FIRST} documents are the same; {known}, "
            f"{100 * comparison.live_found:.0f} % before; {flipped}"
        )

    def _tick(self) -> None:
        if self.cancelled():
            raise Cancelled
        if time.monotonic() > self.deadline:
            raise Cancelled(expired=True)
        counts = self.writer.chunks
        done = len(self.counts) + len(self.failures)
        progress = self.meter.progress(done, 0, counts["added"] + counts["kept"], None)
        self.report_progress(progress)
