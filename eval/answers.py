"""Asks a data set's questions as users do, over HTTP, and scores what comes back: one case after the other, some at a time.

A question that the service answers with an error has no scores, and says why; when the service itself is gone, the run ends
with what is done. Controls ask the same questions without passages ("none"), or search for another case's question ("wrong"):
what is right all the same, the model knows by heart. Their bad answers are blamed on nothing.
"""

import random
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, Literal, NamedTuple

from eval.answer_metrics import answer_scores, is_refusal
from eval.blame import DEEP, Seen, blame, gold_test
from eval.grounding import Grounding, ground, holders
from eval.schemas import AnswerCase, Blame, Case, Passage
from eval.settings import EvalSettings
from ingest.errors import GraftError, NotFoundError, UnavailableError
from ingest.schemas import Hit, Retrieval
from service.client import Client
from service.prompt import build, built_in
from service.schemas import Answer, QueryRequest, SearchRequest

Control = Literal["none", "wrong"]


class Asking(NamedTuple):
    """How the questions are asked. `adapter`: (name,) or (None,) for the bare base; () for the collection's.

    `name_of`: a path in the collection -> the data set's id of that document. `text_of`: that id -> its text, None where the
    collection does not have it. `judge`: settings of one, where one is asked.
    """

    collection: str
    retrieval: Retrieval
    name_of: Callable[[str], str]
    text_of: Callable[[str], str | None]
    adapter: tuple[str | None, ...] = ()
    control: Control | None = None
    judge: EvalSettings | None = None
    threads: int = 4
    seed: int = 0


class Asked(NamedTuple):
    """`ended`: why not all were asked. `configuration`: what the answers themselves say of how they were made."""

    cases: tuple[AnswerCase, ...]
    configuration: dict[str, Any]
    ended: BaseException | None


class _Gone(Exception):
    """The service is; chained from what said so."""


class _Observed(NamedTuple):
    """An answer, and the service's own record of how it was made."""

    answer: Answer
    hits: tuple[Hit, ...]
    in_prompt: int
    record: dict[str, Any]

    @property
    def shown(self) -> tuple[Hit, ...]:
        return self.hits[: self.in_prompt]


def ask_all(
    client: Client, cases: Sequence[Case], asking: Asking, on_progress: Callable[[int, int], None] = lambda *_: None
) -> Asked:
    """-> the cases in their order, those that were asked. Ctrl-C ends the run as a lost service does.

    `on_progress` is told how many are done, and of how many.
    """
    others = derange(cases, asking.seed) if asking.control == "wrong" else {}
    done: dict[str, AnswerCase] = {}
    made: dict[str, Any] = {}
    stop = threading.Event()

    def one(case: Case) -> tuple[AnswerCase, dict[str, Any]] | None:
        return None if stop.is_set() else _ask(client, case, others.get(case.id), asking)

    ended: BaseException | None = None
    with ThreadPoolExecutor(asking.threads, thread_name_prefix="answers") as pool:
        futures: list[Future[tuple[AnswerCase, dict[str, Any]] | None]] = [pool.submit(one, case) for case in cases]
        try:
            for future in as_completed(futures):
                if found := future.result():
                    done[found[0].case.id] = found[0]
                    made = made or found[1]
                    on_progress(len(done), len(cases))
        except (_Gone, KeyboardInterrupt) as error:
            ended = error.__cause__ if isinstance(error, _Gone) else error
        finally:
            stop.set()
    for future in futures:  # those that were under way
        if not future.cancelled() and future.exception() is None and (found := future.result()):
            done[found[0].case.id] = found[0]
    return Asked(tuple(done[case.id] for case in cases if case.id in done), made, ended)


def derange(cases: Sequence[Case], seed: int) -> dict[str, Case]:
    """-> another case for each, by id, that shares no relevant document with it; each serves once. Where there is none for a
    case, it is left out.
    """
    order = list(cases)
    random.Random(seed).shuffle(order)
    others = order[1:] + order[:1]

    def fits(at: int, other: Case) -> bool:
        return other.id != order[at].id and not set(order[at].relevant) & set(other.relevant)

    for at in range(len(order)):
        if not fits(at, others[at]):
            swap = next((to for to in range(len(order)) if fits(at, others[to]) and fits(to, others[at])), None)
            if swap is not None:
                others[at], others[swap] = others[swap], others[at]
    return {case.id: others[at] for at, case in enumerate(order) if fits(at, others[at])}


def _ask(client: Client, case: Case, other: Case | None, asking: Asking) -> tuple[AnswerCase, dict[str, Any]]:
    """Raises _Gone."""
    if asking.control == "wrong" and other is None:
        return _not_evaluated(case, "no other question is about other documents"), {}
    try:
        observed = _observe(client, _request(case, other, asking))
        scored = _score(client, case, observed, asking)
    except GraftError as error:
        if isinstance(error, UnavailableError) and _is_gone(client):
            raise _Gone from error
        return _not_evaluated(case, str(error)), {}
    made = {key: observed.record.get(key) for key in ("base_model", "adapter", "prompt_version", "sampling")}
    return scored, made if made["base_model"] else {}


def _request(case: Case, other: Case | None, asking: Asking) -> QueryRequest:
    asked: dict[str, Any] = {"question": case.question, "collection": asking.collection, "source": "eval"}
    if case.turns:
        asked["messages"] = list(case.turns)
    if asking.adapter:
        asked["adapter"] = asking.adapter[0]
    if asking.control == "none":
        asked["without_passages"] = True
    if other is not None:
        asked["search"] = other.question
    return QueryRequest(**asked)


def _observe(client: Client, request: QueryRequest) -> _Observed:
    answer = client.query(request)
    record = client.interaction(answer.interaction_id)
    hits = tuple(Hit.model_validate(one) for one in record["hits"])
    return _Observed(answer, hits, record["passages"], record)


def _score(client: Client, case: Case, observed: _Observed, asking: Asking) -> AnswerCase:
    answer, shown = observed.answer, observed.shown
    refused = is_refusal(answer.answer, answer.finish_reason)
    relevant = [case.relevant.get(asking.name_of(hit.path), 0) > 0 for hit in observed.hits]
    scores, missing = answer_scores(case, answer.answer, refused)
    grounding = ground(answer.sentences, answer.citations, shown, relevant if case.relevant else None)
    if refused:
        missing |= dict.fromkeys([*grounding.scores, *grounding.missing], "refused")
    else:
        scores |= grounding.scores
        missing |= grounding.missing
        if asking.judge:
            from eval.judge import judge

            judged = judge(asking.judge, case, answer.answer, [hit.text for hit in shown])
            scores |= judged.scores
            missing |= judged.not_evaluated
    good = scores.get("good") == 1
    blamed: tuple[Blame | None, str] = (None, "")
    if "good" in scores and not good and asking.control is None:
        blamed = blame(case.answerable, refused, _seen(client, case, observed, grounding, asking))
    return AnswerCase(
        case=case,
        answer=answer.answer,
        refused=refused,
        finish_reason=answer.finish_reason,
        interaction_id=answer.interaction_id,
        passages=tuple(
            Passage(
                document=asking.name_of(hit.path), text=hit.text, score=hit.score, in_prompt=at < observed.in_prompt
            )
            for at, hit in enumerate(observed.hits)
        ),
        citations=tuple(one.model_dump(mode="json") for one in answer.citations),
        sentences=tuple(one.model_dump(mode="json") for one in answer.sentences),
        scores=scores,
        good=good,
        blame=blamed[0],
        blame_detail=blamed[1],
        timings_ms=answer.timings_ms,
        usage=answer.usage,
        not_evaluated=missing,
    )


def _seen(client: Client, case: Case, observed: _Observed, grounding: Grounding, asking: Asking) -> Seen:
    """Searches deeper where the answer's own retrieval brought no gold passage into the prompt."""
    relevant = [name for name, grade in case.relevant.items() if grade > 0]
    gold_texts = tuple(text for name in relevant if (text := asking.text_of(name)) is not None)
    is_gold = gold_test(case, gold_texts)

    def ranks(hits: Iterable[Hit]) -> tuple[int, ...]:
        named = ((rank, asking.name_of(hit.path), hit.text) for rank, hit in enumerate(hits, 1))
        return tuple(rank for rank, name, text in named if is_gold(case.relevant.get(name, 0) > 0, text))

    gold = ranks(observed.hits)
    deep = None
    if case.answerable and not any(rank <= observed.in_prompt for rank in gold):
        searched = observed.answer.search or case.question
        retrieval = asking.retrieval.model_copy(update={"rerank": False})
        asked = SearchRequest(question=searched, collection=asking.collection, top_k=DEEP, retrieval=retrieval)
        deep = min(ranks(client.retrieve(asked).hits), default=None)
    return Seen(
        in_corpus=bool(gold_texts) if relevant else None,
        gold=gold,
        deep=deep,
        reranked=asking.retrieval.rerank,
        retrieved=len(observed.hits),
        takes=_takes(observed),
        in_prompt=observed.in_prompt,
        finish_reason=observed.answer.finish_reason,
        cites=tuple(one.rank for one in grounding.links if one.rank is not None),
        supported=tuple(one.rank for one in grounding.links if one.rank is not None and one.supports),
        says=holders(observed.answer.sentences, observed.shown),
        in_part=not is_gold(True, _shown_text(case, observed)),
    )


def _shown_text(case: Case, observed: _Observed) -> str:
    """What the prompt showed of its passages, as near as can be told: of a version that users added, all of them."""
    version = observed.record["prompt_version"]
    try:
        asked = build(version, case.question, case.turns, observed.shown)[-1]["content"]
    except NotFoundError:
        return "\n".join(hit.text for hit in observed.shown)
    return asked.replace(case.question, "")


def _takes(observed: _Observed) -> int:
    """Passages that the prompt version takes at most; of one that users added, or of a refusal, as many as there were."""
    try:
        return built_in(observed.record["prompt_version"]).passages
    except NotFoundError:
        return len(observed.hits)


def _not_evaluated(case: Case, reason: str) -> AnswerCase:
    return AnswerCase(
        case=case,
        answer="",
        refused=False,
        finish_reason="error",
        interaction_id="",
        good=False,
        not_evaluated={"answer": reason},
    )


def _is_gone(client: Client) -> bool:
    try:
        client.ready()
    except UnavailableError:
        return True
    return False
