"""One file's bytes -> its text with structure (pages, headings). Knows nothing of folders, catalogs or chunks.

Text and code are kept as decoded. What has tables, lists and headings becomes Markdown without its inline marks, so
that a quotation reads as the document does. docs/formats.md has what is kept of each format.
"""

from pathlib import PurePath
from typing import NamedTuple

from ingest import parse_types as types
from ingest.errors import DocumentError, OcrMissingError, UnreadableTypeError
from ingest.parse_text import markdown_headings, read_text
from ingest.parse_types import SOURCE_LANGUAGES
from ingest.schemas import ParsedText
from ingest.settings import IngestSettings

__all__ = [
    "SOURCE_LANGUAGES",
    "OcrMissingError",
    "ParseOptions",
    "UnreadableTypeError",
    "markdown_headings",
    "options",
    "parse",
]


class ParseOptions(NamedTuple):
    """`passwords` are tried on encrypted files. `ocr_languages`: tesseract's codes, joined by +."""

    max_chars: int
    passwords: tuple[str, ...] = ()
    ocr: bool = True
    ocr_languages: str = "eng+chi_sim"


def options(settings: IngestSettings) -> ParseOptions:
    secret = settings.passwords.get_secret_value() if settings.passwords else ""
    return ParseOptions(
        max_chars=settings.max_text_chars,
        passwords=tuple(line for line in secret.splitlines() if line),
        ocr=settings.ocr != "off",
        ocr_languages=settings.ocr_languages,
    )


def parse(data: bytes, name: str, options: ParseOptions) -> ParsedText:
    """The first bytes decide the format where they are clear, else the name.

    Raises DocumentError with a reason that a user understands: UnreadableTypeError for a kind of file without text,
    OcrMissingError for one whose text is in images that cannot be read here.
    """
    if not data:
        raise DocumentError("parse", "the file is empty")
    parsed = _read(data, types.media_type(data, PurePath(name).name), options)
    if not parsed.text.strip():
        raise DocumentError("parse", "no text was found in it")
    if len(parsed.text) > options.max_chars:
        raise DocumentError(
            "parse", f"its text has {len(parsed.text):,} characters, over INGEST_MAX_TEXT_CHARS ({options.max_chars:,})"
        )
    return parsed


def _read(data: bytes, mime: str, options: ParseOptions) -> ParsedText:
    """A format's libraries are loaded with its first file."""
    if mime in types.TEXTUAL - {types.CSV, types.TSV, types.JSON, types.JSONL}:
        return read_text(data, mime)
    if mime in types.IMAGES:
        from ingest.parse_ocr import read_image

        return read_image(data, mime, options.ocr_languages, options.ocr)
    from ingest import parse_data, parse_mail, parse_odf, parse_office, parse_pdf

    match mime:
        case types.PDF:
            return parse_pdf.read_pdf(data, options.passwords, options.ocr, options.ocr_languages)
        case types.CSV | types.TSV:
            return parse_data.read_table(data, mime)
        case types.JSON | types.JSONL:
            return parse_data.read_json(data, mime)
        case types.NOTEBOOK:
            return parse_data.read_notebook(data)
        case types.XML | "text/xml":
            return parse_data.read_xml(data)
        case types.EML:
            return parse_mail.read_mail(data)
        case types.MBOX:
            return parse_mail.read_mailbox(data)
        case types.MSG:
            return parse_office.read_outlook(data)
        case types.HTML:
            return parse_office.read_html(data)
        case types.ODT | types.ODS | types.ODP:
            return parse_odf.read_odf(data, mime)
        case _ if "presentation" in mime or mime == types.PPT:
            return parse_office.read_slides(data, mime)
        case _ if "sheet" in mime or mime == types.XLS:
            return parse_office.read_workbook(data, mime)
        case _:
            return parse_office.read_document(data, mime)
