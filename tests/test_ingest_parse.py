"""One file's bytes -> text with structure: the examples, encodings, and files that cannot be read."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from docx import Document
from reportlab.pdfgen.canvas import Canvas

from ingest.errors import DocumentError
from ingest.parse import UnreadableTypeError, markdown_headings, parse
from ingest.schemas import ParsedText
from ingest.settings import CHECKOUT

EXAMPLES = CHECKOUT / "examples"
GERMAN = "Die Pumpe läuft ölgeschmiert. Der Schlüssel hängt an der Tür.\n" * 3
CHINESE = "水泵每年需要维护两次。先切断电源，再检查密封圈。\n" * 3


def read(path: str) -> ParsedText:
    return parse((EXAMPLES / path).read_bytes(), path, 1_000_000)


def pdf(*pages: str, password: str | None = None) -> bytes:
    out = io.BytesIO()
    canvas = Canvas(out, encrypt=password)
    for page in pages:
        if page:
            canvas.drawString(72, 700, page)
        canvas.showPage()
    canvas.save()
    return out.getvalue()


def outline(parsed: ParsedText) -> list[tuple[int, str]]:
    return [(heading.level, heading.title) for heading in parsed.headings]


def test_the_offsets_of_a_pdf_page_hold_that_page() -> None:
    parsed = parse(pdf("First page.", "", "The third page.", "Last page."), "a.pdf", 1000)
    pages = {page.number: parsed.text[page.start : page.end] for page in parsed.pages}
    assert pages == {1: "First page.", 3: "The third page.", 4: "Last page."}


@pytest.mark.parametrize(
    ("path", "marks"),
    [
        ("reports/millbrook-commissioning.pdf", {1: "1. Scope", 2: "4. Hydraulic tests", 3: "7. Acceptance"}),
        ("zh/linjiang-commissioning.pdf", {1: "一、工程概况", 2: "六、遗留问题与验收"}),
    ],
)
def test_the_example_pdfs_are_read_page_by_page(path: str, marks: dict[int, str]) -> None:
    parsed = read(path)
    assert [page.number for page in parsed.pages] == list(marks)
    for page in parsed.pages:
        assert marks[page.number] in parsed.text[page.start : page.end]
    assert parsed.text == "\n\n".join(parsed.text[page.start : page.end] for page in parsed.pages)
    assert parsed.metadata["title"]


@pytest.mark.parametrize(
    ("path", "titles"),
    [
        (
            "policies/leave-and-expenses.docx",
            [(1, "Leave and expenses policy"), (2, "1. Annual leave"), (3, "4.3 Claims")],
        ),
        ("policies/safety-rules.html", [(1, "Safety rules for all sites"), (2, "4. Chemicals")]),
        ("faq.html", [(2, "Water quality"), (3, "How hard is my water?"), (2, "Moving house")]),
        ("zh/employee-handbook.docx", [(1, "清禾水务员工手册"), (3, "2.1 年休假"), (2, "七、离职")]),
        ("reports/millbrook-commissioning.pdf", [(2, "1. Scope"), (1, "6. Open points")]),
    ],
)
def test_headings_of_other_formats_stand_at_their_line_of_the_text(path: str, titles: list[tuple[int, str]]) -> None:
    parsed = read(path)
    assert [title for title in outline(parsed) if title in titles] == titles
    for heading in parsed.headings:
        line = parsed.text[heading.start :].split("\n", 1)[0]
        assert " ".join(line.split()) == heading.title
        assert heading.start == 0 or parsed.text[heading.start - 1] == "\n"


def test_headings_of_the_same_words_each_have_their_own_place() -> None:
    page = "".join(f"<h1>Pump {n}</h1><h2>Service</h2><p>Service</p><p>Every {n} years.</p>" for n in range(3))
    parsed = parse(f"<html><body>{page}</body></html>".encode(), "a.html", 1000)
    assert outline(parsed) == [
        (1, "Pump 0"),
        (2, "Service"),
        (1, "Pump 1"),
        (2, "Service"),
        (1, "Pump 2"),
        (2, "Service"),
    ]
    starts = [heading.start for heading in parsed.headings]
    assert starts == sorted(set(starts))
    assert starts[3] == parsed.text.index("Service", parsed.text.index("Pump 1"))


def test_a_word_file_keeps_its_paragraphs_and_names_its_author() -> None:
    document = Document()
    document.add_heading("Service plan", 1)
    document.add_paragraph("Grease the bearings.")
    document.add_paragraph("Grease the bearings.")
    document.core_properties.author = "Ingrid Sallow"
    out = io.BytesIO()
    document.save(out)
    parsed = parse(out.getvalue(), "plan.docx", 1000)
    assert parsed.text.split() == ["Service", "plan", "Grease", "the", "bearings.", "Grease", "the", "bearings."]
    assert outline(parsed) == [(1, "Service plan")]
    assert parsed.metadata["authors"] == ["Ingrid Sallow"]


def test_markup_and_scripts_are_no_text() -> None:
    page = b"<html><head><style>p {color: red}</style></head><body><script>alert(1)</script><p>Open the valve.</p></body></html>"
    assert parse(page, "a.html", 1000).text.strip() == "Open the valve."


def test_markdown_is_kept_byte_for_byte_with_its_line_ends() -> None:
    text = "# Pumps\r\n\r\nGrease *them*.\r\n\r\nFaults\r\n------\r\n\r\n```\r\n# no heading\r\n```\r\nIt hums.\r\n"
    parsed = parse(text.encode(), "a.md", 1000)
    assert parsed.text == text
    assert [(heading.title, text[heading.start :].splitlines()[0]) for heading in parsed.headings] == [
        ("Pumps", "# Pumps"),
        ("Faults", "Faults"),
    ]
    old_mac = text.replace("\r\n", "\r")
    assert [old_mac[heading.start :][:6] for heading in markdown_headings(old_mac)] == ["# Pump", "Faults"]


@pytest.mark.parametrize("name", ["a.csv", "a.py", "a.json", "a.txt", "README"])
def test_text_and_code_are_kept_as_they_are(name: str) -> None:
    text = '# {"a": 1,\t"b": [2]}\n\n  <b>x</b>;y\n'
    parsed = parse(text.encode(), name, 1000)
    assert parsed.text == text
    assert parsed.headings == ()


def test_a_heading_is_known_by_the_rules_of_commonmark() -> None:
    text = "#no heading\n\n    # code\n\n## A `b` *c* ##\n\n> # quoted\n"
    assert [(heading.level, heading.title) for heading in markdown_headings(text)] == [(2, "A b c"), (1, "quoted")]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-8", CHINESE + GERMAN),
        ("utf-8-sig", CHINESE + GERMAN),
        ("utf-16", CHINESE + GERMAN),
        ("gbk", CHINESE),
        ("big5", "水泵每年需要維護兩次。請先切斷電源。\n" * 3),
        ("shift_jis", "ポンプは年に二回整備する必要があります。安全のため電源を切ってください。\n" * 3),
        ("latin-1", GERMAN),
        ("latin-1", "L'été dernier, la pompe a été réparée à Genève. Où est la clé ?\n"),
        ("cp1252", "“Quoted” – and a café, 35 € a year, in a text that is long enough to be told apart.\n"),
        ("cp1251", "Насос обслуживают два раза в год, отключив питание.\n" * 2),
    ],
)
def test_text_is_decoded_whatever_its_encoding(encoding: str, text: str) -> None:
    assert parse(text.encode(encoding), "a.txt", 10_000).text == text
    page = f"<html><head><title>t</title></head><body><p>{text.strip()}</p></body></html>".encode(encoding)
    assert parse(page, "a.html", 10_000).text.split() == text.split()


def test_a_page_is_read_in_the_encoding_that_it_declares() -> None:
    page = '<html><head><meta charset="iso-8859-2"></head><body><p>Čerpadlo se udržuje dvakrát ročně.</p></body></html>'
    assert "Čerpadlo se udržuje dvakrát ročně." in parse(page.encode("iso-8859-2"), "a.html", 1000).text


WHOLE = (EXAMPLES / "reports/millbrook-commissioning.pdf").read_bytes()


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.pdf", b"", "the file is empty"),
        ("a.md", b" \n\t\n", "no text was found"),
        ("a.pdf", b"%PDF-1.4 and then nothing of the kind", "cannot be read as application/pdf"),
        ("a.pdf", WHOLE[:3000], "cannot be read as application/pdf"),
        ("a.pdf", pdf("Secret.", password="hunter2"), "encrypted with a password"),
        ("a.pdf", pdf(""), r"no text was found in it \(a scan\?\)"),
        ("a.docx", b"PK\x03\x04" + b"garbage" * 100, "cannot be read as application/vnd.*wordprocessingml"),
        ("a.xlsx", b"garbage", "cannot be read as application/vnd.*spreadsheetml"),
        ("a.md", b"\0\1\2\3" * 50, "binary data"),
        ("a.txt", bytes(range(128, 256)) * 3, "not text in any known encoding"),
        ("a.txt", b"word " * 300, r"1,500 characters, over INGEST_MAX_TEXT_CHARS \(1,000\)"),
    ],
)
def test_a_bad_file_is_refused_with_a_reason_for_people(name: str, data: bytes, reason: str) -> None:
    with pytest.raises(DocumentError, match=reason) as caught:
        parse(data, name, 1000)
    assert caught.value.stage == "parse"
    assert not isinstance(caught.value, UnreadableTypeError)
    assert "Traceback" not in caught.value.reason
    assert "\n" not in caught.value.reason


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 50),
        ("a.jpg", b"\xff\xd8\xff\xe0"),
        ("a.mp4", b"\0\0\0\x18ftyp"),
        ("a.bin", b"\0\1\2\3" * 100),
        ("a.so", b"\x7fELF\0\0\0"),
        ("core", b"\x7fELF\0\0\0"),
    ],
)
def test_a_file_of_a_kind_without_text_is_no_error_of_the_users(name: str, data: bytes) -> None:
    with pytest.raises(UnreadableTypeError, match="no text is read from"):
        parse(data, name, 1000)


def test_parsing_leaves_nothing_of_the_text_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("Only here."))
    script = "import sys; from ingest.parse import parse; parse(open('a.pdf', 'rb').read(), 'a.pdf', 1000)"
    own = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    environment = {**os.environ, **own, "PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    left = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert left - {"libpdfium.so"} == {"a.pdf"}  # its library unpacks itself


def test_the_same_file_gives_the_same_kept_text() -> None:
    assert read("faq.html").content_address() == read("faq.html").content_address()
    assert read("faq.html").content_address() != read("policies/safety-rules.html").content_address()
