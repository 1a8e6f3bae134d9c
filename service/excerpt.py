"""What a prompt shows of a passage: its label, its text under its context, its best sentence. Pure.

Prompt versions are made of this, so what it gives for a passage and a question never changes.
"""

import re

from ingest.schemas import Hit
from service.guard import is_instruction, neutral, stated
from service.sentences import NOTHING, Content, content, split_sentences, statements

NEAR_CHARS = 560  # of what `near` shows; of three passages about 400 tokens
_TITLE = re.compile(r"\A\s*(?:#{1,6} [^\n]*\n\s*)+")


class Passage:
    """A passage as templates see it: `n`, `path`, `page`, `heading`, `title`, `label`, `text`, `near` and `best`.

    `guarded`: what imitates the frame of a prompt is defused; no sentence that speaks to the model is the best one, and no
    path or heading that does is shown.
    """

    FIELDS = frozenset({"n", "path", "page", "heading", "title", "label", "text", "near", "best"})

    def __init__(self, n: int, hit: Hit, question: str, guarded: bool) -> None:
        self.n = n
        self.page = hit.page
        self._hit = hit
        self._question = question
        self._guarded = guarded

    @property
    def path(self) -> str:
        return self._named(self._hit.path)

    @property
    def heading(self) -> str:
        """From the title of the document down, as "Heron H75 > Oil"; empty where there is none."""
        return self._named(self._hit.heading or "")

    @property
    def title(self) -> str:
        """The last part of the heading."""
        return self._named((self._hit.heading or "").rpartition(" > ")[2])

    @property
    def label(self) -> str:
        """As "(pumps/heron.md, page 2, Heron H75 > Oil)"."""
        page = f", page {self.page}" if self.page else ""
        heading = f", {self.heading}" if self.heading else ""
        return f"({self.path}{page}{heading})"

    @property
    def text(self) -> str:
        return self._shown(_under_context(self._hit, self._hit.text))

    @property
    def near(self) -> str:
        """The sentences in a row that fit the question best, within NEAR_CHARS."""
        return self._shown(_under_context(self._hit, nearest(self._question, self._hit)))

    @property
    def best(self) -> str:
        """The sentence that fits the question best."""
        return self._shown(_under_context(self._hit, best_sentence(self._question, self._hit, self._guarded)))

    def _shown(self, text: str) -> str:
        return neutral(text) if self._guarded else text

    def _named(self, text: str) -> str:
        """A name that speaks to the model is left out."""
        return "" if self._guarded and is_instruction(text) else self._shown(text)


def nearest(question: str, hit: Hit, chars: int = NEAR_CHARS) -> str:
    """The run of whole sentences of a passage, within `chars`, that shares most with the question; of equals the first and
    longest. A passage that fits is given whole, without the title that it begins with, and a sentence that does not fit is cut
    at a word.
    """
    whole = _TITLE.sub("", hit.text) or hit.text
    if len(whole) <= chars:
        return whole
    asked = content(question)
    spans = split_sentences(whole)
    worth = [_shared(asked, content(whole[start:end])) for start, end in spans]
    best, best_score = (0, 0), (-1.0, 0)
    for first, (start, _) in enumerate(spans):
        last = first
        while last + 1 < len(spans) and spans[last + 1][1] - start <= chars:
            last += 1
        score = (round(sum(worth[first : last + 1]), 9), spans[last][1] - start)
        if score[0] > best_score[0] or (score[0] == best_score[0] and score[1] > best_score[1]):
            best, best_score = (start, spans[last][1]), score
    text = whole[best[0] : best[1]]
    return text if len(text) <= chars else text[:chars].rpartition(" ")[0] or text[:chars]


def best_sentence(question: str, hit: Hit, guarded: bool = False) -> str:
    """The sentence of a passage that shares most with the question; what only its heading says counts half. A passage that
    states nothing is given whole; `guarded`, one that only speaks to the model is given as "".
    """
    asked, above = content(question), content(hit.heading or "")
    best, best_score = hit.text, -1.0
    if guarded and is_instruction(hit.text):
        best = ""
    for start, end in statements(hit.text, hit.heading):
        if guarded:
            end = stated(hit.text, start, end)
        sentence = _unwrapped(hit.text[start:end].rstrip())
        held = content(sentence)
        score = _shared(asked, held) + 0.5 * _shared(asked, above, without=held)
        if held.words and (score, -len(sentence)) > (best_score, -len(best)):
            best, best_score = sentence, score
    return best


def _shared(asked: Content, held: Content, without: Content = NOTHING) -> float:
    """The share of the question's words, and half a point for each of its numbers and names."""
    words = len(asked.words & held.words - without.words) / max(1, len(asked.words))
    exact = len(asked.numbers & held.numbers - without.numbers) + len(asked.names & held.names - without.names)
    return words + 0.5 * exact


def _unwrapped(text: str) -> str:
    """On one line, without a list's mark; between Chinese characters a line break is no space."""
    text = re.sub(r"\A(?:[-*•]|\d+[.)])\s+", "", text)
    return re.sub(r"\s*\n\s*", " ", re.sub(r"(?<=[^\x00-\xff])\s*\n\s*(?=[^\x00-\xff])", "", text))


def _under_context(hit: Hit, text: str) -> str:
    """What the passage is read under, such as its table's header or the signatures around its code, and a text of it. A
    heading path is in the label already.
    """
    if not hit.context or (hit.heading or "").endswith(hit.context):
        return text
    return f"{hit.context}\n{text}"
