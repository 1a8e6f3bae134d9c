"""The strategy `table`: rows whole, the header in front of every part, nothing of the text around it lost."""

from pathlib import Path

import pytest

from ingest.chunk import split
from ingest.embed import TokenCounter, load_counter
from ingest.parse import markdown_headings
from ingest.schemas import Chunk, Chunking, ParsedText
from ingest.settings import IngestSettings

HEADER = "| part | hours |\n|---|---|"
ROWS = [f"| bearing {n} | {n * 100} |" for n in range(40)]


@pytest.fixture(scope="module")
def counter(models: Path) -> TokenCounter:
    return load_counter("bge-small-en-v1.5", IngestSettings(models=models))


def chunks_of(text: str, counter: TokenCounter, tokens: int = 64, overlap: int = 0) -> list[Chunk]:
    parsed = ParsedText(text=text, mime="text/markdown", headings=markdown_headings(text))
    return split("d", parsed, Chunking(strategy="table", tokens=tokens, overlap=overlap), counter)


def test_every_part_holds_whole_rows_under_the_header(counter: TokenCounter) -> None:
    text = "Before the table.\n\n" + "\n".join([HEADER, *ROWS]) + "\n\nAfter it."
    before, *parts, after = chunks_of(text, counter, overlap=8)
    assert (before.text, after.text) == ("Before the table.", "After it.")
    assert parts[0].context is None
    assert parts[0].text.startswith(HEADER)
    assert len(parts) > 3
    assert {part.context for part in parts[1:]} == {HEADER}
    assert [row for part in parts for row in part.text.removeprefix(HEADER).strip().split("\n")] == ROWS


def test_a_table_stays_with_the_heading_right_above_it(counter: TokenCounter) -> None:
    first, second = chunks_of(f"# A\n\nText.\n\n## Hours\n\n{HEADER}\n{ROWS[0]}\n", counter)
    assert first.text == "# A\n\nText."
    assert second.text == f"## Hours\n\n{HEADER}\n{ROWS[0]}"
    assert second.heading == "A > Hours"


def test_a_row_over_the_limit_is_cut_between_cells(counter: TokenCounter) -> None:
    cells = [f"cell {n} of the row" for n in range(30)]
    parts = chunks_of("\n".join(["| n |", "|---|", "| 1 |", "| " + " | ".join(cells) + " |"]), counter, 40)
    cut = [part for part in parts if "cell" in part.text]
    assert len(cut) > 3
    assert all(part.context == "| n |\n|---|" for part in cut)
    assert [cell.strip() for part in cut for cell in part.text.strip("| ").split("|")] == cells


def test_a_header_too_wide_for_a_third_of_the_limit_keeps_its_end(counter: TokenCounter) -> None:
    wide = "| " + " | ".join(f"column {n}" for n in range(30)) + " |"
    rule = "|" + "---|" * 30
    parts = chunks_of("\n".join([wide, rule, *ROWS]), counter, 64)
    contexts = {part.context for part in parts if part.context}
    assert len(contexts) == 1
    assert contexts.pop().endswith("column 29 |")


@pytest.mark.parametrize("text", ["| a | b |\n| c | d |", "a | b\n---|---", "|---|\n| a |"])
def test_lines_without_a_header_and_a_rule_are_text(counter: TokenCounter, text: str) -> None:
    assert [(chunk.text, chunk.context) for chunk in chunks_of(text, counter)] == [(text, None)]


def test_a_hundred_thousand_rows(counter: TokenCounter) -> None:
    text = "\n".join([HEADER, *("| ab | 1 |" for _ in range(100_000))])
    parts = chunks_of(text, counter, 448)
    assert sum(part.text.count("\n") + 1 for part in parts) == 100_002
