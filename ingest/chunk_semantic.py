"""The strategy `semantic`: LlamaIndex' SemanticSplitterNodeParser over our embedder.

It embeds every sentence together with its two neighbours, so it costs about three times what embedding the text costs.
"""

import re
from collections.abc import Callable, Iterator, Sequence, Set
from itertools import pairwise

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.node_parser import SemanticSplitterNodeParser
from llama_index.core.node_parser.text.utils import split_by_sentence_tokenizer
from llama_index.core.schema import Document

from ingest.chunk_piece import Budget, Piece, lay, sentence_spans, stretches
from ingest.embed import Vectors
from ingest.schemas import ParsedText

BATCH = 256  # texts given to the embedder at once
FULL = 0.75  # of the limit: how large the groups are on average
_END = re.compile(
    r"[。！？]+[”’」』）]*|\n(?:[^\S\n]*\n)+|\n(?=[ \t]*(?:[-*•|]|#+|\d+[.)])[ \t])"
)  # that Punkt does not see


def by_meaning(parsed: ParsedText, budget: Budget, embed: Callable[[Sequence[str]], Vectors]) -> Iterator[Piece]:
    """Cuts where neighbouring sentences differ most; as many cuts as bring the groups near the limit. What is over it is
    cut by sentence.
    """
    text = parsed.text
    titles = {heading.start for heading in parsed.headings}
    for start, end in stretches(text, 0, len(text)):
        sentences = _sentences(text[start:end], start, titles)
        for group in lay(text, start, end, _groups(sentences, budget, embed)):
            if budget.fits(text[slice(*group)]):
                yield Piece(*group)
                continue
            for part in sentence_spans(text, *group, budget.fill(), budget):
                yield Piece(*part)


def _groups(sentences: list[str], budget: Budget, embed: Callable[[Sequence[str]], Vectors]) -> list[str]:
    text = "".join(sentences)
    if len(sentences) < 2:
        return [text.strip()]
    groups = budget.count(text) / (FULL * budget.fill())
    percentile = round(100 * max(0.0, 1 - groups / len(sentences)))
    splitter = SemanticSplitterNodeParser.from_defaults(
        embed_model=_Embedding(embed),
        breakpoint_percentile_threshold=min(percentile, 95),  # LlamaIndex' own: a short text is cut, too
        sentence_splitter=lambda _: sentences,
        include_metadata=False,
        include_prev_next_rel=False,
    )
    nodes = splitter.build_semantic_nodes_from_documents([Document(text=text)])
    return [node.get_content().strip() for node in nodes]


def _sentences(text: str, at: int, titles: Set[int]) -> list[str]:
    """They join to the text, but for white space before the first. Punkt finds those that end in a full stop; added are
    the Chinese ones, paragraphs and items of lists. A heading stays with what follows: `titles` are where the headings'
    lines begin, and `at` is where `text` does.
    """
    found: list[str] = []
    at += len(text) - len(text.lstrip())
    open_title = False
    for sentence in split_by_sentence_tokenizer()(text):
        ends = [*(match.end() for match in _END.finditer(sentence)), len(sentence)]
        for start, end in pairwise([0, *ends]):
            unit = sentence[start:end]
            if found and (open_title or not unit.strip()):
                found[-1] += unit
            elif unit:
                found.append(unit)
            if unit.strip():
                open_title = at + start in titles and "\n" not in unit.strip()
        at += len(sentence)
    return found


class _Embedding(BaseEmbedding):
    """Ours, as LlamaIndex asks for one."""

    _embed: Callable[[Sequence[str]], Vectors] = PrivateAttr()

    def __init__(self, embed: Callable[[Sequence[str]], Vectors]) -> None:
        super().__init__(model_name="graft", embed_batch_size=BATCH)
        self._embed = embed

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self._embed(texts).tolist()
        return vectors

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)
