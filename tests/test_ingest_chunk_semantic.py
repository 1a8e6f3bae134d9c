"""The strategy `semantic`, with the real embedder: cuts where the subject changes, in English and in Chinese."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from ingest.chunk import split
from ingest.embed import Embedder, TokenCounter, Vectors, load_counter
from ingest.parse import markdown_headings
from ingest.schemas import Chunk, Chunking, ParsedText
from ingest.settings import IngestSettings

PUMPS = (
    "The pump lifts water from the deep well. Its impeller is made of hard iron. "
    "The pump's seals are greased every spring. A worn impeller lowers the pump's pressure. "
)
LEAVE = (
    "Employees have 27 days of annual leave. Unused holidays expire at the end of March. "
    "Requests for leave go to the head of the department. Sick days do not count as holidays. "
)
CHINESE = "水泵从深井抽水。叶轮由硬铁制成！密封每年春天上油。水泵的叶轮磨损会降低压力吗？水泵需要维护。"


@pytest.fixture(scope="module")
def counter(models: Path) -> TokenCounter:
    return load_counter("bge-small-en-v1.5", IngestSettings(models=models))


def chunks_of(text: str, counter: TokenCounter, embedder: Embedder, tokens: int = 224) -> list[Chunk]:
    parsed = ParsedText(text=text, mime="text/markdown", headings=markdown_headings(text))
    return split("d", parsed, Chunking(strategy="semantic", tokens=tokens), counter, embedder.embed)


def test_the_cut_is_within_a_sentence_of_where_the_subject_changes(counter: TokenCounter, embedder: Embedder) -> None:
    first, second = chunks_of(PUMPS + LEAVE, counter, embedder)  # both together would fit
    assert abs(first.text.count(".") - 4) <= 1
    assert second.end == len((PUMPS + LEAVE).rstrip())


def test_chinese_is_cut_at_its_own_full_stops(counter: TokenCounter, embedder: Embedder) -> None:
    chunks = chunks_of(CHINESE, counter, embedder, 24)
    assert len(chunks) > 2
    assert all(chunk.text[-1] in "。！？" for chunk in chunks)


def test_a_heading_stays_with_what_follows_it(counter: TokenCounter, embedder: Embedder) -> None:
    chunks = chunks_of(f"# Pumps\n\n{PUMPS}\n\n# Leave\n\n{LEAVE}", counter, embedder, 40)
    assert sum(chunk.text.startswith("#") for chunk in chunks) >= 1
    assert not any(chunk.text.endswith(("# Pumps", "# Leave")) for chunk in chunks)


def test_each_sentence_is_embedded_once_with_its_neighbours(counter: TokenCounter, embedder: Embedder) -> None:
    asked: list[str] = []

    def embed(texts: Sequence[str]) -> Vectors:
        asked.extend(texts)
        return embedder.embed(texts)

    split("d", ParsedText(text=PUMPS + LEAVE, mime="text/plain"), Chunking(strategy="semantic"), counter, embed)
    assert len(asked) == 8
