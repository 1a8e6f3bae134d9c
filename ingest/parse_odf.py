"""OpenDocument texts, spreadsheets and presentations, read from their content.xml (OASIS ODF 1.3)."""

import io
import zipfile
from xml.etree import ElementTree

from ingest.errors import DocumentError
from ingest.parse_markdown import markdown_table
from ingest.parse_office import workbook
from ingest.parse_pdf import join_pages
from ingest.parse_types import BROKEN_ZIP, ENCRYPTED, ODP, ODS
from ingest.schemas import Heading, ParsedText

XML_BYTES = 512 * 2**20  # of content.xml, unpacked
REPEATED = 1000  # times that a cell or a row is written out; an empty one never, at the end
Element = ElementTree.Element
_SKIPPED = frozenset({"tracked-changes", "annotation", "table-of-content", "forms", "sequence-decls", "settings"})


def read_odf(data: bytes, mime: str) -> ParsedText:
    """A slide is a page; a sheet is a heading and a table. Raises DocumentError."""
    content, metadata = _parts(data, mime)
    body = next((element for element in content.iter() if _tag(element) == "body"), content)
    if mime == ODS:
        tables = [(_name(table), _rows(table)) for table in body.iter() if _tag(table) == "table"]
        return workbook(tables, mime, metadata)
    if mime == ODP:
        return _slides([page for page in body.iter() if _tag(page) == "page"], mime, metadata)
    text, headings = _joined([block for root in body for block in _blocks(root)])
    return ParsedText(text=text, mime=mime, headings=headings, metadata=metadata)


def _parts(data: bytes, mime: str) -> tuple[Element, dict[str, object]]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            if "META-INF/manifest.xml" in names and b"encryption-data" in archive.read("META-INF/manifest.xml"):
                raise DocumentError(
                    "parse", f"{ENCRYPTED}, which only PDF and archives can be opened with; save it without"
                )
            if archive.getinfo("content.xml").file_size > XML_BYTES:
                raise DocumentError("parse", f"its text unpacks to over {XML_BYTES:,} bytes")
            content = ElementTree.fromstring(archive.read("content.xml"))
            meta = ElementTree.fromstring(archive.read("meta.xml")) if "meta.xml" in names else Element("meta")
    except (*BROKEN_ZIP, KeyError, ElementTree.ParseError) as error:
        raise DocumentError("parse", f"it cannot be read as {mime}: {error}") from error
    found = {_tag(element): (element.text or "").strip() for element in meta.iter()}
    kept = {
        "title": "title",
        "subject": "subject",
        "language": "language",
        "creation-date": "created_at",
        "date": "modified_at",
    }
    metadata: dict[str, object] = {key: found[tag] for tag, key in kept.items() if found.get(tag)}
    author = found.get("creator") or found.get("initial-creator")
    return content, metadata | ({"authors": [author]} if author else {})


def _tag(element: Element) -> str:
    return element.tag.rpartition("}")[2]


def _attribute(element: Element, name: str) -> str:
    return next((value for key, value in element.attrib.items() if key.rpartition("}")[2] == name), "")


def _name(element: Element) -> str:
    return _attribute(element, "name")


def _blocks(element: Element) -> list[tuple[str, int]]:
    """-> (text, level of the heading or 0) for each block below the element, in order."""
    match _tag(element):
        case tag if tag in _SKIPPED:
            return []
        case "h":
            return [(_text(element), min(int(_attribute(element, "outline-level") or 1), 6))]
        case "p":
            return [(_text(element), 0)]
        case "table":
            return [(markdown_table([row for row in _rows(element) if any(map(str.strip, row))]), 0)]
        case "list":
            return [("\n".join(_list(element)), 0)]
        case "notes":
            notes = " ".join(text for child in element for text, _ in _blocks(child) if text)
            return [(f"Notes: {notes}", 0)] if notes else []
        case _:
            return [block for child in element for block in _blocks(child)]


def _list(element: Element, indent: str = "") -> list[str]:
    lines = []
    for item in element:
        for child in item:
            if _tag(child) == "list":
                lines += _list(child, indent + "  ")
            else:
                lines += [f"{indent}- {text}" for text, _ in _blocks(child) if text.strip()]
    return lines


def _text(element: Element) -> str:
    """A paragraph's characters; a note stands in brackets where it is referred to."""
    parts = [element.text or ""]
    for child in element:
        match _tag(child):
            case "s":
                parts.append(" " * min(int(_attribute(child, "c") or 1), REPEATED))
            case "tab":
                parts.append("\t")
            case "line-break":
                parts.append("\n")
            case "note":
                note = " ".join(text for part in child if _tag(part) == "note-body" for text, _ in _blocks(part))
                parts.append(f" [{note}]")
            case tag if tag in _SKIPPED or tag == "note-citation":
                pass
            case "frame" | "text-box" | "table":
                parts.append("".join(f"\n{text}" for text, _ in _blocks(child)))
            case _:
                parts.append(_text(child))
        parts.append(child.tail or "")
    return "".join(parts)


def _rows(table: Element) -> list[list[str]]:
    rows: list[list[str]] = []
    for row in table.iter():
        if _tag(row) != "table-row":
            continue
        cells: list[str] = []
        for cell in row:
            if _tag(cell) in {"table-cell", "covered-table-cell"}:
                text = " ".join(text for child in cell for text, _ in _blocks(child)).strip()
                cells += [text] * min(int(_attribute(cell, "number-columns-repeated") or 1), REPEATED)
        while cells and not cells[-1]:
            cells.pop()
        if cells:
            rows += [cells] * min(int(_attribute(row, "number-rows-repeated") or 1), REPEATED)
    return rows


def _slides(pages: list[Element], mime: str, metadata: dict[str, object]) -> ParsedText:
    contents, headings, at = [], [], 0
    for number, page in enumerate(pages, start=1):
        blocks = [
            (text, 2 if _attribute(frame, "class") == "title" and "\n" not in text else level)
            for frame in page
            for text, level in _blocks(frame)
        ]
        text, titles = _joined(blocks)
        if not text:
            continue
        contents.append((number, text))
        headings += [title.model_copy(update={"start": title.start + at}) for title in titles]
        at += len(text) + 2
    text, spans = join_pages(contents)
    return ParsedText(text=text, mime=mime, pages=spans, headings=tuple(headings), metadata=metadata)


def _joined(blocks: list[tuple[str, int]]) -> tuple[str, tuple[Heading, ...]]:
    parts: list[str] = []
    headings, at = [], 0
    for text, level in blocks:
        text = text.strip("\n")
        if not text.strip():
            continue
        if level:
            title = " ".join(text.split())
            headings.append(Heading(level=level, start=at, title=title))
            text = f"{'#' * level} {title}"
        parts.append(text)
        at += len(text) + 2
    return "\n\n".join(parts), tuple(headings)
