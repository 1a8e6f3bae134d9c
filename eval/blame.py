"""Where a bad answer went wrong: the first stage of the way from corpus to answer that lost what was asked. A pure function.

A *gold passage* is a chunk that holds the answer: of a relevant document, and with a gold answer's words in it. Where the
relevant documents do not have those words side by side (yes or no; an answer in words of its own), each chunk of a relevant
document is one; where no document is named, each chunk with the words is.
"""

from collections.abc import Callable
from typing import NamedTuple

from eval.answer_metrics import contains, is_chinese, is_decided
from eval.schemas import Blame, Case

DEEP = 100  # hits that a gold passage is looked for in, when the answer's own retrieval did not find it

LEVERS: dict[Blame, str] = {
    "not_in_corpus": "ingest the document that says it; if none should, let the service refuse: `graft eval calibrate` finds "
    "the collection's threshold",
    "not_retrieved": "retrieval: fusion weights (`graft eval weights`), chunking and k (`graft eval sweep`), another embedder "
    "(`graft eval probe` compares them first), reranking where it was found just beyond k",
    "lost_by_reranker": "turn the collection's reranking off, or take another cross-encoder (SERVICE_RERANKER)",
    "ignored": "the model: a larger one, an adapter tuned on questions like these, or another prompt version; "
    "a lower threshold, where it refused below it",
    "cited_wrongly": "the model mixes passages up: fewer passages (top_k), reranking, an adapter tuned with distractors; "
    "SERVICE_UNSUPPORTED=drop or refuse holds back what no passage supports",
    "truncated": "room: SERVICE_MAX_TOKENS for answers cut off, SERVICE_PROMPT_TOKENS or smaller chunks for passages left out, "
    "a prompt version that takes whole passages (cited) for parts left out",
}


class Seen(NamedTuple):
    """What was observed of one answer. Ranks count from 1, in the order of what was retrieved for it.

    `in_corpus`: a relevant document is in the collection; None where none is named. `gold`: ranks of the gold passages.
    `deep`: the best rank of one within DEEP when nothing is reranked, None beyond or not looked for. `reranked`: the answer's
    hits were. `takes`: passages that the prompt version takes at most; `in_prompt`: those that it held. `cites`: the ranks
    cited; `supported`: those of them that hold their sentences. `says`: ranks of the hits that hold all that was said.
    `in_part`: the prompt version shows excerpts, and those of the gold passages lack the answer.
    """

    in_corpus: bool | None
    gold: tuple[int, ...]
    deep: int | None
    reranked: bool
    retrieved: int
    takes: int
    in_prompt: int
    finish_reason: str
    cites: tuple[int, ...]
    supported: tuple[int, ...]
    says: tuple[int, ...]
    in_part: bool


def blame(answerable: bool, refused: bool, seen: Seen) -> tuple[Blame, str]:
    """-> (the class of a bad answer, in words)."""
    if not answerable:
        return "not_in_corpus", "the documents do not say, and it was answered all the same"
    if seen.in_corpus is False:
        return "not_in_corpus", "no relevant document is in the collection"
    reached = min((rank for rank in seen.gold if rank <= seen.in_prompt), default=None)
    if reached is None:
        return _missed(refused, seen)
    if seen.in_part:
        return "truncated", f"of the passage at rank {reached} the prompt held a part without the answer"
    if seen.finish_reason == "length" and not _elsewhere(seen):
        return "truncated", f"the answer was cut off; the passage at rank {reached} was in the prompt"
    if refused:
        return "ignored", f"refused, though the passage at rank {reached} was in the prompt"
    return _misused(seen, reached)


def gold_test(case: Case, gold_texts: tuple[str, ...]) -> Callable[[bool, str], bool]:
    """-> (relevant, text of a chunk) -> whether it is a gold passage. `gold_texts`: of the relevant documents."""
    chinese = is_chinese(case)
    golds = () if is_decided(case) else case.answers
    by_words = bool(golds) and (not case.relevant or any(contains(text, golds, chinese) for text in gold_texts))

    def is_gold(relevant: bool, text: str) -> bool:
        if not by_words:
            return relevant
        return (relevant or not case.relevant) and contains(text, golds, chinese) == 1

    return is_gold


def _missed(refused: bool, seen: Seen) -> tuple[Blame, str]:
    """No gold passage was in the prompt."""
    within = seen.in_prompt or min(seen.takes, seen.retrieved)
    if seen.reranked and seen.deep is not None and seen.deep <= within:
        now = f"rank {seen.gold[0]}" if seen.gold else f"none of {seen.retrieved}"
        return "lost_by_reranker", f"rank {seen.deep} before reranking, {now} after"
    if not seen.gold:
        found = f"found at rank {seen.deep}" if seen.deep else f"beyond rank {DEEP}"
        return "not_retrieved", f"{found}; {seen.retrieved} were retrieved"
    rank = min(seen.gold)
    if rank > seen.takes:
        return "not_retrieved", f"found at rank {rank}; the prompt takes {seen.takes}"
    if refused and not seen.in_prompt:
        return "ignored", f"refused below the collection's threshold; the passage was found at rank {rank}"
    return "truncated", f"the passage at rank {rank} was left out of the prompt, which had room for {seen.in_prompt}"


def _misused(seen: Seen, reached: int) -> tuple[Blame, str]:
    """A gold passage was in the prompt, and something was answered."""
    if _elsewhere(seen):
        told = f"cites {_ranks(seen.cites)}" if seen.cites else f"says what {_ranks(seen.says)} says"
        return "cited_wrongly", f"{told}; the answer stands at rank {reached}"
    if not seen.cites:
        return "ignored", f"the passage at rank {reached} was in the prompt; the answer does not use it"
    if not set(seen.supported) & set(seen.gold):
        return "cited_wrongly", f"cites {_ranks(seen.cites)}, which does not hold what it says"
    return "ignored", f"cites the passage at rank {reached}, and says something else of it"


def _elsewhere(seen: Seen) -> bool:
    """It cites other passages than the gold ones alone, or cites nothing and says what others say. More room would not have
    brought such an answer to the right one.
    """
    told = set(seen.cites or seen.says)
    return bool(told) and not told & set(seen.gold)


def _ranks(ranks: tuple[int, ...]) -> str:
    named = sorted(set(ranks))
    return f"rank{'s' if len(named) > 1 else ''} {', '.join(map(str, named))}"
