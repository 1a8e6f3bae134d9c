"""A follow-up question -> what to search for. Pure rules, in English and Chinese; `follow_up` has the engine's way.

A follow-up leans on the turns before it when a pronoun in it has no noun of its own, when it opens or ends as one ("What
about ...", "那……呢"), or, perhaps, when it is too short to say what it is about. Then it is searched for together with the
question before, less what it puts in its place ("What about the H75?" after a question on the K40), and with the names in
the answer before. A question that stands alone is searched for as it is, whatever was talked of.

Words of the wrong subject drown a question: one that stands alone and is searched for with the turn before it is lost. So a
follow-up is searched for in both ways, and the results share the places (`shared`).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from ingest.schemas import Hit
from service.records import Turn

Leaning = Literal["no", "perhaps", "yes"]

LONG = 400  # characters: a question of more says itself what it is about, and of an earlier turn no more is looked at
BACK = 3  # questions that are looked back at, while each leans on the one before
NAMES = 4  # of the answer before, at most
RUN = 3  # places of the rewritten question before one of the question as it is
CARRIED = 3  # cited chunks that take a place without having been found, at most
SHORT, SHORT_ZH = 2, 5  # content words, or Chinese characters, that say too little; a name counts two, or four

_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_WORD = re.compile(r"[A-Za-z0-9\u00c0-\u024f]+(?:[-'’.,][A-Za-z0-9\u00c0-\u024f]+)*")
_CODE = re.compile(r"(?<![\w-])(?=[A-Za-z0-9-]*[A-Za-z])(?=[A-Za-z0-9-]*\d)[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*", re.ASCII)
_FIGURE = re.compile(r"(?<![\w.,-])(?:\d+\.\d+|19\d\d|20\d\d)(?![\w-])", re.ASCII)  # of a release, of a year
_ASKS_FOR_NAME = re.compile(r"\b(?:which|who|whom|whose)\b|哪|谁", re.I)
_NAME = re.compile(r"[A-Z][A-Za-z0-9\u00c0-\u024f’'-]+(?: (?:of |de )?[A-Z][A-Za-z0-9\u00c0-\u024f’'-]*)*")

_EMPTY = frozenset((
    "a", "an", "the", "i", "me", "my", "we", "us", "our", "you", "your", "is", "are", "was", "were", "be", "been",
    "being", "am", "do", "does", "did", "done", "has", "have", "had", "having", "can", "could", "may", "might",
    "must", "shall", "should", "will", "would", "need", "needs", "needed", "of", "in", "on", "at", "to", "for",
    "from", "by", "with", "as", "into", "onto", "about", "than", "so", "if", "and", "or", "but", "not", "no", "nor",
    "only", "also", "very", "just", "there", "here", "which", "who", "whom", "whose", "what", "when", "where",
    "why", "how", "all", "any", "each", "more", "most", "other", "others", "some", "such", "own", "out", "up",
    "down", "over", "under", "again", "once", "per", "much", "many", "long", "often", "far", "big", "large", "high",
    "low", "old", "people", "person", "take", "takes", "taken", "part", "get", "gets", "got", "go", "goes", "gone",
    "make", "makes", "made", "mean", "means", "happen", "happens", "happened", "give", "gives", "given", "work",
    "works", "use", "used", "uses", "time", "times", "it", "its", "they", "them", "their", "theirs", "he", "him",
    "his", "she", "her", "hers", "this", "that", "these", "those", "one", "ones", "then", "former", "latter",
    "same", "instead", "too", "either", "neither", "both", "please", "tell", "know", "want", "like", "ok", "okay",
    "well", "thanks", "thank", "yes", "else", "what's", "it's", "that's", "there's",
))  # fmt: skip
_PRONOUNS = frozenset((
    "it", "its", "it's", "they", "them", "their", "theirs", "he", "him", "his", "she", "her", "hers", "these",
    "those", "former", "latter",
))  # fmt: skip
_AT_END = frozenset((
    "there", "then", "one", "ones", "too", "either", "neither", "instead", "same", "both", "others",
))  # fmt: skip
_BEFORE_THAT = frozenset((
    "is", "are", "was", "were", "do", "does", "did", "can", "could", "will", "would", "should", "must", "may", "if",
    "after", "before", "of", "for", "with", "about", "to", "like", "than", "and", "in", "on", "at", "by", "from",
    "why", "how", "what", "when", "where", "who",
))  # fmt: skip
_OPENING = re.compile(
    r"(?:(?:ok|okay|thanks|thank you|well|so|and|but)[\s,.!]+)*"
    r"(?:what about|how about|why not|why is that|how so|what else|who else|where else|which ones?|the same)\b"
    r"|.*\bthe same\s*(?:true|for|apply|applies|goes?|there|then|thing|with|\?|$)",
    re.I,
)
_JOINED = re.compile(r"(?:(?:ok|okay|thanks|thank you|well)[\s,.!]+)*(?:and|but|or|also|then)\b", re.I)
_DUMMY = re.compile(  # "it" that stands for nothing
    r"\b(?:is|was|isn't) it (?:\w+ )?(?:allowed|possible|necessary|safe|permitted|required|ok|okay|legal|forbidden|mandatory|"
    r"true|normal|important|enough)\b|\bit (?:takes?|costs?) to\b|\bthose (?:who|that|which|of|in)\b",
    re.I,
)
_OPENING_ZH = re.compile(r"\s*(?:那么?|还有|另外|此外|然后|而且?|以及|同样|如果这样)")
_PRONOUN_ZH = re.compile(
    r"它|(?<!其)他(?!人)|她|其(?!他|它|中|实|余|次)|这|那(?!么)|此(?!外|次)|上述|前者|后者|(?<!应)该(?=型|项|泵|站|员工|设备|公司|系统|报告|手册)"
)
_LEFT_OPEN_ZH = re.compile(r"(?:呢[？?。！!\s]*$)|的话")
_EMPTY_ZH = re.compile(
    r"为什么|什么|多少|多久|多长|时候|时间|怎么样?|如何|哪一?[个台天种些里年位]?|几[个天次年台]?|请问|需要|可以|应该|的话|那么?|"
    r"它们?|他们?|她们?|这[个些里样]?|其|[谁吗呢的了是有需要会能应该在为和与及到去过每请也都就还又吧啊呀一被把]"
)


class Search(NamedTuple):
    """What to search for: `text`, and the question as it is too where it `leans` on earlier turns."""

    text: str
    leans: Leaning


class FollowUp(NamedTuple):
    """What a search is told of the turns before it: the question as it was asked, how far it leans on them, and the chunks
    that the answer before cites.
    """

    question: str
    leans: Leaning = "no"
    cited: tuple[str, ...] = ()


def by_rules(question: str, turns: Sequence[Turn]) -> Search:
    """The question itself where it stands alone, or where nobody asked anything before."""
    asked = [seen(turn.content) for turn in turns if turn.role == "user" and turn.content.strip()]
    leaning = leans(question) if asked else "no"
    if leaning == "no":
        return Search(question, "no")
    said = seen(turns[-1].content) if turns[-1].role == "assistant" else ""
    context = [_with_replaced(text, question) for text in _leant_on(asked)]
    known = " ".join([*context, question]).lower()
    given = bool(_CODE.search(question))
    new = (name for name in _names(said) if name.lower() not in known and not (given and _CODE.search(name)))
    named = list(dict.fromkeys(new))[:NAMES]
    if named and _ASKS_FOR_NAME.search(asked[-1]) and _refers(question):  # then the pronoun stands for what was named
        context = [" ".join(dict.fromkeys(_names(text))) for text in context]
    text = " ".join(part for part in (*context, *named, question.strip()) if part)
    return Search(text, leaning)


def shared(leaning: Leaning, rewritten: Sequence[Hit], as_is: Sequence[Hit], limit: int) -> list[Hit]:
    """The best of both results, each hit once. Where it leans, three of four places are the rewritten question's; where it
    does perhaps, the question as it is comes first and they take turns.
    """
    first, second, run = (rewritten, as_is, RUN) if leaning == "yes" else (as_is, rewritten, 1)
    order: list[Hit] = []
    for at in range(max(-(-len(first) // run), len(second))):
        order += [*first[at * run : (at + 1) * run], *second[at : at + 1]]
    return once(order)[:limit]


def once(hits: Iterable[Hit]) -> list[Hit]:
    """Each chunk, and of parts of one parent the first."""
    best: dict[object, Hit] = {}
    for hit in hits:
        best.setdefault((hit.document_id, hit.parent) if hit.parent else hit.chunk_id, hit)
    return list(best.values())


def with_cited(hits: Sequence[Hit], cited: Sequence[Hit], limit: int) -> list[Hit]:
    """The best `limit` hits; what was cited before and is not among them takes the last places, a third at most."""
    found = list(hits[:limit])
    missing = once([*found, *cited])[len(found) :][: min(CARRIED, limit // 3)]
    return [*hits[: limit - len(missing)], *missing]


def leans(question: str) -> Leaning:
    """Whether it can be understood without the turns before it."""
    text = question.strip()
    if len(text) > LONG:
        return "no"
    return _leans_zh(text) if _CJK.search(text) else _leans_en(text)


def subject(question: str, search: str) -> str:
    """What a sentence is chosen by: the question, or what was searched for where no word of the question says anything."""
    text = question[:LONG]
    says = _weight_zh(text) + len(_CODE.findall(text)) if _CJK.search(text) else _weight(text)
    return question if says else search


def _leans_en(text: str) -> Leaning:
    joined, weight = bool(_JOINED.match(text)), _weight(text)
    if _OPENING.match(text) or _refers(text) or (joined and weight <= SHORT + 2):
        return "yes"
    return "perhaps" if weight <= SHORT else "no"


def _refers(text: str) -> bool:
    """Whether it has a pronoun, and no three content words before it that could be its noun."""
    words = [word.lower() for word in _WORD.findall(_DUMMY.sub(" ", text))]
    last = len(words) - 1
    for at, word in enumerate(words):
        refers = word in _PRONOUNS or (at == last and word in _AT_END) or _is_demonstrative(words, at)
        if refers and (at == last or _weight(" ".join(words[:at])) <= SHORT):
            return True
    return False


def _is_demonstrative(words: Sequence[str], at: int) -> bool:
    """For "that" only where it can be no conjunction."""
    if words[at] == "this":
        return words[at + 1 : at + 2] not in (["year"], ["month"], ["week"], ["morning"], ["company"])
    return words[at] == "that" and (at == 0 or words[at - 1] in _BEFORE_THAT or at == len(words) - 1)


def _weight(text: str) -> int:
    """Content words, a name's counting twice; the capital letter at the start makes none."""
    words = _WORD.findall(text)
    content: list[str] = [word for word in words if word.lower() not in _EMPTY]
    names = [word for word in content if _CODE.fullmatch(word) or (word[0].isupper() and word != words[0])]
    return len(content) + len(names)


def _leans_zh(text: str) -> Leaning:
    bare = _CODE.sub("", text)
    opening = _OPENING_ZH.match(bare)
    rest = bare[opening.end() :] if opening else bare
    pronoun = _PRONOUN_ZH.search(rest)
    if pronoun and _weight_zh(rest[: pronoun.start()]) <= SHORT_ZH:
        return "yes"
    weight = _weight_zh(rest) + 4 * len(_CODE.findall(text))
    if (opening or _LEFT_OPEN_ZH.search(text)) and weight <= SHORT_ZH + 4:
        return "yes"
    return "perhaps" if weight <= SHORT_ZH else "no"


def _weight_zh(text: str) -> int:
    characters: list[str] = _CJK.findall(_EMPTY_ZH.sub("", text))
    return len(characters) + 2 * len(_WORD.findall(text))


def _leant_on(asked: Sequence[str]) -> list[str]:
    """The last question, and those before it as far as each leans on the next; in their order."""
    found = [asked[-1]]
    for earlier in reversed(asked[-BACK:-1]):
        if leans(found[0]) == "no":
            break
        found.insert(0, earlier)
    return found


def _with_replaced(earlier: str, question: str) -> str:
    """An earlier question with the follow-up's name or figure in the place of the one of its kind; without them where there
    are several, since it cannot be told which is meant.
    """
    for kind in (_CODE, _FIGURE):
        given = dict.fromkeys(kind.findall(question))
        others = [one for one in dict.fromkeys(kind.findall(earlier)) if one not in given]
        new = next(iter(given)) if len(given) == len(others) == 1 else ""
        for old in others if given else ():
            earlier = _put(earlier, old, new)
    return " ".join(earlier.split())


def _put(text: str, old: str, new: str) -> str:
    """`new` for the word `old` and, since that is its maker or series, the word with a capital letter before it."""

    def put(found: re.Match[str]) -> str:
        return found["before"] + new if (found["before"] or "").strip().lower() in _EMPTY else new

    return re.sub(rf"(?P<before>\b[A-Z][a-z]+ )?(?<![\w.,-]){re.escape(old)}(?![\w-])", put, text, flags=re.ASCII)


def _names(said: str) -> Iterator[str]:
    """Names with digits, and words with a capital letter that does not come from the start of a sentence."""
    yield from _CODE.findall(said)
    for found in _NAME.finditer(said):
        before = said[: found.start()].rstrip()
        if before and before[-1] not in ".!?:\n•*-" and not _CODE.fullmatch(found[0]):
            yield found[0]


def seen(text: str) -> str:
    """Of a long turn its start and its end, one of which asks."""
    text = " ".join(text[: 4 * LONG].split()) if len(text) <= 4 * LONG else f"{text[:LONG]} {text[-LONG:]}"
    return text if len(text) <= LONG else f"{text[: LONG // 2]} {text[-LONG // 2 :]}"
