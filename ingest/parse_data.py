"""Tables in text, JSON, notebooks and XML."""

import contextlib
import csv
import io
import json
import re
from typing import Any
from xml.etree import ElementTree

from ingest.errors import DocumentError
from ingest.parse_decode import decode
from ingest.parse_markdown import markdown_table
from ingest.parse_office import read_html
from ingest.parse_text import markdown_headings
from ingest.parse_types import JSON, JSONL, NOTEBOOK, TSV, XML
from ingest.schemas import Heading, ParsedText

LONG_LINE = 2000  # characters; JSON on one such line is laid out anew, so that it can be split and read
SAMPLE = 65_536  # characters that show which delimiter a table has


def read_table(data: bytes, mime: str) -> ParsedText:
    """CSV, TSV -> one Markdown table whose header is the first row."""
    text = decode(data)
    csv.field_size_limit(2**31 - 1)  # by default a longer field than 128 KiB is an error
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text, mime), skipinitialspace=True)
    try:
        full = [row for row in rows if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DocumentError("parse", f"it cannot be read as {mime}: {error}") from error
    return ParsedText(text=markdown_table(full), mime=mime)


def _delimiter(text: str, mime: str) -> str:
    """The one that gives most of the first rows the header's width, if that is over 1. csv.Sniffer guesses worse."""
    lines = text[:SAMPLE].splitlines()[:100]

    def fit(delimiter: str) -> float:
        widths = [len(row) for row in csv.reader(lines, delimiter=delimiter) if row]
        return widths.count(widths[0]) / len(widths) if widths and widths[0] > 1 else 0

    return max(["\t", ",", ";", "|"] if mime == TSV else [",", ";", "\t", "|"], key=fit)


def read_json(data: bytes, mime: str) -> ParsedText:
    r"""Kept as decoded, since its keys tell what its values mean.

    Laid out anew where that makes it readable: \u escapes, or one long line. Broken JSON is text.
    """
    text = decode(data)
    escaped = re.search(r"\\u[0-9a-fA-F]{4}", text) is not None
    with contextlib.suppress(ValueError, RecursionError):
        if mime == JSONL and escaped:
            lines = (json.dumps(json.loads(line), ensure_ascii=False) for line in text.splitlines() if line.strip())
            text = "\n".join(lines)
        elif mime == JSON and (escaped or max(map(len, text.split("\n"))) > LONG_LINE):
            text = json.dumps(json.loads(text), ensure_ascii=False, indent=1)
    # a lone surrogate is no text that can be stored
    return ParsedText(text=text.encode("utf-8", "replace").decode(), mime=mime)


def read_notebook(data: bytes, mime: str = NOTEBOOK) -> ParsedText:
    """Markdown cells as they are, code cells and the text of their outputs as fenced code."""
    try:
        notebook = json.loads(decode(data))
        language = notebook.get("metadata", {}).get("kernelspec", {}).get("language", "python")
        cells = [part for cell in notebook["cells"] for part in _cell(cell, language)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DocumentError("parse", f"it cannot be read as a notebook: {type(error).__name__}: {error}") from error
    text = "\n\n".join(cells)
    return ParsedText(text=text, mime=mime, headings=markdown_headings(text))


def _cell(cell: dict[str, Any], language: str) -> list[str]:
    source = "".join(cell.get("source", ""))
    if not source.strip():
        return []
    if cell["cell_type"] != "code":
        return [source]
    outputs = []
    for output in cell.get("outputs", []):
        text = "".join(output.get("text") or output.get("data", {}).get("text/plain") or "")
        if text.strip():
            outputs.append(_fenced(text.rstrip("\n")))
    return [_fenced(source, language), *outputs]


def _fenced(code: str, language: str = "") -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", code)), default=0))
    return f"{fence}{language}\n{code}\n{fence}"


def read_xml(data: bytes, mime: str = XML) -> ParsedText:
    """A feed (RSS, Atom): its entries under their titles. Else one line for each element with text: its name, its text."""
    try:
        root = ElementTree.fromstring(_declared(data))
    except (ElementTree.ParseError, ValueError, LookupError):
        return ParsedText(text=decode(data), mime=mime)  # not well-formed: text is still text
    entries = [element for element in root.iter() if _tag(element) in {"item", "entry"}]
    if _tag(root) in {"rss", "feed", "RDF"} and entries:
        return _feed(root, entries, mime)
    try:
        return ParsedText(text="\n".join(_lines(root)), mime=mime)
    except RecursionError:
        return ParsedText(text=decode(data), mime=mime)


def _declared(data: bytes) -> bytes:
    """As it stands where the parser knows the encoding, else in UTF-8."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        if not re.match(rb"<\?xml[^>]*encoding|\xff\xfe|\xfe\xff", data):
            return decode(data).encode()
    return data


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _lines(element: ElementTree.Element) -> list[str]:
    """`name: text` for an element with text, marked up or not, `name (attribute=value)` for one with attributes."""
    mixed = bool((element.text or "").strip()) or any((child.tail or "").strip() for child in element)
    attributes = " ".join(f"{name.rpartition('}')[2]}={value}" for name, value in element.attrib.items())
    name = f"{_tag(element)} ({attributes})" if attributes else _tag(element)
    if mixed:
        return [f"{name}: {' '.join(''.join(element.itertext()).split())}"]
    return [*([name] if attributes else []), *(line for child in element for line in _lines(child))]


def _feed(root: ElementTree.Element, entries: list[ElementTree.Element], mime: str) -> ParsedText:
    channel = next((element for element in root.iter() if _tag(element) in {"channel", "feed"}), root)
    parts: list[str] = []
    headings: list[Heading] = []
    at = 0
    for level, element in [(1, channel), *((2, entry) for entry in entries)]:
        fields = {_tag(child): child for child in reversed(element)}
        title = " ".join(_plain(fields, "title").split())
        lines = [f"{'#' * level} {title}"] if title else []
        if title:
            headings.append(Heading(level=level, start=at, title=title))
        lines += [
            said for name in ("pubDate", "published", "updated", "creator", "author") if (said := _plain(fields, name))
        ]
        if level == 2 or not lines:
            lines += [
                body for name in ("encoded", "content", "description", "summary") if (body := _body(fields, name))
            ][:1]
        else:
            lines += [body for name in ("description", "subtitle") if (body := _body(fields, name))]
        parts.append("\n\n".join(lines))
        at += len(parts[-1]) + 2
    return ParsedText(text="\n\n".join(parts), mime=mime, headings=tuple(headings))


def _plain(fields: dict[str, ElementTree.Element], name: str) -> str:
    return " ".join("".join(fields[name].itertext()).split()) if name in fields else ""


def _body(fields: dict[str, ElementTree.Element], name: str) -> str:
    """The text of what is HTML inside XML."""
    if name not in fields:
        return ""
    markup = "".join(fields[name].itertext()).strip()
    return read_html(markup.encode()).text if "<" in markup else markup
