"""Chunks: exact offsets, the token limit, nothing lost, and ids that stay."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ingest.chunk import split
from ingest.chunk_piece import STRETCH
from ingest.embed import TokenCounter, load_counter
from ingest.parse import markdown_headings
from ingest.schemas import Chunk, Chunking, Heading, PageSpan, ParsedText
from ingest.settings import IngestSettings

DOCUMENT = "0b3c1c1e-0000-5000-8000-000000000000"
SENTENCES = [
    "The pump stops.", "Check the seal.", "Grease the bearings every 2,000 running hours with 35 g per nipple.",
    "水泵每年需要维护两次。", "先切断电源，再打开泵盖，并检查密封圈是否磨损。", "Die Wartung erfolgt jährlich!", "Why? Because.",
    "😀 👩‍🔧 ok",
    "https://example.org/" + "path/" * 40, "x" * 300, "ab" * 450, "水" * 400, "e\u0301a\u0308" * 30, "a.b.c.d" * 40,
]  # fmt: skip
ROWS = [
    "| part | hours |",
    "|---|---|",
    "| bearing | 2,000 |",
    "| 轴承 | 2000 |",
    "2024-01-03;Millbrook;pump 2;clogged",
]
TITLES = ["# Pump", "## Service", "### 三、定期保养", "## Pump", "Setext\n======"]
GAPS = ["\n\n", "\n", " ", "\n\n\n\n", "\t", "  ", "\r\n", "\u3000", "", "\n \n"]

pieces = st.one_of(st.sampled_from(SENTENCES), st.sampled_from(ROWS), st.sampled_from(TITLES), st.text(max_size=60))
texts = st.lists(st.tuples(pieces, st.sampled_from(GAPS)), min_size=1, max_size=40).map(
    lambda parts: "".join(part + gap for part, gap in parts)
)


@pytest.fixture(scope="module")
def counter(models: Path) -> TokenCounter:
    return load_counter("bge-small-en-v1.5", IngestSettings(models=models))


def chunks_of(text: str, counter: TokenCounter, tokens: int = 32, overlap: int = 0) -> list[Chunk]:
    parsed = ParsedText(text=text, mime="text/markdown", headings=markdown_headings(text))
    return split(DOCUMENT, parsed, Chunking(tokens=tokens, overlap=overlap), counter)


@given(text=texts, tokens=st.sampled_from([16, 32, 100]), overlap=st.sampled_from([0, 8]))
@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_chunks_are_stretches_of_the_text_in_order_within_the_limit_and_lose_nothing(
    counter: TokenCounter, text: str, tokens: int, overlap: int
) -> None:
    chunks = chunks_of(text, counter, tokens, overlap)
    covered = bytearray(len(text))
    for chunk in chunks:
        assert text[chunk.start : chunk.end] == chunk.text
        assert chunk.text.strip()
        assert len(counter.ids(chunk.text)) <= tokens
        covered[chunk.start : chunk.end] = b"\1" * (chunk.end - chunk.start)
    starts, ends = [chunk.start for chunk in chunks], [chunk.end for chunk in chunks]
    assert starts == sorted(starts)
    assert ends == sorted(set(ends))
    assert [chunk.ordinal for chunk in chunks] == list(range(len(chunks)))
    assert len({chunk.id for chunk in chunks}) == len(chunks)
    lost = "".join(character for place, character in enumerate(text) if not covered[place])
    assert not lost.strip()


def test_the_embedders_own_limit_holds_when_the_collection_asks_for_more(counter: TokenCounter) -> None:
    parsed = ParsedText(text="The pump stops. " * 400, mime="text/plain")
    chunks = split(DOCUMENT, parsed, Chunking(tokens=4000), counter)
    assert counter.max_tokens == 510
    assert max(len(counter.ids(chunk.text)) for chunk in chunks) <= 510
    assert len(chunks) == 4


def test_repeated_sentences_each_have_their_own_place(counter: TokenCounter) -> None:
    text = "Check the seal. Open the valve. " * 60
    chunks = chunks_of(text, counter)
    assert all(before.end < after.start for before, after in pairwise(chunks))
    assert chunks[-1].end == len(text.rstrip())


@pytest.mark.parametrize("unit", ["The pump of station seven stops. ", "x", "pump,"])
def test_a_section_longer_than_the_splitter_gets_at_once_loses_nothing(counter: TokenCounter, unit: str) -> None:
    text = unit * (2 * STRETCH // len(unit) + 7)
    chunks = chunks_of(text, counter, 400)
    assert all(len(counter.ids(chunk.text)) <= 400 for chunk in chunks)
    spans = [(0, 0), *((chunk.start, chunk.end) for chunk in chunks), (len(text), len(text))]
    assert all(not text[before[1] : after[0]].strip() for before, after in pairwise(spans))
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_inserted_text_leaves_the_ids_of_all_other_chunks(counter: TokenCounter) -> None:
    sections = [f"## Part {n}\n\nPart {n} weighs {n * 7} kg. It is kept in store {n}.\n\n" for n in range(8)]
    before = {chunk.id: chunk.text for chunk in chunks_of("".join(sections), counter)}
    inserted = [*sections[:3], "## New part\n\nA section that was not there.\n\n", *sections[3:]]
    after = {chunk.id: chunk.text for chunk in chunks_of("".join(inserted), counter)}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1


def test_an_edited_sentence_changes_the_id_of_its_own_chunk_alone(counter: TokenCounter) -> None:
    text = "".join(f"## Part {n}\n\nPart {n} weighs {n * 7} kg.\n\n" for n in range(8))
    before = [chunk.id for chunk in chunks_of(text, counter)]
    after = [chunk.id for chunk in chunks_of(text.replace("21 kg", "22 kg"), counter)]
    assert [one == other for one, other in zip(before, after, strict=True)].count(False) == 1


def test_the_same_text_in_another_document_has_another_id(counter: TokenCounter) -> None:
    parsed = ParsedText(text="The pump stops.", mime="text/plain")
    ids = {
        split(document, parsed, Chunking(), counter)[0].id for document in (DOCUMENT, DOCUMENT.replace("0b3c", "0b3d"))
    }
    assert len(ids) == 2


def test_overlap_repeats_the_end_of_the_chunk_before_at_a_word(counter: TokenCounter) -> None:
    text = " ".join(f"Sentence number {n} speaks of the pump." for n in range(40))
    chunks = chunks_of(text, counter, 32, overlap=10)
    assert len(chunks) > 5
    for before, after in pairwise(chunks):
        shared = text[after.start : before.end]
        assert shared
        assert len(counter.ids(shared)) <= 10
        assert text[after.start - 1] == " "
        assert len(counter.ids(after.text)) <= 32


def test_a_chunk_names_the_path_of_headings_above_it(counter: TokenCounter) -> None:
    text = (
        "Preface.\n\n# Pumps\n\n## Service\n\nGrease it.\n\n### Bearings\n\nReplace them.\n\n## Faults\n\nIt hums.\n\n"
        "# Valves\n\nOpen slowly.\n"
    )
    by_text = {chunk.text.splitlines()[-1]: chunk.heading for chunk in chunks_of(text, counter)}
    assert by_text == {
        "Preface.": None,
        "Grease it.": "Pumps > Service",
        "Replace them.": "Pumps > Service > Bearings",
        "It hums.": "Pumps > Faults",
        "Open slowly.": "Valves",
    }


def test_no_chunk_reaches_over_a_heading_into_the_next_section(counter: TokenCounter) -> None:
    text = "".join(f"## Part {n}\n\nShort.\n\n" for n in range(5))
    assert [chunk.text for chunk in chunks_of(text, counter, 100)] == [f"## Part {n}\n\nShort." for n in range(5)]


def test_a_chunk_names_the_page_that_it_begins_on(counter: TokenCounter) -> None:
    pages = [f"Page {n}. " + f"It tells of station {n}. " * 8 for n in (1, 2, 4)]  # page 3 is empty
    text = "\n\n".join(pages)
    spans, at = [], 0
    for number, page in zip((1, 2, 4), pages, strict=True):
        spans.append(PageSpan(number=number, start=at, end=at + len(page)))
        at += len(page) + 2
    parsed = ParsedText(text=text, mime="application/pdf", pages=tuple(spans))
    chunks = split(DOCUMENT, parsed, Chunking(tokens=32), counter)
    assert {chunk.page for chunk in chunks} == {1, 2, 4}
    for chunk in chunks:
        (around,) = [span for span in spans if span.start <= chunk.start < span.end + 2]
        assert chunk.page == around.number


def test_headings_without_any_text_between_them_stay_together(counter: TokenCounter) -> None:
    text = "Pumps\nService\nGrease it every year."
    headings = (Heading(level=1, start=0, title="Pumps"), Heading(level=2, start=6, title="Service"))
    parsed = ParsedText(text=text, mime="text/html", headings=headings)
    assert [chunk.text for chunk in split(DOCUMENT, parsed, Chunking(), counter)] == [
        "Pumps\nService\nGrease it every year."
    ]


def test_each_chunk_of_a_mixed_document_has_its_own_language(counter: TokenCounter) -> None:
    text = "# A\n\nThe pump holds three litres of oil and is checked each year.\n\n# B\n\n水泵每年需要维护两次，先切断电源。\n"
    assert [chunk.language for chunk in chunks_of(text, counter)] == ["en", "zh"]


def test_to_split_takes_no_more_memory_than_it_needs() -> None:
    """What is installed for other parts of the product is not loaded with the splitter, into each parser."""
    script = (
        "import sys\n"
        "from ingest.chunk import split\n"
        "from ingest.embed import TokenCounter\n"
        "from ingest.schemas import Chunking, ParsedText\n"
        "text = ParsedText(text='One sentence. And another one. ' * 40, mime='text/plain')\n"
        "assert split('d', text, Chunking(tokens=32), TokenCounter(lambda text: list(range(len(text.split()))), 510))\n"
        "assert 'nltk' in sys.modules\n"
        "print(*{'scipy', 'sklearn', 'pandas', 'matplotlib', 'torch'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
