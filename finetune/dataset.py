"""Training rows from questions over documents: RAFT (Zhang et al., 2024, arXiv 2403.10131), with the service's own retriever
and prompt, so that a row is what the model will be shown, token for token.

An answer's row has the passages that hold it among others that the retriever found, in any order, and an answer that cites
them. A refusal's row lacks them. Knows no file formats: `finetune.frozen` keeps what is made here.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from pydantic import Field

from eval.answer_metrics import contains, is_decided
from eval.collection import Placed, documents_of
from eval.schemas import Case, DataSet
from finetune.schemas import Message, Provenance, SftRow, who_may_see
from ingest.errors import InvalidError
from ingest.schemas import Frozen, Hit
from service.client import Client
from service.excerpt import nearest
from service.prompt import refusal
from service.schemas import SearchRequest
from service.template import Template

DEEP = 20  # hits that gold passages and distractors are taken from
CountTokens = Callable[[Sequence[Message]], int]


class Mix(Frozen):
    """What the rows are. `refusals`: share without the gold passage; `fewer`: share with less than all passages;
    `tokens`: of the prompt, at most; `words`: of an answer, at most.
    """

    prompt: str = "tuned-1"
    refusals: float = Field(default=0.2, ge=0, le=0.5)  # one a question
    fewer: float = Field(default=0.1, ge=0, le=1)
    tokens: int = Field(default=512, ge=64)
    words: int = Field(default=40, ge=1)
    seed: int = 17


class Question(NamedTuple):
    """A case with what the retriever finds for it: `gold` holds the answer as the prompt shows it, `others` do not."""

    case: Case
    gold: tuple[Hit, ...]
    others: tuple[Hit, ...]


class Made(NamedTuple):
    """`left_out`: how many questions gave no row, by the reason."""

    rows: tuple[SftRow, ...]
    left_out: Mapping[str, int]


def raft_rows(
    client: Client,
    dataset: DataSet,
    place: Placed,
    template: Template,
    mix: Mix,
    count_tokens: CountTokens,
    on_progress: Callable[[int, int], None] = lambda *_: None,
    held_out: frozenset[str] = frozenset(),
) -> Made:
    """One answer a question, and refusals of some of them. `held_out`: ids of documents that no row shows. Raises InvalidError
    for a prompt without passages, and what the service says.
    """
    if not template.passages:
        raise InvalidError(f"prompt {mix.prompt!r} shows no passages: rows to answer from need one that does")
    chance = random.Random(mix.seed)
    acl = {one.id: one.acl for one in documents_of(client, place.view.name)}
    left_out: Counter[str] = Counter()
    rows: list[SftRow] = []
    refused = mix.refusals / (1 - mix.refusals)  # for each answer
    for done, case in enumerate(dataset.cases, 1):
        said = target(case)
        if said is None:
            left_out["it has no answer"] += 1
        elif len(said.split()) > mix.words:
            left_out[f"its answer is longer than {mix.words} words"] += 1
        elif not (question := find(client, case, place, held_out)).gold and case.answerable:
            left_out["no passage that is shown holds its answer"] += 1
        else:
            width = _width(template.passages, mix, chance)
            made = []
            if case.answerable:
                made.append(_answered(question, said, width, chance))
            if not case.answerable or chance.random() < refused:
                made.append(_refused(question, width, chance))
            for passages, words in made:
                if passages and (row := _row(case, passages, words, template, mix, count_tokens, acl)):
                    rows.append(row)
                else:
                    left_out["nothing fits its prompt"] += 1
        on_progress(done, len(dataset.cases))
    chance.shuffle(rows)
    return Made(tuple(rows), left_out)


def find(client: Client, case: Case, place: Placed, held_out: frozenset[str] = frozenset()) -> Question:
    """Where the question alone does not find the passages that answer it, its answer helps."""
    hits = tuple(hit for hit in _hits(client, case.question, place) if place.document(hit.path) not in held_out)
    gold = [hit for hit in hits if _is_gold(case, hit, place)]
    if case.answerable and not gold and case.answers:
        paths = [path for path, identity in place.ids.items() if identity in case.relevant] or list(case.relevant)
        for path in paths:
            asked = f"{case.question} {case.answers[0]}"[:2000]
            gold += [one for one in _hits(client, asked, place, path) if _is_gold(case, one, place)]
    decided = is_decided(case)
    others = [
        hit
        for hit in hits
        if not (
            place.document(hit.path) in case.relevant
            if decided
            else contains(f"{hit.heading or ''} {hit.text}", case.answers)
        )
    ]
    return Question(case, _first_of_each_document(gold), tuple(others))


def target(case: Case) -> str | None:
    """The answer that is learned: the shortest of the case's, on one line; "Yes", "No" or "Maybe"."""
    if not case.answerable:
        return refusal(case.question)
    answers = [" ".join(one.split()).rstrip(" .,;:") for one in case.answers]
    found = min((one for one in answers if one), key=len, default=None)
    return found.capitalize() if found and is_decided(case) else found


def shows(case: Case, hit: Hit, text: str) -> bool:
    """Whether a passage, as far as it is shown, holds an answer."""
    return bool(contains(f"{hit.heading or ''} {text}", case.answers))


def _is_gold(case: Case, hit: Hit, place: Placed) -> bool:
    if place.document(hit.path) not in case.relevant:
        return False
    return is_decided(case) or shows(case, hit, nearest(case.question, hit))


def _answered(question: Question, said: str, width: int, chance: random.Random) -> tuple[list[Hit], str]:
    gold = list(question.gold[: max(1, min(width, len(question.case.relevant)))])
    passages = [*gold, *question.others[: width - len(gold)]]
    chance.shuffle(passages)
    ranks = sorted(passages.index(one) + 1 for one in gold)
    return passages, " ".join([said, *(f"[{rank}]" for rank in ranks)])


def _refused(question: Question, width: int, chance: random.Random) -> tuple[list[Hit], str]:
    passages = list(question.others[:width])
    chance.shuffle(passages)
    return passages, refusal(question.case.question)


def _width(most: int, mix: Mix, chance: random.Random) -> int:
    return chance.randint(1, most) if chance.random() < mix.fewer else most


def _row(
    case: Case,
    passages: list[Hit],
    words: str,
    template: Template,
    mix: Mix,
    count_tokens: CountTokens,
    acl: Mapping[str, tuple[str, ...]],
) -> SftRow | None:
    """Within the tokens, as serving keeps them: passages are left out from the last one on, none that is cited."""
    while True:
        messages = [Message(**one) for one in template.messages(case.question, case.turns, passages)]
        if count_tokens(messages) <= mix.tokens:
            break
        if len(passages) == 1 or f"[{len(passages)}]" in words:
            return None
        passages = passages[:-1]
    if any(hit.document_id not in acl for hit in passages):  # it came since, and nobody knows who may see it
        return None
    source = Provenance(
        id=case.id,
        documents=tuple(dict.fromkeys(hit.document_id for hit in passages)),
        acl=who_may_see(acl[hit.document_id] or None for hit in passages),
        kind="refusal" if words == refusal(case.question) else "answer",
        question=case.question,
    )
    return SftRow(prompt=tuple(messages), completion=(Message(role="assistant", content=words),), source=source)


def _hits(client: Client, text: str, place: Placed, path: str | None = None) -> tuple[Hit, ...]:
    request = SearchRequest(
        question=text,
        collection=place.view.name,
        top_k=DEEP,
        retrieval=place.retrieval,
        filters={"path": path} if path else {},
    )
    return client.retrieve(request).hits


def _first_of_each_document(hits: Sequence[Hit]) -> tuple[Hit, ...]:
    return tuple({hit.document_id: hit for hit in reversed(hits)}.values())[::-1]
