"""Sentences of an answer that streams, each kept back until it is complete and its support is known."""

import re
from collections.abc import Sequence

from service.schemas import Sentence
from service.sentences import split_sentences

_MARKERS_TO_COME = re.compile(r"\s*(?:\[[\d\s,，、]*\]?\s*)*")  # a marker behind the full stop belongs to the sentence


class Sentences:
    """Takes the text in pieces of any length; gives whole sentences, each with the white space in front of it."""

    def __init__(self) -> None:
        self._text = ""

    def feed(self, piece: str) -> list[str]:
        """-> the sentences that are complete by now: text follows that is not theirs."""
        self._text += piece
        whole: list[str] = []
        while len(spans := split_sentences(self._text)) > 1:
            end = spans[0][1]
            if _MARKERS_TO_COME.fullmatch(self._text[end:]):
                break
            whole.append(self._text[:end])
            self._text = self._text[end:]
        return whole

    def rest(self) -> list[str]:
        """-> what is left at the end of the answer."""
        ends = [end for _, end in split_sentences(self._text)]
        return [self._text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def stands(sentences: Sequence[Sentence]) -> bool:
    """Whether passages support each sentence of an answer; one that claims nothing does not count as an answer here."""
    return bool(sentences) and all(one.supported and one.citations for one in sentences)
