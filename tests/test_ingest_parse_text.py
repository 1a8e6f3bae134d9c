"""Front matter, reStructuredText, JSON, tables in text, notebooks, XML; encodings that nothing announces."""

import json

import pytest

from ingest.errors import DocumentError
from ingest.parse import ParseOptions, parse
from ingest.schemas import ParsedText

OPTIONS = ParseOptions(max_chars=50_000_000)
CHINESE = "水泵每年需要维护两次。先切断电源，再检查密封圈。\n" * 3


def read(text: str | bytes, name: str) -> ParsedText:
    return parse(text.encode() if isinstance(text, str) else text, name, OPTIONS)


def titles(parsed: ParsedText) -> list[tuple[int, str, str]]:
    """(level, title, the line that it stands at)."""
    return [(one.level, one.title, parsed.text[one.start :].split("\n")[0]) for one in parsed.headings]


def test_front_matter_becomes_metadata_and_access_and_leaves_the_text() -> None:
    matter = """---
title: "Pumps: care"
reviewed: 2026-03-02
tags: [service, pumps]
acl: [operations, night shift]
metadata:
  owner: Ingrid
  due: 2026-03-02T10:00:00Z
---

# Pumps

Grease them.
"""
    parsed = read(matter, "a.md")
    assert parsed.text == "# Pumps\n\nGrease them.\n"
    assert titles(parsed) == [(1, "Pumps", "# Pumps")]
    assert parsed.acl == ("operations", "night shift")
    assert parsed.metadata == {
        "title": "Pumps: care",
        "reviewed": "2026-03-02",
        "tags": ["service", "pumps"],
        "owner": "Ingrid",
        "due": "2026-03-02T10:00:00+00:00",
    }
    json.dumps(parsed.metadata, allow_nan=False)


@pytest.mark.parametrize(
    ("acl", "groups"), [("acl: operations", ("operations",)), ("acl: []", ()), ("acl: [1]", ("1",)), ("title: x", None)]
)
def test_an_access_list_is_one_group_or_several(acl: str, groups: tuple[str, ...] | None) -> None:
    assert read(f"---\r\n{acl}\r\n---\r\ntext\r\n", "a.md").acl == groups


@pytest.mark.parametrize(
    "text",
    [
        "---\ntitle: [unclosed\n---\nGrease it.\n",
        "---\njust words\n---\nGrease it.\n",
        "---\na: &a [x]\nb: [*a, *a]\n---\nGrease it.\n",
        "---\n\nGrease it, says a text that begins with a rule.\n",
        "Grease it.\n\n---\ntitle: later\n---\n",
    ],
)
def test_what_is_no_front_matter_stays_in_the_text(text: str) -> None:
    parsed = read(text, "a.md")
    assert (parsed.text, parsed.metadata, parsed.acl) == (text, {}, None)


def test_only_markdown_has_front_matter() -> None:
    text = "---\nacl: everyone\n---\nname: x\n"
    assert (read(text, "a.yaml").text, read(text, "a.yaml").acl) == (text, None)


def test_titles_of_restructured_text_are_found_by_their_lines() -> None:
    text = """======
Manual
======

Care
----
Text over
several lines.

Oil
~~~

====  ====
part  life
====  ====
seal  2

Faults
------

::

   Not a title
   ===========
"""
    parsed = read(text, "a.rst")
    assert parsed.text == text
    assert titles(parsed) == [(1, "Manual", "======"), (2, "Care", "Care"), (3, "Oil", "Oil"), (2, "Faults", "Faults")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'Part,Life\n"Seal | ring",2\n"two\nlines",\n\nPump\n'),
        ("a.csv", "Part;Life\nSeal | ring;2\ntwo lines;\n;;\nPump\n"),
        ("a.tsv", "Part\tLife\nSeal | ring\t2\ntwo  lines\t\nPump\n"),
    ],
)
def test_a_table_in_text_becomes_one_markdown_table(name: str, text: str) -> None:
    rows = read(text, name).text.replace(" |  |", " | |").replace("|  | |", "").split("\n")
    assert rows == ["| Part | Life |", "| --- | --- |", r"| Seal \| ring | 2 |", "| two lines | |", "| Pump | |"]


def test_a_longer_row_makes_the_table_wider() -> None:
    assert read("a,b\n1,2,3\n", "a.csv").text == "| a | b |  |\n| --- | --- | --- |\n| 1 | 2 | 3 |"


def test_a_table_is_read_in_its_encoding() -> None:
    assert read("部件,寿命\n密封圈,两年\n".encode("gb18030"), "a.csv").text.endswith("| 密封圈 | 两年 |")
    assert read("ポンプ,年\nシール,2\n".encode("shift_jis"), "a.csv").text.startswith("| ポンプ | 年 |")
    assert read("Größe,cm\nTür,2\n".encode("utf-16"), "a.csv").text.startswith("| Größe | cm |")


def test_json_is_kept_unless_it_cannot_be_read_as_it_is() -> None:
    laid_out = '{\n  "price": 1.10,\n  "name": "泵"\n}\n'
    assert read(laid_out, "a.json").text == laid_out
    assert read(r'{"name": "\u6cf5"}', "a.json").text == '{\n "name": "泵"\n}'
    assert read('{"name": "\\u6cf5"}\n{"b": 2}\n', "a.jsonl").text == '{"name": "泵"}\n{"b": 2}'
    minified = json.dumps([{"part": number} for number in range(1000)])
    assert max(map(len, read(minified, "a.json").text.split("\n"))) < 40
    assert read('{"broken": "\\u6cf5"', "a.json").text == '{"broken": "\\u6cf5"'
    assert read("[" * 100_000, "a.json").text == "[" * 100_000
    assert read(r'{"half": "\ud83d"}', "a.json").text.encode()


def test_a_notebook_is_its_cells_with_code_in_fences() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Flow\n", "\n", "Measured *daily*."]},
        {
            "cell_type": "code",
            "source": "# no heading\nprint(42)",
            "outputs": [
                {"output_type": "stream", "text": ["42\n"]},
                {"output_type": "display_data", "data": {"image/png": "aaaa"}},
            ],
        },
        {"cell_type": "code", "source": "", "outputs": []},
        {"cell_type": "markdown", "source": "## Next"},
    ]
    parsed = read(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4}), "a.ipynb")
    assert parsed.text == (
        "# Flow\n\nMeasured *daily*.\n\n```python\n# no heading\nprint(42)\n```\n\n```\n42\n```\n\n## Next"
    )
    assert titles(parsed) == [(1, "Flow", "# Flow"), (2, "Next", "## Next")]


def test_a_feed_is_its_entries_under_their_titles() -> None:
    feed = """<?xml version="1.0"?><rss version="2.0"><channel><title>Works &amp; news</title>
    <item><title>Valve 7</title><pubDate>Mon, 02 Mar 2026</pubDate>
    <description>&lt;p&gt;It &lt;b&gt;leaks&lt;/b&gt;.&lt;/p&gt;</description></item>
    <item><title>Pump 2</title><description>Greased.</description></item></channel></rss>"""
    parsed = read(feed, "news.xml")
    assert parsed.text == "# Works & news\n\n## Valve 7\n\nMon, 02 Mar 2026\n\nIt leaks.\n\n## Pump 2\n\nGreased."
    assert [title[:2] for title in titles(parsed)] == [(1, "Works & news"), (2, "Valve 7"), (2, "Pump 2")]


def test_xml_is_a_line_for_each_element_with_text() -> None:
    parts = '<parts><part no="7"><name>Seal &amp; ring</name><life unit="y">2</life></part><empty/></parts>'
    assert read(parts, "a.xml").text == "part (no=7)\nname: Seal & ring\nlife (unit=y): 2"
    assert read("<para>Turn <b>it</b> off.</para>", "a.xml").text == "para: Turn it off."
    assert read("<broken>Still text", "a.xml").text == "<broken>Still text"
    bomb = (
        '<!DOCTYPE a [<!ENTITY b "'
        + "x" * 100
        + '">'
        + "".join(f'<!ENTITY b{n} "{f"&b{n - 1 if n else str()};" * 20}">' for n in range(9))
        + "]><a>&b8;</a>"
    )
    assert len(read(bomb, "a.xml").text) < 10_000


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", [CHINESE, "Die Pumpe läuft.\n" * 3, "Насос обслуживают два раза в год.\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.data", "a.html"])
def test_utf_16_is_read_without_a_mark(encoding: str, text: str, name: str) -> None:
    assert read(text.encode(encoding), name).text.split() == text.split()


def test_a_text_with_a_few_broken_bytes_is_still_read() -> None:
    whole = "Größe der Pumpe. " * 100
    assert read(whole.encode() + b"\xc3", "a.txt").text == whole + "\ufffd"
    assert read(whole.encode()[:500] + b"\xff\xfe" + whole.encode(), "a.txt").text.count("Größe") > 120
    assert "line two" in read(b"line one\n" + b"\x81\x8d\n" + b"line two, and more\n" * 30, "a.log").text
    assert read(b"line one\n" + b"\0" * 20 + b"line two\n" * 9, "a.log").text.startswith("line one\nline two")


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.csv", "a.json", "a.rst", "a.py", "a.xml"])
def test_ten_megabytes_in_one_line_are_read(name: str) -> None:
    assert len(read(b"word * _x_ [" * 870_000, name).text) >= 10_000_000


def test_a_text_over_the_limit_is_refused_after_parsing_too() -> None:
    with pytest.raises(DocumentError, match="over INGEST_MAX_TEXT_CHARS"):
        parse(b"a,b\n" * 100, "a.csv", ParseOptions(max_chars=400))
