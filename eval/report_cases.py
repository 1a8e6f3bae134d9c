"""What a report shows of single cases: the worst ones side by side with their passages, and those that moved most."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from eval.compare import shared
from eval.report_figures import LOWER_IS_BETTER, first_relevant, scores
from eval.schemas import AnswerCase, Passage, Ranked, RetrievalCase, Run
from ingest.language import detect

WORST = 20
MOVED = 8
SEEN = (3, 5)  # passages of a case that are seen at once: of retrieval, of answers
PASSAGES = 10  # of a case, and those further down that are relevant
SENTENCES = 12
GOLD = 5
CUT = {"question": 300, "gold": 300, "answer": 2000, "passage": 1500, "quote": 240, "name": 120}
OPENING = 240  # characters of a passage that are seen at once; half of them where they are Chinese
UNSUPPORTED = {
    "number": "a number or name that its sources do not hold",
    "words": "its sources hold too little of it",
    "citation": "what it cites is no passage of the prompt, or does not say so",
}
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8}){0,3}")
_TOO_SHORT = 24  # characters, to tell a language of Latin script by
_BY_SCRIPT = ("zh", "ja", "ko")


class Text(NamedTuple):
    """`parts`: (text, whether it is the gold answer); `left_out`: characters; `opening`: its first lines, where it is long."""

    parts: list[tuple[str, bool]]
    language: str | None
    left_out: int = 0
    opening: list[tuple[str, bool]] | None = None


class Quote(NamedTuple):
    number: str
    place: str
    text: Text


class Said(NamedTuple):
    """A sentence of an answer. `supported`: None where it was not checked. `why` it is not, in words."""

    text: Text
    supported: bool | None
    why: str
    quotes: list[Quote]


class Found(NamedTuple):
    """A passage or document, as it was ranked."""

    rank: int
    document: str
    score: float
    text: Text | None
    relevant: bool
    outside: bool  # of the prompt


class Bad(NamedTuple):
    """One of the worst cases. `in_sentences`: the sentences say all of the answer. `found` are the first ones, `folded` those
    after them, `further` the relevant ones among and beyond these. `missed`: relevant documents that were not found.
    """

    case: RetrievalCase | AnswerCase
    scores: dict[str, float]
    question: Text
    turns: list[tuple[str, Text]]
    gold: list[Text]
    gold_left_out: int
    answer: Text | None
    sentences: list[Said]
    sentences_left_out: int
    in_sentences: bool
    found: list[Found]
    folded: list[Found]
    further: list[Found]
    found_left_out: int
    missed: list[str]
    missed_left_out: int
    first_relevant: int | None
    before: float | None  # its main score then


class Move(NamedTuple):
    id: str
    question: Text
    before: float
    after: float
    change: float
    said: tuple[str, str] | None  # first relevant rank or answer, then and now


def worst(run: Run, metric: str | None, before: Run | None) -> tuple[list[Bad], int]:
    """-> the worst cases, the worst first, and how many are bad: not good, or below a full score."""
    earlier = {one.case.id: scores(one) for one in before.cases} if before else {}
    bad = sorted((one for one in run.cases if _is_bad(one, metric)), key=lambda one: _badness(one, metric))
    return [_bad(one, earlier.get(one.case.id, {}).get(metric or "")) for one in bad[:WORST]], len(bad)


def _is_bad(one: RetrievalCase | AnswerCase, metric: str | None) -> bool:
    if isinstance(one, AnswerCase):
        judged = one.blame is not None or not scores(one).keys().isdisjoint({metric, "good"})
        return judged and not one.good
    return metric in scores(one) and scores(one)[metric] < 1


def _badness(one: RetrievalCase | AnswerCase, metric: str | None) -> tuple[float, float, str]:
    rank = first_relevant(one) if isinstance(one, RetrievalCase) else 0
    return scores(one).get(metric or "", 1.0), float("-inf") if rank is None else -rank, one.case.id


def moved(before: Run, after: Run, metric: str) -> tuple[list[Move], list[Move]]:
    """-> the cases that won most by a metric, and that lost most."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    same = set(shared(before, after))
    earlier = {one.case.id: one for one in before.cases if one.case.id in same}
    moves = []
    for now in after.cases:
        then = earlier.get(now.case.id)
        if then and metric in scores(then) and metric in scores(now):
            change = scores(now)[metric] - scores(then)[metric]
            if abs(change) > 1e-9:
                moves.append((sign * change, then, now))
    moves.sort(key=lambda one: (-abs(one[0]), one[2].case.id))
    won = [(then, now) for gain, then, now in moves if gain > 0][:MOVED]
    lost = [(then, now) for gain, then, now in moves if gain < 0][:MOVED]
    return [_move(then, now, metric) for then, now in won], [_move(then, now, metric) for then, now in lost]


def _move(then: RetrievalCase | AnswerCase, now: RetrievalCase | AnswerCase, metric: str) -> Move:
    said = None
    if isinstance(now, RetrievalCase) and isinstance(then, RetrievalCase):
        said = (_rank_said(then), _rank_said(now))
    elif isinstance(now, AnswerCase) and isinstance(then, AnswerCase):
        said = (shorten(then.answer, CUT["name"]), shorten(now.answer, CUT["name"]))
    was, is_now = scores(then)[metric], scores(now)[metric]
    return Move(now.case.id, _plain(now.case.question, CUT["quote"], _language(now)), was, is_now, is_now - was, said)


def _rank_said(one: RetrievalCase) -> str:
    rank = first_relevant(one)
    return f"rank {rank}" if rank else f"not in the first {len(one.ranked)}" if one.ranked else "nothing found"


def _bad(one: RetrievalCase | AnswerCase, before: float | None) -> Bad:
    case, language = one.case, _language(one)
    listed = one.ranked if isinstance(one, RetrievalCase) else one.passages
    found = _found(one, listed, language)
    first = SEEN[0] if isinstance(one, RetrievalCase) else SEEN[1]
    ids = {ranked.document for ranked in listed}
    missed = [document for document, grade in case.relevant.items() if grade >= 1 and document not in ids]
    answer: Text | None = None
    said: tuple[dict[str, Any], ...] = ()
    citations: tuple[dict[str, Any], ...] = ()
    if isinstance(one, AnswerCase):
        answer, said, citations = _plain(one.answer, CUT["answer"], language), one.sentences, one.citations
    return Bad(
        one,
        scores(one),
        question=_plain(case.question, CUT["question"], language),
        turns=[(turn.role, _plain(turn.content, CUT["quote"], language)) for turn in case.turns],
        gold=[_plain(gold, CUT["gold"], language) for gold in case.answers[:GOLD]],
        gold_left_out=max(0, len(case.answers) - GOLD),
        answer=answer,
        sentences=[_said(sentence, citations, language) for sentence in said[:SENTENCES]],
        sentences_left_out=max(0, len(said) - SENTENCES),
        in_sentences=bool(said)
        and len(said) <= SENTENCES
        and _bare(said) == "".join(getattr(one, "answer", "").split()),
        found=found[:first],
        folded=[ranked for ranked in found[first:] if not ranked.relevant],
        further=[ranked for ranked in found[first:] if ranked.relevant],
        found_left_out=len(listed) - len(found),
        missed=missed[:PASSAGES],
        missed_left_out=max(0, len(missed) - PASSAGES),
        first_relevant=next((ranked.rank for ranked in found if ranked.relevant), None),
        before=before,
    )


def _found(one: RetrievalCase | AnswerCase, listed: Sequence[Ranked | Passage], language: str | None) -> list[Found]:
    case = one.case
    marked = _gold(case.answers) if case.kind != "yes_no_maybe" else None
    kept = [
        (rank, ranked)
        for rank, ranked in enumerate(listed, 1)
        if rank <= PASSAGES or case.relevant.get(ranked.document, 0) >= 1
    ]
    return [
        Found(
            rank,
            ranked.document,
            ranked.score,
            _long(ranked.text, marked, language) if ranked.text else None,
            relevant=case.relevant.get(ranked.document, 0) >= 1,
            outside=isinstance(ranked, Passage) and not ranked.in_prompt,
        )
        for rank, ranked in kept[: 2 * PASSAGES]
    ]


def _bare(sentences: Sequence[dict[str, Any]]) -> str:
    return "".join("".join(str(one.get("text", "")).split()) for one in sentences)


def _said(sentence: dict[str, Any], citations: Sequence[dict[str, Any]], language: str | None) -> Said:
    supported, numbers = sentence.get("supported"), sentence.get("citations") or ()
    by_number = {citation.get("n"): citation for citation in citations}
    quotes = [_quote(number, by_number.get(number, {}), language) for number in numbers]
    return Said(
        _plain(str(sentence.get("text", "")), CUT["answer"] // 4, language),
        supported if isinstance(supported, bool) else None,
        UNSUPPORTED.get(sentence.get("unsupported") or "", ""),
        quotes[:5],
    )


def _quote(number: Any, citation: dict[str, Any], language: str | None) -> Quote:
    page = f", page {citation['page']}" if citation.get("page") else ""
    place = f"{citation['path']}{page}" if citation.get("path") else "not among the citations of the answer"
    return Quote(str(number), place, _plain(str(citation.get("quote") or ""), CUT["quote"], language))


def shorten(text: str, limit: int) -> str:
    """-> the text in one line, cut between words where it has some."""
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else _between_words(line, limit) + " …"


def _plain(text: str, limit: int, language: str | None) -> Text:
    kept = text if len(text) <= limit else _between_words(text, limit)
    return Text([(kept, False)], _tag(kept, language), len(text) - len(kept))


def _long(text: str, marked: re.Pattern[str] | None, language: str | None) -> Text:
    kept = text if len(text) <= CUT["passage"] else _between_words(text, CUT["passage"])
    tag = _tag(kept, language)
    seen = OPENING // 2 if (tag or "")[:2] in _BY_SCRIPT else OPENING
    opening = _parts(_between_words(kept, seen), marked) if len(kept) > 1.3 * seen else None
    return Text(_parts(kept, marked), tag, len(text) - len(kept), opening)


def _between_words(text: str, limit: int) -> str:
    cut = text[:limit]
    space = max(cut.rfind(" "), cut.rfind("\n"))
    return cut[:space] if space > limit - 40 else cut


def _gold(answers: Iterable[str]) -> re.Pattern[str] | None:
    """-> what finds the gold answers in a text: as whole words, but for Chinese."""
    wanted = sorted({" ".join(answer.split()) for answer in answers if 0 < len(answer.strip()) <= CUT["gold"]}, key=len)
    if not wanted:
        return None
    forms = (r"\s+".join(map(re.escape, answer.split())) for answer in reversed(wanted))
    return re.compile(
        "|".join(rf"(?<![^\W\u3040-\u9fff]){form}(?![^\W\u3040-\u9fff])" for form in forms), re.IGNORECASE
    )


def _parts(text: str, marked: re.Pattern[str] | None) -> list[tuple[str, bool]]:
    parts, end = [], 0
    for match in marked.finditer(text) if marked else ():
        parts += [(text[end : match.start()], False), (match.group(), True)]
        end = match.end()
    return [part for part in [*parts, (text[end:], False)] if part[0]]


def _language(one: RetrievalCase | AnswerCase) -> str | None:
    said = one.case.slices.get("language", "")
    return said if _LANGUAGE.fullmatch(said) else None


def _tag(text: str, language: str | None) -> str | None:
    """-> the language to tag a text with; a passage may be in another one than its question."""
    found = _detect(text[:400])
    if language and language[:2] == found:
        return language
    if found not in _BY_SCRIPT and len(text) < _TOO_SHORT:
        return language if language and language[:2] not in _BY_SCRIPT else None
    return None if found == "und" else found


@lru_cache(maxsize=4096)
def _detect(text: str) -> str:
    return detect(text)
