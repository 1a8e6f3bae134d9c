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
from ingest.errors import GraftError, NotFoundError
from ingest.language import reads
from ingest.schemas import Hit
from service.adapter_serving import AdapterServing
from service.adapters import Adapter
from service.budget import fitted
from service.check import Sentences, stands
from service.cite import Cited, cite
from service.follow_up import search_for
from service.generate import AdapterLostError, Generator, Piece, Sampling, strip_thinking
from service.look_up import chosen_adapter, is_too_weak, look_up
from service.metrics import Metrics
from service.principals import Principal
from service.prompt import CLOSED, CURRENT, Message, best_sentence, built_in, refusal
from service.prompt_store import AUTO, PromptStore
from service.records import Interaction, Records
from service.retrieve import Retriever
from service.rewrite import Search, subject
from service.schemas import Answer, QueryRequest, Sentence
from service.settings import ServiceSettings
from service.template import Template

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
    prompts: PromptStore
    records: Records
    metrics: Metrics
    small_models: dict[str, tuple[str, ...]]  # by model root, the languages that it reads


async def answer(query: QueryRequest, principal: Principal, parts: Answering) -> AsyncGenerator[Event]:
    """Yields Tokens, then Cited, then the Answer. Raises NotFoundError, InvalidError, UnavailableError."""
    run = _Run(query, principal)
    try:
        run.search = await _search(query, parts)
        if query.messages:
            run.timings["rewrite"] = _ms(run.started)
        found = await to_thread.run_sync(look_up, query, run.search, principal, parts.retriever, parts.records)
        run.chosen = await to_thread.run_sync(chosen_adapter, query, parts.adapters.registry)
        run.collection, run.collections, run.hits = found.collection, found.collections, found.hits
        run.notes = found.notes
        run.timings.update(found.timings_ms)
        async with aclosing(_reply(run, parts)) as tokens:
            async for token in tokens:
                yield token
        run.cited = run.checked_by_passages(run.text)
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


async def _search(query: QueryRequest, parts: Answering) -> Search:
    """What the query says, else its question, rewritten where it leans on earlier turns."""
    if query.search is not None or query.without_passages:
        return Search(query.search or query.question, "no")
    way, seconds = parts.settings.rewrite, parts.settings.rewrite_seconds
    return await search_for(query.question, query.messages, way, seconds, parts.generator, parts.small_models)


async def _reply(run: "_Run", parts: Answering) -> AsyncGenerator[Token]:
    assert run.collection is not None
    if not run.query.without_passages and is_too_weak(run.collections, run.hits):
        run.refuse()
        run.prompt_version = "refusal"
        yield Token(run.text)
        return
    await _prepare(run, parts)
    if run.checked:
        await _generate_checked(run, parts)
        for word in re.findall(r"\s*\S+", run.text):
            yield Token(word)
        return
    as_it_comes = parts.settings.unsupported == "mark" or run.query.without_passages
    async with aclosing(_generate(run, parts) if as_it_comes else _generate_held(run, parts)) as tokens:
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
        run.judged += run.checked_by_passages(run.text).sentences
        if stands(run.judged):
            return
    run.said = run.text or None
    asked = subject(run.query.question, run.search.text)
    quotes = (best_sentence(asked, passage, run.template.guard) for passage in run.passages)
    run.text, run.finish_reason = next(filter(None, quotes), ""), "quoted"
    if not run.text:  # all that the passages say is said to the model
        run.refuse()


async def _generate_held(run: "_Run", parts: Answering) -> AsyncGenerator[Token]:
    """Sends a sentence once it is checked. One that the passages do not support is left out, or ends the answer as a
    refusal, as `SERVICE_UNSUPPORTED` says; so does an answer of which nothing is left.
    """
    shown, dropped, refuses = "", 0, parts.settings.unsupported == "refuse"
    try:
        async with aclosing(_sentences(run, parts)) as sentences:
            async for sentence in sentences:
                judged = run.checked_by_passages(sentence).sentences
                run.judged += judged
                if all(one.supported for one in judged):
                    yield Token(sentence if shown else sentence.lstrip())
                    shown += sentence
                else:
                    dropped += 1
                    if refuses:
                        break
    finally:
        run.said, run.text = run.text, shown.strip()
    if dropped:
        run.finish_reason = "dropped"
    if not run.text or (dropped and refuses):
        run.refuse()
        if not shown:
            yield Token(run.text)


async def _sentences(run: "_Run", parts: Answering) -> AsyncGenerator[str]:
    """What the model says, in whole sentences with the white space in front of each."""
    held = Sentences()
    async with aclosing(_generate(run, parts)) as tokens:
        async for token in tokens:
            for sentence in held.feed(token.text):
                yield sentence
    for sentence in held.rest():
        yield sentence


class _Run:
    """One question on its way through the flow."""

    def __init__(self, query: QueryRequest, principal: Principal) -> None:
        self.id = str(uuid.uuid4())
        self.query = query
        self.principal = principal
        self.search = Search(query.question, "no")
        self.started = time.perf_counter()
        self.timings: dict[str, float] = {"first_token": 0.0, "generate": 0.0}
        self.collection: Collection | None = None  # the first of `collections`: the answer is made by its settings
        self.collections: tuple[Collection, ...] = ()
        self.hits: list[Hit] = []
        self.notes: tuple[str, ...] = ()
        self.passages: list[Hit] = []
        self.prompt_version = ""
        self.template = built_in(CLOSED)
        self.messages: list[Message] = []
        self.checked = False  # the bare bundled model answers, or an adapter of it that does not read the question
        self.languages: tuple[str, ...] = ()
        self.sampling = Sampling(0, 0.0)
        self.base_model: str | None = None
        self.chosen: Adapter | None = None
        self.adapter: str | None = None  # its name, once it is asked
        self.text = ""  # what is shown
        self.said: str | None = None  # what the model had said, where something else is shown
        self.judged: tuple[Sentence, ...] = ()  # of what the model had said, where it was judged before it was shown
        self.cited = Cited((), ())
        self.usage: dict[str, int] = {}
        self.finish_reason = "cancelled"  # until the end is reached
        self.recorded = False

    def checked_by_passages(self, text: str) -> Cited:
        return cite(text, self.passages, self.template.guard)

    def refuse(self) -> None:
        self.text, self.finish_reason = refusal(self.query.question), "refused"

    def answer(self) -> Answer:
        return Answer(
            answer=self.text,
            sentences=self.cited.sentences,
            citations=self.cited.citations,
            collection=self.query.names()[0],
            collections=self.query.collections,
            adapter=self.adapter,
            usage=self.usage,
            timings_ms=self.timings,
            finish_reason=self.finish_reason,
            interaction_id=self.id,
            search=self.searched(),
            notes=self.notes,
        )

    def searched(self) -> str | None:
        """What was searched for, where that is not the question alone."""
        return self.search.text if self.search.text != self.query.question else None

    def interaction(self) -> Interaction:
        sampling: dict[str, Any] = self.sampling._asdict()
        return Interaction(
            id=self.id,
            created_at=now(),
            principal=self.principal.id,
            source=self.query.source,
            collection=self.query.names()[0],
            collections=self.query.collections,
            index_fingerprint=self.collection.fingerprint if self.collection else "",
            question=self.query.question,
            turns=tuple(self.query.messages),
            search=self.searched(),
            filters=self.query.filters,
            hits=tuple(self.hits),
            prompt_version=self.prompt_version,
            passages=len(self.passages),
            base_model=self.base_model,
            adapter=self.adapter,
            sampling=sampling,
            answer=self.text,
            said=self.said if self.said != self.text else None,
            sentences=[sentence.model_dump() for sentence in self.cited.sentences],
            citations=[citation.model_dump() for citation in self.cited.citations],
            finish_reason=self.finish_reason,
            usage=self.usage,
            timings_ms=self.timings,
        )


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
    own = run.chosen.languages if run.chosen else ()
    run.languages = own or parts.small_models.get(model.root, ())
    unread = bool(own) and not reads(run.languages, query.question)
    run.checked = small and (run.adapter is None or unread) and not query.without_passages
    run.prompt_version, run.template, notes = await to_thread.run_sync(_prompt, run, small, parts.prompts)
    run.notes += notes
    max_tokens = query.max_tokens or min(CHECKED_TOKENS if run.checked else 2**31, settings.max_tokens)
    budget = min(settings.prompt_tokens, (model.max_model_len or 2**31) - max_tokens)
    run.messages, run.passages = await fitted(
        run.template, query.question, query.messages, run.hits, budget, parts.generator
    )
    run.sampling = Sampling(max_tokens, settings.temperature)
    run.timings["generate"] += _ms(started)  # the engine was asked for its model and to count tokens


def _prompt(run: _Run, small: bool, prompts: PromptStore) -> tuple[str, Template, tuple[str, ...]]:
    """-> the version that the collection points to; for "auto" the one that the adapter was trained with, else what fits the
    model; and what is to be said of that.
    """
    assert run.collection is not None
    version = CLOSED if run.query.without_passages else prompts.pointer(run.collection)
    if version != AUTO:
        return version, prompts.template(version), ()
    fitting = CURRENT["brief" if small else "cited"]
    own = run.chosen.prompt_version if run.chosen else None
    if own is None:
        return fitting, prompts.template(fitting), ()
    try:
        return own, prompts.template(own), ()
    except NotFoundError:
        note = (
            f"adapter {run.adapter!r} was trained with prompt {own!r}, which is not here; it was asked with {fitting!r}"
        )
        return fitting, prompts.template(fitting), (note,)


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
        run.cited = run.checked_by_passages(run.text)
    parts.metrics.answered(run.interaction())
    parts.metrics.judged(run.judged or run.cited.sentences)
    with anyio.CancelScope(shield=True):
        await to_thread.run_sync(parts.records.add_interaction, run.interaction())
        run.recorded = True


def _ms(start: float) -> float:
    return round((time.perf_counter() - start) * 1000, 3)
