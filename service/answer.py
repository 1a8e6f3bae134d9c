"""The query flow, from top to bottom: retrieve, refuse or build the prompt, stream, cite, record.

What a client receives and what is recorded come from one object, `_Run`, so they cannot differ; a client that hangs up
cancels the flow, which closes the engine's stream, and the interaction is recorded all the same.
"""

import re
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NamedTuple

import anyio
from anyio import to_thread

from ingest.catalog import Collection, now
from ingest.errors import GraftError, InvalidError
from ingest.language import reads
from ingest.schemas import Hit
from service.adapter_serving import AdapterServing
from service.adapters import Adapter, Registry
from service.cite import Cited, cite
from service.generate import AdapterLostError, Generator, Piece, Sampling, strip_thinking
from service.metrics import Metrics
from service.principals import Principal
from service.prompt import CURRENT, PASSAGES, Message, best_sentence, build, refusal
from service.records import Interaction, Records
from service.retrieve import Found, Retriever
from service.schemas import Answer, QueryRequest
from service.settings import ServiceSettings

CHECKED_TOKENS = 96  # of an answer that is held back until it is checked, when the query does not say


class Token(NamedTuple):
    text: str


Event = Token | Cited | Answer


class Answering(NamedTuple):
    """What the flow needs."""

    settings: ServiceSettings
    retriever: Retriever
    generator: Generator
    adapters: AdapterServing
    records: Records
    metrics: Metrics
    small_models: dict[str, tuple[str, ...]]  # by model root, the languages that it reads


async def answer(query: QueryRequest, principal: Principal, parts: Answering) -> AsyncGenerator[Event]:
    """Yields Tokens, then Cited, then the Answer. Raises NotFoundError, InvalidError, UnavailableError."""
    run = _Run(query, principal)
    try:
        found, run.chosen = await to_thread.run_sync(_look_up, query, principal, parts)
        run.collection, run.hits = found.collection, found.hits
        run.timings.update(found.timings_ms)
        async with aclosing(_reply(run, parts)) as tokens:
            async for token in tokens:
                yield token
        run.cited = cite(run.text, run.passages)
        yield run.cited
        run.timings["total"] = _ms(run.started)
        await _record(run, parts)  # before the client learns the id
        yield run.answer()
    except GraftError:
        run.finish_reason = "error"
        raise
    finally:
        if not run.recorded:
            await _record(run, parts)


def _look_up(query: QueryRequest, principal: Principal, parts: Answering) -> tuple[Found, Adapter | None]:
    """-> the passages, and the adapter that answers. Raises NotFoundError."""
    found = parts.retriever.retrieve(query.question, query.collection, query.filters, principal.groups, query.top_k)
    return found, _adapter(query, parts.adapters.registry)


def _adapter(query: QueryRequest, registry: Registry) -> Adapter | None:
    """The query's own, else the collection's, else the live one; None is the bare base. Raises NotFoundError."""
    if "adapter" not in query.model_fields_set:
        return registry.chosen(query.collection)
    return registry.adapter(query.adapter) if query.adapter else None


async def _reply(run: "_Run", parts: Answering) -> AsyncGenerator[Token]:
    assert run.collection is not None
    if _refused(run.collection, run.hits):
        run.text, run.finish_reason, run.prompt_version = refusal(run.query.question), "refused", "refusal"
        yield Token(run.text)
        return
    await _prepare(run, parts)
    if run.checked:
        await _generate_checked(run, parts)
        for word in re.findall(r"\s*\S+", run.text):
            yield Token(word)
        return
    async with aclosing(_generate(run, parts)) as tokens:
        async for token in tokens:
            yield token


async def _generate_checked(run: "_Run", parts: Answering) -> None:
    """For a model that is wrong more often than not: its words stand when the passages support each of its sentences;
    else, and for a question in a language that it does not read, the best sentence of the passages is quoted.
    """
    if reads(run.languages, run.query.question):
        async with aclosing(_generate(run, parts)) as tokens:
            async for _ in tokens:
                pass
        if run.text and all(sentence.citations for sentence in cite(run.text, run.passages).sentences):
            return
    run.text, run.finish_reason = best_sentence(run.query.question, run.passages[0]), "quoted"


class _Run:
    """One question on its way through the flow."""

    def __init__(self, query: QueryRequest, principal: Principal) -> None:
        self.id = str(uuid.uuid4())
        self.query = query
        self.principal = principal
        self.started = time.perf_counter()
        self.timings: dict[str, float] = {"first_token": 0.0, "generate": 0.0}
        self.collection: Collection | None = None
        self.hits: list[Hit] = []
        self.passages: list[Hit] = []
        self.prompt_version = ""
        self.messages: list[Message] = []
        self.checked = False  # the bare bundled model answers, which reads `languages`
        self.languages: tuple[str, ...] = ()
        self.sampling = Sampling(0, 0.0)
        self.base_model: str | None = None
        self.chosen: Adapter | None = None
        self.adapter: str | None = None  # its name, once it is asked
        self.text = ""
        self.cited = Cited((), ())
        self.usage: dict[str, int] = {}
        self.finish_reason = "cancelled"  # until the end is reached
        self.recorded = False

    def answer(self) -> Answer:
        return Answer(
            answer=self.text,
            sentences=self.cited.sentences,
            citations=self.cited.citations,
            collection=self.query.collection,
            adapter=self.adapter,
            usage=self.usage,
            timings_ms=self.timings,
            finish_reason=self.finish_reason,
            interaction_id=self.id,
        )

    def interaction(self) -> Interaction:
        sampling: dict[str, Any] = self.sampling._asdict()
        return Interaction(
            id=self.id,
            created_at=now(),
            principal=self.principal.id,
            source=self.query.source,
            collection=self.query.collection,
            index_fingerprint=self.collection.fingerprint if self.collection else "",
            question=self.query.question,
            turns=tuple(self.query.messages),
            filters=self.query.filters,
            hits=tuple(self.hits),
            prompt_version=self.prompt_version,
            passages=len(self.passages),
            base_model=self.base_model,
            adapter=self.adapter,
            sampling=sampling,
            answer=self.text,
            citations=[citation.model_dump() for citation in self.cited.citations],
            finish_reason=self.finish_reason,
            usage=self.usage,
            timings_ms=self.timings,
        )


def _refused(collection: Collection, hits: list[Hit]) -> bool:
    """Nothing was found, or the best hit's own score (cross-encoder, else cosine) is below the collection's threshold."""
    if not hits:
        return True
    scores = [hit.rerank_score if hit.rerank_score is not None else hit.dense_score for hit in hits]
    known = [score for score in scores if score is not None]
    return collection.threshold is not None and bool(known) and max(known) < collection.threshold


async def _prepare(run: _Run, parts: Answering) -> None:
    """Chooses adapter and prompt, and as many passages as the token budget holds."""
    assert run.collection is not None
    started = time.perf_counter()
    query, settings = run.query, parts.settings
    model = await parts.generator.model()
    run.base_model = model.root
    if run.chosen is not None:
        await parts.adapters.check(run.chosen)
        run.adapter = run.chosen.name
    small = model.root in parts.small_models
    run.languages = parts.small_models.get(model.root, ())
    run.checked = small and run.adapter is None
    style = run.collection.prompt
    if style == "auto":
        style = "brief" if small else "cited"
    run.prompt_version = CURRENT[style]
    max_tokens = query.max_tokens or (CHECKED_TOKENS if run.checked else settings.max_tokens)
    run.passages = run.hits[: PASSAGES[run.prompt_version]]
    budget = min(settings.prompt_tokens, (model.max_model_len or 2**31) - max_tokens)
    await _fit(run, parts.generator, budget)
    run.sampling = Sampling(max_tokens, settings.temperature)
    run.timings["generate"] += _ms(started)  # the engine was asked for its model and to count tokens


async def _fit(run: _Run, generator: Generator, budget: int) -> None:
    """Leaves passages out from the last one on until the prompt is within `budget` tokens. Raises InvalidError."""
    while True:
        query = run.query
        run.messages = build(run.prompt_version, query.question, query.messages, run.passages)
        size = sum(_at_most(message["content"]) + 16 for message in run.messages)
        if size <= budget or await generator.count_tokens(run.messages) <= budget:
            return
        if len(run.passages) <= 1:
            raise InvalidError(
                f"question and messages leave no room for a passage within {budget} tokens; shorten them, "
                "or raise SERVICE_PROMPT_TOKENS and SERVICE_MAX_MODEL_LEN"
            )
        run.passages = run.passages[:-1]


def _at_most(text: str) -> int:
    """More tokens than `text` has in any usual vocabulary: one for two bytes of ASCII, one for each byte of the rest.

    Where it is wrong all the same, the engine's own limit, which is wider than the budget, still holds.
    """
    ascii_bytes = len(text.encode("ascii", "ignore"))
    return ascii_bytes // 2 + len(text.encode()) - ascii_bytes


async def _generate(run: _Run, parts: Answering) -> AsyncGenerator[Token]:
    started = time.perf_counter()
    try:
        async with aclosing(_pieces(run, parts)) as pieces:
            async for piece in pieces:
                if piece.text:
                    if not run.text:
                        run.timings["first_token"] = _ms(started)
                    run.text += piece.text
                    yield Token(piece.text)
                if piece.finish_reason:
                    run.finish_reason = piece.finish_reason
                    run.usage = piece.usage or {}
    finally:
        run.text = strip_thinking(run.text).strip()
        run.timings["generate"] += _ms(started)


async def _pieces(run: _Run, parts: Answering) -> AsyncGenerator[Piece]:
    """An adapter that the engine has lost is loaded again; the base never answers in its place."""
    for again in (False, True):
        try:
            async with aclosing(parts.generator.stream(run.messages, run.adapter, run.sampling)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        except AdapterLostError:  # before the first piece
            if again or run.adapter is None:
                raise
            await parts.adapters.load(run.adapter)


async def _record(run: _Run, parts: Answering) -> None:
    run.timings.setdefault("total", _ms(run.started))
    if run.collection is None:  # no such collection: nothing was asked of anything
        return
    if not run.cited.sentences and run.text:
        run.cited = cite(run.text, run.passages)
    parts.metrics.answered(run.interaction())
    with anyio.CancelScope(shield=True):
        await to_thread.run_sync(parts.records.add_interaction, run.interaction())
        run.recorded = True


def _ms(start: float) -> float:
    return round((time.perf_counter() - start) * 1000, 3)
