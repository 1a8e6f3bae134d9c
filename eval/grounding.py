"""Does an answer rest on what was retrieved? Its sentences and citations against the hits, judged apart from the service.

The service looks for the span of one or two sentences that fits best, and marks its own work. Here a text *holds* a sentence
when all its numbers and names with digits stand anywhere in the text (or in the heading and context that the text was shown
under), and of its content words at least HELD_SHARE. Content words, numbers and names are those of `service.cite.content`.
A sentence without any of these, such as "Yes.", claims nothing and is not counted.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from eval.answer_metrics import markers, plain
from ingest.schemas import Hit
from service.cite import Content, content
from service.schemas import Citation, Sentence

HELD_SHARE = 0.75
_LIST_ITEM = re.compile(r"\A\s*(?:[-*•]|\d{1,3}[.)])\s+")


class Link(NamedTuple):
    """A sentence's citation: `rank` of the hit that it points into, from 1, or None where no hit in the prompt has that
    span; `supports`: the hit holds the sentence.
    """

    sentence: int
    rank: int | None
    supports: bool


class Grounding(NamedTuple):
    """Scores, 0 to 1, and for each that there is none of, why.

    `citation_precision`: the share of the citations (of sentence and hit) whose hit holds the sentence.
    `citation_recall`: the share of the claiming sentences that at least one of their citations supports.
    `gold_citation`: the share of the citations that point into a relevant document.
    `faithfulness`: the share of the claiming sentences that the texts in the prompt hold, all taken together.
    `faithful_numbers`: the share of the answer's different numbers and names with digits that stand in these texts.
    """

    scores: dict[str, float]
    missing: dict[str, str]
    links: tuple[Link, ...]


def ground(
    sentences: Sequence[Sentence], citations: Sequence[Citation], shown: Sequence[Hit], relevant: Sequence[bool] | None
) -> Grounding:
    """`shown`: the hits that the prompt held. `relevant`: of each, whether its document is; None where nobody knows."""
    links = link(sentences, citations, shown)
    claims = {at: said for at, one in enumerate(sentences) if any(said := claim(one.text))}
    counted = [one for one in links if one.sentence in claims]
    supported = {one.sentence for one in counted if one.supports}
    together = _held(shown)
    exact = frozenset[str]().union(*(said.numbers | said.names for said in claims.values()))
    ratios: dict[str, tuple[int, int, str]] = {
        "citation_precision": (sum(one.supports for one in counted), len(counted), "the answer cites nothing"),
        "citation_recall": (len(supported), len(claims), "the answer claims nothing"),
        "faithfulness": (
            sum(holds(together, said) for said in claims.values()),
            len(claims),
            "the answer claims nothing",
        ),
        "faithful_numbers": (len(exact & (together.numbers | together.names)), len(exact), "the answer has no number"),
    }
    if relevant is not None:
        gold = sum(one.rank is not None and relevant[one.rank - 1] for one in counted)
        ratios["gold_citation"] = (gold, len(counted), "the answer cites nothing")
    if not shown:
        return Grounding({}, dict.fromkeys(ratios, "no passage was in the prompt"), links)
    scores = {name: part / whole for name, (part, whole, _) in ratios.items() if whole}
    return Grounding(scores, {name: why for name, (_, whole, why) in ratios.items() if not whole}, links)


def link(sentences: Sequence[Sentence], citations: Sequence[Citation], shown: Sequence[Hit]) -> tuple[Link, ...]:
    """One of each sentence and hit, however many spans of the hit it cites: by the citations, and by each [n] in its words
    that the service made none of. A number that nothing explains has no hit.
    """
    by_number = {one.n: one for one in citations}
    links: dict[tuple[int, int | None], Link] = {}
    for at, sentence in enumerate(sentences):
        said = claim(sentence.text)
        ranks = [_rank(by_number[n], shown) if n in by_number else None for n in sentence.citations]
        written = set(markers(sentence.text)) - set(sentence.citations)
        for rank in (*ranks, *(n if 1 <= n <= len(shown) else None for n in sorted(written))):
            links[at, rank] = Link(at, rank, rank is not None and holds(_held([shown[rank - 1]]), said))
    return tuple(links.values())


def holders(sentences: Iterable[Sentence], shown: Sequence[Hit]) -> tuple[int, ...]:
    """-> the ranks of the hits that hold every claiming sentence of the answer; none where it claims nothing."""
    claims = [said for one in sentences if any(said := claim(one.text))]
    return tuple(n for n, hit in enumerate(shown, 1) if claims and all(holds(_held([hit]), said) for said in claims))


def claim(sentence: str) -> Content:
    """What a sentence says, without the markers of its citations and the number of its list item."""
    return content(_LIST_ITEM.sub("", plain(sentence)))


def holds(text: Content, said: Content) -> bool:
    if not (said.numbers <= text.numbers and said.names <= text.names):
        return False
    return not said.words or len(said.words & text.words) / len(said.words) >= HELD_SHARE


def _rank(citation: Citation, shown: Sequence[Hit]) -> int | None:
    for rank, hit in enumerate(shown, 1):
        if hit.document_id == citation.document_id and hit.start <= citation.start and citation.end <= hit.end:
            return rank
    return None


def _held(hits: Sequence[Hit]) -> Content:
    return content("\n".join(f"{hit.heading or ''}\n{hit.context or ''}\n{hit.text}" for hit in hits))
