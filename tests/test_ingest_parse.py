"""One file's bytes -> text with structure: the examples, encodings, and files that cannot be read."""

import contextlib
import gzip
import io
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from docx import Document
from PIL import Image, ImageDraw, ImageFont
from reportlab.pdfgen.canvas import Canvas

from ingest.errors import DocumentError, UnreadableTypeError
from ingest.parse import SOURCE_LANGUAGES, ParseOptions, markdown_headings, options, parse
from ingest.schemas import ParsedText
from ingest.settings import CHECKOUT, IngestSettings

EXAMPLES = CHECKOUT / "examples"
GERMAN = "Die Pumpe läuft ölgeschmiert. Der Schlüssel hängt an der Tür.\n" * 3
CHINESE = "水泵每年需要维护两次。先切断电源，再检查密封圈。\n" * 3


OPTIONS = ParseOptions(max_chars=1_000_000)


def read(path: str) -> ParsedText:
    return parse((EXAMPLES / path).read_bytes(), path, OPTIONS)


def pdf(*pages: str, password: str | None = None) -> bytes:
    out = io.BytesIO()
    canvas = Canvas(out, encrypt=password)
    for page in pages:
        if page:
            canvas.drawString(72, 700, page)
        canvas.showPage()
    canvas.save()
    return out.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def outline(parsed: ParsedText) -> list[tuple[int, str]]:
    return [(heading.level, heading.title) for heading in parsed.headings]


def test_the_offsets_of_a_pdf_page_hold_that_page() -> None:
    parsed = parse(pdf("First page.", "", "The third page.", "Last page."), "a.pdf", OPTIONS)
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
        assert line.lstrip("# ") == heading.title
        assert heading.start == 0 or parsed.text[heading.start - 1] == "\n"


def test_headings_of_the_same_words_each_have_their_own_place() -> None:
    page = "".join(f"<h1>Pump {n}</h1><h2>Service</h2><p>Service</p><p>Every {n} years.</p>" for n in range(3))
    parsed = parse(f"<html><body>{page}</body></html>".encode(), "a.html", OPTIONS)
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
    assert starts[3] == parsed.text.index("## Service", parsed.text.index("Pump 1"))


def test_a_word_file_keeps_its_paragraphs_and_names_its_author() -> None:
    document = Document()
    document.add_heading("Service plan", 1)
    document.add_paragraph("Grease the bearings.")
    document.add_paragraph("Grease the bearings.")
    document.core_properties.author = "Ingrid Sallow"
    out = io.BytesIO()
    document.save(out)
    parsed = parse(out.getvalue(), "plan.docx", OPTIONS)
    assert parsed.text == "# Service plan\n\nGrease the bearings.\n\nGrease the bearings."
    assert outline(parsed) == [(1, "Service plan")]
    assert parsed.metadata["authors"] == ["Ingrid Sallow"]


def test_markup_and_scripts_are_no_text() -> None:
    page = b"<html><head><style>p {color: red}</style></head><body><script>alert(1)</script><p>Open the valve.</p></body></html>"
    assert parse(page, "a.html", OPTIONS).text.strip() == "Open the valve."


def test_markdown_is_kept_byte_for_byte_with_its_line_ends() -> None:
    text = "# Pumps\r\n\r\nGrease *them*.\r\n\r\nFaults\r\n------\r\n\r\n```\r\n# no heading\r\n```\r\nIt hums.\r\n"
    parsed = parse(text.encode(), "a.md", OPTIONS)
    assert parsed.text == text
    assert [(heading.title, text[heading.start :].splitlines()[0]) for heading in parsed.headings] == [
        ("Pumps", "# Pumps"),
        ("Faults", "Faults"),
    ]
    old_mac = text.replace("\r\n", "\r")
    assert [old_mac[heading.start :][:6] for heading in markdown_headings(old_mac)] == ["# Pump", "Faults"]


@pytest.mark.parametrize("name", ["a.py", "a.json", "a.txt", "a.yaml", "a.ics", "README", "a.unknown"])
def test_text_and_code_are_kept_as_they_are(name: str) -> None:
    text = '# {"a": 1,\t"b": [2]}\n\n  <b>x</b>;y\n'
    parsed = parse(text.encode(), name, ParseOptions(max_chars=1000))
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
    assert parse(text.encode(encoding), "a.txt", OPTIONS).text == text
    page = f"<html><head><title>t</title></head><body><p>{text.strip()}</p></body></html>".encode(encoding)
    assert parse(page, "a.html", OPTIONS).text.split() == text.split()


def test_a_page_is_read_in_the_encoding_that_it_declares() -> None:
    page = '<html><head><meta charset="iso-8859-2"></head><body><p>Čerpadlo se udržuje dvakrát ročně.</p></body></html>'
    assert "Čerpadlo se udržuje dvakrát ročně." in parse(page.encode("iso-8859-2"), "a.html", OPTIONS).text


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
        ("a.pdf", pdf(""), "no text was found in it: its pages are empty"),
        ("a.docx", b"PK\x03\x04" + b"garbage" * 100, "cannot be read as application/vnd.*wordprocessingml"),
        ("a.xlsx", b"garbage", "cannot be read as application/vnd.*spreadsheetml"),
        ("a.md", b"\0\1\2\3" * 50, "binary data"),
        ("a.txt", bytes(range(128, 256)) * 3, "not text in any known encoding"),
        ("a.txt", b"word " * 300, r"1,500 characters, over INGEST_MAX_TEXT_CHARS \(1,000\)"),
    ],
)
def test_a_bad_file_is_refused_with_a_reason_for_people(name: str, data: bytes, reason: str) -> None:
    with pytest.raises(DocumentError, match=reason) as caught:
        parse(data, name, ParseOptions(max_chars=1000))
    assert caught.value.stage == "parse"
    assert not isinstance(caught.value, UnreadableTypeError)
    assert "Traceback" not in caught.value.reason
    assert "\n" not in caught.value.reason


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.wav", b"RIFF\0\0\0\0WAVEfmt "),
        ("movie.txt", b"\0\0\0\x18ftypmp42\xff"),
        ("a.svg", b"<svg/>"),
        ("a.mp4", b"\0\0\0\x18ftyp"),
        ("a.bin", b"\0\1\2\3" * 100),
        ("a.so", b"\x7fELF\0\0\0"),
        ("core", b"\x7fELF\0\0\0"),
    ],
)
def test_a_file_of_a_kind_without_text_is_no_error_of_the_users(name: str, data: bytes) -> None:
    with pytest.raises(UnreadableTypeError, match="no text is read from"):
        parse(data, name, ParseOptions(max_chars=1000))


def test_parsing_leaves_nothing_of_the_text_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("Only here."))
    image = Image.new("RGB", (600, 100), "white")
    ImageDraw.Draw(image).text((20, 20), "Only here.", "black", ImageFont.load_default(40))
    image.save(tmp_path / "a.png")
    script = """
import contextlib
from ingest.parse import *
for name in ("a.pdf", "a.png"):
    with contextlib.suppress(OcrMissingError), open(name, "rb") as file:
        parse(file.read(), name, ParseOptions(1000))
"""
    own = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    environment = {**os.environ, **own, "PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    left = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert left - {"libpdfium.so"} == {"a.pdf", "a.png"}  # its library unpacks itself


def test_the_same_file_gives_the_same_kept_text() -> None:
    assert read("faq.html").content_address() == read("faq.html").content_address()
    assert read("faq.html").content_address() != read("policies/safety-rules.html").content_address()


def test_source_code_names_its_language() -> None:
    for suffix, language in SOURCE_LANGUAGES.items():
        parsed = parse(b"x = 1 # \t\n", f"a{suffix}", OPTIONS)
        assert (parsed.text, parsed.mime) == ("x = 1 # \t\n", f"text/x-{language}")
    assert parse(b"a: 1\n", "a.yaml", OPTIONS).mime == "text/plain"


def test_the_settings_say_how_files_are_read() -> None:
    assert options(IngestSettings()).passwords == ()
    settings = IngestSettings(passwords="one\ntwo words\n\n", ocr="off", ocr_languages="deu", max_text_chars=7)
    assert options(settings) == ParseOptions(7, ("one", "two words"), False, "deu")


def test_a_file_is_read_as_what_it_is_whatever_its_name() -> None:
    document = (EXAMPLES / "policies/leave-and-expenses.docx").read_bytes()
    for data, names in (
        (pdf("The first page."), ["a.txt", "a.docx", "a.png", "a"]),
        (document, ["a.pdf", "a.xlsx", "a.md", "a.zip", "a.doc"]),
        (b"{\\rtf1\\ansi Grease it.}", ["a.doc", "a.txt"]),
        (b"<!DOCTYPE html><html><body><p>Grease it.</p></body></html>", ["a.doc", "a.xls", "a.asp"]),
    ):
        assert len({parse(data, name, OPTIONS).content_address() for name in names}) == 1
    assert parse(b"%PDF- is how a PDF begins.\n", "a.md", OPTIONS._replace(ocr=False)).mime == "text/markdown"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.pdf", gzip.compress(b"word " * 100, mtime=0), "gzip archive under another name"),
        ("a.txt", b"7z\xbc\xaf'\x1c\0\4" + b"\0" * 50, "7z archive under another name"),
        ("a.docx", zipped({"a.txt": b"word"}), "zip archive under another name"),
        ("a.docx", zipped({"word/document.xml": b"<broken"}), "cannot be read as application/vnd"),
        (
            "a.odt",
            zipped({"mimetype": b"application/vnd.oasis.opendocument.text"}),
            "cannot be read as application/vnd.oasis",
        ),
        ("a.ipynb", b"[1]", "cannot be read as a notebook"),
        ("a.eml", b"just words", "cannot be read as a message"),
        ("a.mbox", b"just words", "cannot be read as a mailbox"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused_with_a_reason(name: str, data: bytes, reason: str) -> None:
    with pytest.raises(DocumentError, match=reason) as caught:
        parse(data, name, OPTIONS)
    assert type(caught.value) is DocumentError


def test_whatever_is_broken_ends_in_an_error_for_its_one_file() -> None:
    files = [*EXAMPLES.rglob("*.pdf"), *EXAMPLES.rglob("*.docx"), *EXAMPLES.rglob("*.html")][:8]
    chance = random.Random(7)
    for file in files:
        whole = file.read_bytes()
        for name in (
            file.name,
            "a.pdf",
            "a.docx",
            "a.xlsx",
            "a.pptx",
            "a.odp",
            "a.epub",
            "a.msg",
            "a.png",
            "a.txt",
            "a.xml",
        ):
            cut = whole[: chance.randrange(1, len(whole))]
            with contextlib.suppress(DocumentError):
                assert parse(cut, name, OPTIONS._replace(ocr=False)).text.strip()


def test_plain_text_needs_no_library_of_documents() -> None:
    reads = "from ingest.parse import *; parse(b'# a', 'a.md', ParseOptions(9))"
    script = f"import sys; {reads}; assert 'kreuzberg' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, check=True)
