"""Word, PowerPoint, Excel, HTML, EPUB, RTF and Outlook files through kreuzberg, as readable text."""

import html
import io
import re
import zipfile
from typing import Any

from ingest.errors import DocumentError
from ingest.parse_decode import decode
from ingest.parse_kreuzberg import by_page, extract, kept_metadata, unix
from ingest.parse_markdown import markdown_table, readable
from ingest.parse_pdf import join_pages
from ingest.parse_types import BROKEN_ZIP, DOCX, HTML, MSG
from ingest.schemas import Heading, ParsedText

XML_BYTES = 512 * 2**20  # of a Word file's unpacked text parts
# kreuzberg 4.10 drops references such as &amp; from Word's text ("R&D" reads "RD"), and makes spaces of line breaks:
# private characters stand in for them meanwhile.
_STAND_INS = {"&": "\ue101", "<": "\ue102", ">": "\ue103", '"': "\ue104", "'": "\ue105"}
_BACK = str.maketrans({stand_in: char for char, stand_in in _STAND_INS.items()})
_BREAK = "\ue106"
_LINE_BREAK = re.compile(f"^(.*){_BREAK}(.*)$", re.MULTILINE)
_WORD_BREAK = re.compile(rb'<w:br(?: w:type="textWrapping")? ?/>')
_REFERENCE = re.compile(rb"&(?:#\d+|#x[0-9a-fA-F]+|amp|lt|gt|quot|apos);")
_NOTE_MARK = re.compile(r"\[\^\d+\](\[\^\d+\])")  # of a footnote, which is written twice, with two numbers
_NOTE = re.compile(r"^(\[\^\d+\]:)\n +", re.MULTILINE)
_MIDNIGHT = re.compile(r"(?<=^\d{4}-\d\d-\d\d) 00:00:00$")  # of a date without a time
# What says something about a page, and would stand in its text.
_HEAD_TAGS = re.compile(rb"<(title|svg)\b.*?</\1\s*>|<(?:meta|link|base)\b[^>]*>", re.IGNORECASE | re.DOTALL)


def read_document(data: bytes, mime: str) -> ParsedText:
    """DOCX, DOC, EPUB, RTF."""
    if mime == DOCX or "word" in mime:
        data = _with_stand_ins(data)
    result = extract(data, mime)
    markdown = _NOTE.sub(r"\1 ", _NOTE_MARK.sub(r"\1", unix(result.content)))
    text, headings = readable(_LINE_BREAK.sub(_broken, markdown))
    titles = tuple(heading.model_copy(update={"title": heading.title.translate(_BACK)}) for heading in headings)
    return ParsedText(text=text.translate(_BACK), mime=mime, headings=titles, metadata=kept_metadata(result))


def read_html(data: bytes, mime: str = HTML) -> ParsedText:
    data = _in_utf8(data)
    result = extract(_HEAD_TAGS.sub(b"", data), HTML)
    text, headings = readable(unix(result.content))
    said = kept_metadata(extract(data, HTML, "plain"))
    metadata = {key: html.unescape(value) if isinstance(value, str) else value for key, value in said.items()}
    return ParsedText(text=text, mime=mime, headings=headings, metadata=metadata)


def read_slides(data: bytes, mime: str) -> ParsedText:
    """A slide is a page."""
    result = extract(data, mime, pages=True)
    pages, headings = [], []
    at = 0
    for number, markdown in by_page(unix(result.content)) or [(1, unix(result.content))]:
        # bold runs and pictures come out escaped
        text, titles = readable(markdown.replace(r"\*\*", "").replace(r"\![", "!["))
        text = "\n".join(line for line in text.split("\n") if line not in {"-", r"\-"}).strip("\n")
        if not text.strip():
            continue
        pages.append((number, text))
        headings += [title.model_copy(update={"start": title.start + at}) for title in titles]
        at += len(text) + 2
    joined, spans = join_pages(pages)
    return ParsedText(text=joined, mime=mime, pages=spans, headings=tuple(headings), metadata=kept_metadata(result))


def read_workbook(data: bytes, mime: str) -> ParsedText:
    """Each sheet: its name as a heading, and one table."""
    result = extract(data, mime, "plain")
    names: Any = dict(result.metadata).get("sheet_names") or []
    sheets = dict(enumerate(names, start=1))
    tables = [
        (sheets.get(table.page_number, ""), [[_MIDNIGHT.sub("", cell) for cell in row] for row in table.cells])
        for table in result.tables
    ]
    return workbook(tables, mime, kept_metadata(result))


def workbook(tables: list[tuple[str, list[list[str]]]], mime: str, metadata: dict[str, object]) -> ParsedText:
    """(sheet's name, its rows) -> text."""
    parts, headings, at, before = [], [], 0, None
    for name, rows in tables:
        full = [row for row in rows if any(cell.strip() for cell in row)]
        if not full:
            continue
        table = markdown_table(full)
        if name and name != before:
            headings.append(Heading(level=2, start=at, title=name))
            table = f"## {name}\n\n{table}"
        before = name
        parts.append(table)
        at += len(table) + 2
    return ParsedText(text="\n\n".join(parts), mime=mime, headings=tuple(headings), metadata=metadata)


def read_outlook(data: bytes, mime: str = MSG) -> ParsedText:
    """The message's head and its body."""
    result = extract(data, mime, "plain")
    return ParsedText(text=unix(result.content), mime=mime, metadata=kept_metadata(result))


def _with_stand_ins(data: bytes) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as source:
            parts = [part for part in source.infolist() if not part.is_dir()]
            texts = {part.filename for part in parts if re.fullmatch(r"word/[^/]+\.xml", part.filename)}
            unpacked = sum(part.file_size for part in parts if part.filename in texts)
            if unpacked > XML_BYTES:
                raise DocumentError("parse", f"its text unpacks to {unpacked:,} bytes, over {XML_BYTES:,}")
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w") as target:
                for part in parts:
                    if part.filename.startswith("word/media/"):
                        continue  # pictures are not read
                    content = source.read(part)
                    if part.filename in texts:
                        content = _WORD_BREAK.sub(f"<w:t>{_BREAK}</w:t>".encode(), _REFERENCE.sub(_stand_in, content))
                    target.writestr(part.filename, content)
            return out.getvalue()
    except BROKEN_ZIP:
        return data  # the library says what is wrong with it


def _stand_in(match: re.Match[bytes]) -> bytes:
    char = html.unescape(match[0].decode())
    return _STAND_INS.get(char, char).encode() if char >= " " else match[0]


def _broken(line: re.Match[str]) -> str:
    """A line with its breaks; within a heading or a table's row they are spaces."""
    return re.sub(f" ?{_BREAK} ?", " " if line[0].startswith(("#", "|")) else "\n", line[0])


def _in_utf8(data: bytes) -> bytes:
    """Markup in UTF-8: kreuzberg takes no other, whatever the document declares."""
    try:
        if b"\0" not in data:
            data.decode("utf-8")
            return data.removeprefix(b"\xef\xbb\xbf")
        declared = None  # UTF-16, whatever it says
    except UnicodeDecodeError:
        declared = re.search(rb"""(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]+)""", data[:2048], re.IGNORECASE)
    try:
        if declared:
            return data.decode(declared[1].decode()).encode()
    except (LookupError, UnicodeDecodeError):
        pass
    return decode(data).encode()
