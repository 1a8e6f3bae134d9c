"""Every strategy: exact offsets, the limit, nothing lost, ids of their own; and what each of them promises."""

import gc
import hashlib
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ingest.chunk import split
from ingest.embed import TokenCounter, Vectors, load_counter, unit
from ingest.errors import SettingsError
from ingest.parse import markdown_headings
from ingest.schemas import Chunk, Chunking, PageSpan, ParsedText, Strategy
from ingest.settings import IngestSettings

DOCUMENT = "0b3c1c1e-0000-5000-8000-000000000000"
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
PROSE = [
    "The pump stops.", "Grease the bearings every 2,000 running hours with 35 g per nipple.", "Why? Because.",
    "水泵每年需要维护两次。", "先切断电源，再打开泵盖，并检查密封圈是否磨损！", "😀 👩‍🔧 ok",
    "https://example.org/" + "path/" * 40, "x" * 300,
    "水" * 200, "e\u0301a\u0308" * 30, "\u0301", "\ufdfa" * 9, "\u200b", "a.b.c.d" * 30, "# Pump", "## Service",
    "### 三、定期保养 " + "und Pflege " * 30, "Setext\n======",
]  # fmt: skip
TABLE = [
    "| part | hours |\n|---|---|\n", "|a|\n|-|\n", "|" + " long header |" * 30 + "\n" + "|:-:" * 30 + "|\n", "|---|\n",
    "| bearing | 2,000 |\n", "| 轴承 | 2000 |\n", "|" + " cell |" * 60 + "\n", "| " + "word " * 80 + "| \\| |\n",
    "  | x\n", "|\n",
]  # fmt: skip
CODE = [
    "class Pump(Base):\n", "    def start(self, speed: int = 3) -> None:\n", "        self.speed = speed + 1\n", "@cached\n",
    "def stop(): return {'a': [1, 2, (3, 4)]}\n", "        if speed > 3:\n            raise ValueError('zu schnell – 太快')\n",
    "x = '''" + "long text " * 60 + "'''\n", "y = " + "1 + " * 200 + "0\n", "z = " + "[" * 90 + "]" * 90 + "\n", "}}}\n",
    "# 注释 " * 20 + "\n", "export function go(a) { return a }\n", "\t\n", "'\n",
]  # fmt: skip
GAPS = ["\n\n", "\n", " ", "\n\n\n\n", "\t", "  ", "\r\n", "\u3000", "", "\n \n", " " * 50]

pieces = st.one_of(st.sampled_from(PROSE), st.sampled_from(TABLE), st.sampled_from(CODE), st.text(max_size=60))
mixed = st.lists(st.tuples(pieces, st.sampled_from(GAPS)), min_size=1, max_size=40).map(
    lambda parts: "".join(part + gap for part, gap in parts)
)
tables = st.lists(st.sampled_from([*TABLE, "Text.\n", "# Title\n"]), min_size=1, max_size=40).map("".join)
sources = st.lists(st.sampled_from(CODE), min_size=1, max_size=60).map("".join)
MIMES = [
    "text/markdown",
    "text/x-python",
    "text/x-javascript",
    "text/x-tsx",
    "text/x-cpp",
    "text/x-ruby",
    "text/x-cobol",
]


@pytest.fixture(scope="module")
def counter(models: Path) -> TokenCounter:
    return load_counter("bge-small-en-v1.5", IngestSettings(models=models))


def embed(texts: Sequence[str]) -> Vectors:
    """Words to directions; enough to differ."""
    rows = np.zeros((len(texts), 64), dtype=np.float32)
    for row, text in zip(rows, texts, strict=True):
        for word in text.split() or [""]:
            row[hashlib.sha256(word.encode()).digest()[0] % 64] += 1
    return unit(rows)


def chunks_of(
    text: str, counter: TokenCounter, strategy: Strategy, tokens: int = 32, mime: str = "text/markdown", **fields: int
) -> list[Chunk]:
    parsed = ParsedText(text=text, mime=mime, headings=markdown_headings(text) if mime == "text/markdown" else ())
    return split(DOCUMENT, parsed, Chunking(strategy=strategy, tokens=tokens, **fields), counter, embed)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(
    text=st.one_of(mixed, tables, sources),
    tokens=st.sampled_from([16, 33, 100]),
    overlap=st.sampled_from([0, 8, 60]),
    mime=st.sampled_from(MIMES),
    cut=st.sampled_from([0, 40, 400]),
)
@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_chunks_are_stretches_in_order_within_the_limit_that_lose_nothing(
    counter: TokenCounter, strategy: Strategy, text: str, tokens: int, overlap: int, mime: str, cut: int
) -> None:
    headings = markdown_headings(text) if mime == "text/markdown" else ()
    spans = [(start, min(start + cut, len(text))) for start in range(0, len(text), cut)] if cut else []
    pages = tuple(PageSpan(number=n, start=start, end=end) for n, (start, end) in enumerate(spans, 1))
    parsed = ParsedText(text=text, mime=mime, headings=headings, pages=pages)
    chunking = Chunking(strategy=strategy, tokens=tokens, overlap=overlap)
    chunks = split(DOCUMENT, parsed, chunking, counter, embed)
    covered = bytearray(len(text))
    for chunk in chunks:
        assert text[chunk.start : chunk.end] == chunk.text
        assert chunk.text.strip()
        assert len(counter.ids(chunk.searched)) <= tokens
        assert not chunk.context or len(counter.ids(chunk.context)) <= tokens // 3
        assert chunk.searched.endswith(chunk.text)
        covered[chunk.start : chunk.end] = b"\1" * (chunk.end - chunk.start)
        assert (chunk.parent is not None) == (strategy == "hierarchical")
        if chunk.parent:
            assert chunk.parent.start <= chunk.start < chunk.end <= chunk.parent.end
            assert len(counter.ids(text[chunk.parent.start : chunk.parent.end])) <= 4 * tokens
    starts, ends = [chunk.start for chunk in chunks], [chunk.end for chunk in chunks]
    assert starts == sorted(starts)
    assert ends == sorted(set(ends))
    assert [chunk.ordinal for chunk in chunks] == list(range(len(chunks)))
    assert len({chunk.id for chunk in chunks}) == len(chunks)
    lost = "".join(character for place, character in enumerate(text) if not covered[place])
    assert not lost.strip()
    assert chunks == split(DOCUMENT, parsed, chunking, counter, embed)


# token


def test_token_windows_are_full_whatever_the_sentences(counter: TokenCounter) -> None:
    text = "The pump of station seven stops. # Not a heading\n" * 40
    chunks = chunks_of(text, counter, "token", 40)
    assert {len(counter.ids(chunk.text)) for chunk in chunks[:-1]} <= {39, 40}


def test_spaces_between_columns_do_not_make_windows_small(counter: TokenCounter) -> None:
    text = "\n".join(f"pump{' ' * 40}hours{' ' * 40}four" for _ in range(40))
    chunks = chunks_of(text, counter, "token", 30)
    assert all(len(counter.ids(chunk.text)) >= 28 for chunk in chunks[:-1])


# heading

MANUAL = (
    "# Heron\n\nAbout it.\n\n## Care\n\n### Oil\n\nChange it every year.\n\n### Seals\n\n"
    + "The seal of the shaft is looked at each month. " * 12
    + "\n"
)


def test_heading_gives_one_chunk_a_section_under_its_path(counter: TokenCounter) -> None:
    chunks = chunks_of(MANUAL, counter, "heading", 60)
    assert [chunk.text for chunk in chunks[:2]] == [
        "# Heron\n\nAbout it.",
        "## Care\n\n### Oil\n\nChange it every year.",
    ]
    assert [chunk.context for chunk in chunks] == ["Heron", "Heron > Care > Oil", *["Heron > Care > Seals"] * 3]
    assert chunks[2].text.startswith("### Seals")
    assert chunks[3].searched.startswith("Heron > Care > Seals\nThe seal")
    assert all(chunk.heading == chunk.context for chunk in chunks)


def test_a_long_heading_path_keeps_its_end(counter: TokenCounter) -> None:
    text = "# " + "Very long chapter title " * 6 + "\n\n## Oil\n\nChange it.\n"
    assert chunks_of(text, counter, "heading", 30)[0].context == "Oil"


def test_overlap_stays_within_the_section(counter: TokenCounter) -> None:
    chunks = chunks_of(MANUAL, counter, "heading", 60, overlap=12)
    seals = [chunk for chunk in chunks if chunk.heading == "Heron > Care > Seals"]
    assert len(seals) > 2
    assert seals[0].text.startswith("### Seals")
    assert all(after.start < before.end for before, after in pairwise(seals))


# hierarchical


def test_parents_are_whole_sections_and_tile_the_text(counter: TokenCounter) -> None:
    text = "".join(
        f"{'#' if n % 4 == 0 else '##'} Part {n}\n\n" + f"Part {n} weighs {n} kg and stands in hall {n}. " * 4 + "\n\n"
        for n in range(12)
    )
    chunks = chunks_of(text, counter, "hierarchical", 32, parent_tokens=400)
    parents = sorted({(chunk.parent.start, chunk.parent.end) for chunk in chunks if chunk.parent})
    assert [text[start:end].splitlines()[0] for start, end in parents] == ["# Part 0", "# Part 4", "# Part 8"]
    assert all(not text[before[1] : after[0]].strip() for before, after in pairwise(parents))
    assert len(chunks) == 24
    assert chunks[0].heading == "Part 0"


def test_a_section_over_the_parents_size_is_cut_at_a_sentence(counter: TokenCounter) -> None:
    text = "The pump of station seven stops at night. " * 60
    chunks = chunks_of(text, counter, "hierarchical", 32)
    parents = sorted({(chunk.parent.start, chunk.parent.end) for chunk in chunks if chunk.parent})
    assert len(parents) == 5
    assert all(text[start:end].endswith("night.") for start, end in parents)
    assert all(100 < len(counter.ids(text[start:end])) <= 128 for start, end in parents[:-1])


# page


def paged(pages: Sequence[str]) -> ParsedText:
    spans, at = [], 0
    for number, page in enumerate(pages, 1):
        spans.append(PageSpan(number=number, start=at, end=at + len(page)))
        at += len(page) + 2
    return ParsedText(text="\n\n".join(pages), mime="application/pdf", pages=tuple(spans))


def test_page_gives_one_chunk_a_page_and_cuts_a_long_one_by_sentence(counter: TokenCounter) -> None:
    pages = ["First page.", "It tells of station two. " * 12, "Third. And more."]
    chunks = split(DOCUMENT, paged(pages), Chunking(strategy="page", tokens=40, overlap=8), counter)
    assert [chunk.page for chunk in chunks] == [1, *[2] * (len(chunks) - 2), 3]
    assert (chunks[0].text, chunks[-1].text) == ("First page.", "Third. And more.")
    assert len(chunks) > 3
    assert all(chunk.text.endswith("two.") for chunk in chunks[1:-1])


def test_page_without_pages_is_by_sentence(counter: TokenCounter) -> None:
    assert chunks_of(MANUAL, counter, "page") == chunks_of(MANUAL, counter, "sentence")


# semantic


def test_semantic_without_an_embedder_says_so(counter: TokenCounter) -> None:
    with pytest.raises(SettingsError, match="semantic"):
        split(DOCUMENT, paged(["Text."]), Chunking(strategy="semantic"), counter)


# all


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("unit_text", "mime"),
    [
        ("ab cd\n", "text/markdown"),
        ("word ", "text/plain"),
        ("# T\n\nx\n\n", "text/markdown"),
        ("| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 50, "text/markdown"),
        ("a=1;", "text/x-javascript"),
        ("[", "text/x-python"),
        ("q" * 50 + ",", "text/plain"),
    ],
    ids=["lines", "one line", "sections", "tables", "minified", "nested", "long words"],
)
def test_four_times_the_text_takes_about_four_times_the_time(
    counter: TokenCounter, strategy: Strategy, unit_text: str, mime: str
) -> None:
    def seconds(size: int) -> float:
        text = unit_text * (size // len(unit_text))
        start = time.thread_time()
        chunks_of(text, counter, strategy, 224, mime)
        return time.thread_time() - start

    gc.collect()
    gc.disable()  # a full collection takes as long as all that other tests have loaded, which is not the text's
    try:
        seconds(5_000)
        small, large = seconds(20_000), seconds(80_000)
    finally:
        gc.enable()
    assert large < 10 * small + 0.5
