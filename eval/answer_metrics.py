"""How well an answer says what a case's gold answers say. Pure functions; text is tokenised by its language.

English and every spaced language after SQuAD (Rajpurkar et al. 2016): lower case, no punctuation (of any script, as in
MLQA), no articles; F1 over the bag of words. Chinese after CMRC 2018 (Cui et al. 2019): lower case, no punctuation, each
Chinese character a token and what stands between them split at white space; F1 over the longest common run of tokens. Of
several gold answers the best one counts. ROUGE-L is the rouge-score package's, over tokens of either script.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from eval.schemas import Case
from service.cite import split_sentences
from service.refusal import is_refusal as refuses

GOOD_F1 = 0.5  # from here on an answer counts as good
DECISIONS = ("yes", "no", "maybe")

_MARKER = re.compile(r"\s*\[\d{1,3}(?:\s*[,，、]\s*\d{1,3})*\]")
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_WORD = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\u3040-\u30ff]|[^\W_\u3400-\u4dbf\u4e00-\u9fff\u3040-\u30ff]+")
_SEPARATOR = re.compile(r"(?<=\d)[.,](?=\d)")  # within a number
_FIRST_WORD = re.compile(r"[^\W_]+")


class Abstention(NamedTuple):
    """Refusing as a decision, of which an unanswerable case is the positive one; None where it is not defined."""

    precision: float | None
    recall: float | None
    f1: float | None


def plain(answer: str) -> str:
    """Without the markers of citations, such as [1] and [2, 3]."""
    return _MARKER.sub("", answer).strip()


def markers(answer: str) -> tuple[int, ...]:
    """The numbers of passages that stand in it."""
    return tuple(int(n) for marker in _MARKER.findall(answer) for n in re.findall(r"\d+", marker))


def is_refusal(answer: str, finish_reason: str) -> bool:
    """The service refused, or each sentence of the answer says that the documents do not say, in whatever words."""
    said = plain(answer)
    sentences = [said[start:end] for start, end in split_sentences(said)]
    return finish_reason == "refused" or (bool(sentences) and all(map(refuses, sentences)))


def is_chinese(case: Case) -> bool:
    """Whether the CMRC rules score it: its language says so, or a gold answer has a Chinese character."""
    return case.slices.get("language", "").startswith("zh") or any(map(_CHINESE.search, case.answers))


def rouge_words(text: str) -> list[str]:
    """Lower case, parted by punctuation; each Chinese or Japanese character is one."""
    return _WORD.findall(text.lower())


def squad_words(text: str) -> list[str]:
    return _ARTICLE.sub(" ", _without_punctuation(text.lower())).split()


def cmrc_words(text: str) -> list[str]:
    """A separator within a number stays, as in "3.2"."""
    held = _SEPARATOR.sub(lambda match: "\ue000" if match.group() == "." else "\ue001", text.lower())
    bare = _without_punctuation(held).replace("\ue000", ".").replace("\ue001", ",")
    return _CHINESE.sub(lambda match: f" {match.group()} ", bare).split()


def exact_match(answer: str, golds: Sequence[str], chinese: bool = False) -> float:
    """1 or 0. White space beside a Chinese character says nothing."""
    words = cmrc_words if chinese else squad_words
    said = words(answer)
    return float(any(said == words(gold) for gold in golds))


def token_f1(answer: str, golds: Sequence[str], chinese: bool = False) -> float:
    """0 to 1. Where one side has no tokens, 1 if neither has any, else 0."""
    words, shared = (cmrc_words, _longest_run) if chinese else (squad_words, _in_both)
    said = words(answer)
    return max((_f1(said, words(gold), shared) for gold in golds), default=0.0)


def contains(text: str, golds: Sequence[str], chinese: bool = False) -> float:
    """1 where the words of a gold answer stand in the text side by side, else 0.

    Whole words: 7 is not in 27, and a decimal point stays, so 32 is not in 3.2. A gold answer without a word is in none.
    """
    held = f" {' '.join(_contained_words(text, chinese))} "
    wanted = [" ".join(_contained_words(gold, chinese)) for gold in golds]
    return float(any(f" {gold} " in held for gold in wanted if gold))


def rouge_l(answer: str, golds: Sequence[str]) -> float:
    """The F-measure of ROUGE-L (Lin 2004), 0 to 1, without stemming."""
    scorer = _rouge_scorer()
    return max((float(scorer.score(gold, answer)["rougeL"].fmeasure) for gold in golds), default=0.0)


def decision(answer: str) -> str | None:
    """What a free answer decides: its first word, where that is yes, no or maybe; else None, which is scored as wrong."""
    first = _FIRST_WORD.search(plain(answer))
    return first.group().lower() if first and first.group().lower() in DECISIONS else None


def is_decided(case: Case) -> bool:
    """Whether a yes, no or maybe is asked for: its kind says so, or it has no other gold answer."""
    return case.kind == "yes_no_maybe" or {gold.lower() for gold in case.answers} in ({"yes"}, {"no"}, {"maybe"})


def answer_scores(case: Case, answer: str, refused: bool) -> tuple[dict[str, float], dict[str, str]]:
    """-> (scores, why there is none). A refusal is scored as an empty answer.

    `abstention`: refused where the case is unanswerable, and not where it is answerable; the same apart as `abstained` and
    `answered`. `good`: answerable and right (`accuracy`; else `f1` from GOOD_F1 on, or `contains`), or unanswerable and
    refused. `rouge_l` of a yes, no or maybe is that of its long answer. An unanswerable case has no other score.
    """
    if not case.answerable:
        return dict.fromkeys(("abstained", "abstention", "good"), float(refused)), {}
    scores = dict.fromkeys(("answered", "abstention"), float(not refused))
    said = "" if refused else plain(answer)
    if is_decided(case):
        gold = next((one.lower() for one in case.answers if one.lower() in DECISIONS), None)
        if case.long_answer:
            scores["rouge_l"] = rouge_l(said, [case.long_answer])
        if gold is None:
            return scores, dict.fromkeys(("accuracy", "good"), "the case has no gold decision")
        right = float(decision(said) == gold)
        return scores | {"accuracy": right, "good": right}, {}
    if not case.answers:
        names = ("exact_match", "f1", "rouge_l", "contains", "good")
        return scores, dict.fromkeys(names, "the case has no gold answer")
    chinese = is_chinese(case)
    scores |= {
        "exact_match": exact_match(said, case.answers, chinese),
        "f1": token_f1(said, case.answers, chinese),
        "rouge_l": rouge_l(said, case.answers),
        "contains": contains(said, case.answers, chinese),
    }
    return scores | {"good": float(scores["f1"] >= GOOD_F1 or scores["contains"] == 1)}, {}


def abstention(cases: Sequence[tuple[bool, bool]]) -> Abstention:
    """`cases`: (answerable, refused) of each."""
    refused = sum(refused for _, refused in cases)
    unanswerable = sum(not answerable for answerable, _ in cases)
    right = sum(refused and not answerable for answerable, refused in cases)
    return Abstention(
        precision=right / refused if refused else None,
        recall=right / unanswerable if unanswerable else None,
        f1=2 * right / (refused + unanswerable) if unanswerable else None,
    )


def _without_punctuation(text: str) -> str:
    return "".join(char for char in text if not _is_punctuation(char))


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char)[0] == "P"


def _contained_words(text: str, chinese: bool) -> list[str]:
    """As CMRC's, without thousands separators; punctuation but full stops parts words: 1990-1994 are two."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    parted = "".join(" " if _is_punctuation(char) and char not in ".," else char for char in text)
    words = cmrc_words(parted)
    return words if chinese else [word for word in words if not _ARTICLE.fullmatch(word)]


def _f1(said: list[str], gold: list[str], shared: Callable[[list[str], list[str]], int]) -> float:
    if not said or not gold:
        return float(said == gold)
    common = shared(said, gold)
    return 2 * common / (len(said) + len(gold))


def _in_both(said: list[str], gold: list[str]) -> int:
    return (Counter(said) & Counter(gold)).total()


def _longest_run(said: list[str], gold: list[str]) -> int:
    """-> the length of the longest run of tokens that both have."""
    longest, ending = 0, [0] * (len(gold) + 1)  # ending[j]: of the run that ends at gold[j - 1] and the token before
    for token in said:
        ending = [0, *(ending[j] + 1 if token == gold[j] else 0 for j in range(len(gold)))]
        longest = max(longest, *ending)
    return longest


class _Tokens:
    """As the rouge-score package's own tokenizer for ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return rouge_words(text)


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Tokens())
