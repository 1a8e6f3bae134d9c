"""PDF -> its pages' text, exact to the page; pages without a text layer by OCR.

Pages come from the library's plain output; its headings exist only in the Markdown output, which has no pages, and are
aligned onto the text in order (one that does not occur there is dropped).
"""

import re

from ingest.errors import DocumentError, UnreadableTypeError
from ingest.parse_kreuzberg import by_page, extract, kept_metadata, unix
from ingest.parse_ocr import joined_han, languages, ocr_languages_installed
from ingest.parse_text import markdown_headings
from ingest.parse_types import ENCRYPTED, PDF
from ingest.schemas import Heading, PageSpan, ParsedText

SCANNED_BELOW = 16  # characters on a page; a stamped page number may stand on a scan
_IMAGE = re.compile(rb"/Subtype\s*/Image\b")  # a stream's dictionary is readable in every PDF, encrypted or not


def read_pdf(data: bytes, passwords: tuple[str, ...], ocr: bool, ocr_languages: str) -> ParsedText:
    """Raises DocumentError; OcrMissingError when the text is in images and there is no OCR."""
    plain = extract(data, PDF, "plain", pages=True, passwords=passwords)
    contents = {page["page_number"]: _clean(page["content"]) for page in plain.pages or []}
    sparse = tuple(number for number, content in contents.items() if len("".join(content.split())) < SCANNED_BELOW)
    blank = not any(contents.values())
    unread: tuple[int, ...] = ()
    has_images = _IMAGE.search(data) is not None
    if sparse and (has_images or (blank and ocr and ocr_languages_installed())):  # letters may be drawn as outlines
        try:
            contents |= _scanned(data, contents, sparse, languages(ocr_languages, ocr))
        except DocumentError:
            if blank:
                raise
            unread = tuple(number for number in sparse if not contents[number])
    text, pages = join_pages(list(contents.items()))
    if not text:
        if has_images:
            raise UnreadableTypeError("parse", "no text is read from it: OCR found none in its images")
        raise DocumentError("parse", "no text was found in it: its pages are empty")
    titles = markdown_headings(unix(extract(data, PDF, "markdown", passwords=passwords).content))
    metadata = kept_metadata(plain) | ({"pages_without_text": list(unread)} if unread else {})
    return ParsedText(text=text, mime=PDF, pages=pages, headings=_align(titles, text), metadata=metadata)


def _scanned(data: bytes, contents: dict[int, str], sparse: tuple[int, ...], ocr: str) -> dict[int, str]:
    try:
        result = extract(data, PDF, "plain", pages=True, ocr=ocr, ocr_pages=sparse)
    except DocumentError as error:
        if error.reason.startswith(ENCRYPTED):
            raise DocumentError(
                "parse", "its pages are images and it is encrypted; OCR needs a copy without password"
            ) from error
        raise
    read = {number: _clean(content) for number, content in by_page(joined_han(unix(result.content)))}
    return {number: max(contents[number], read.get(number, ""), key=len) for number in sparse}


def _clean(content: str) -> str:
    # the engine puts U+0002 for the hyphen of a word that goes on in the next line, which it appends
    return unix(content).replace("\x02", "").replace("\ufffe", "").strip("\n")


def join_pages(contents: list[tuple[int, str]]) -> tuple[str, tuple[PageSpan, ...]]:
    """Pages parted by an empty line; those without text have no span."""
    parts, spans, at = [], [], 0
    for number, content in contents:
        if not content.strip():
            continue
        spans.append(PageSpan(number=number, start=at, end=at + len(content)))
        parts.append(content)
        at += len(content) + 2
    return "\n\n".join(parts), tuple(spans)


def _align(titles: tuple[Heading, ...], text: str) -> tuple[Heading, ...]:
    """Finds each heading in the plain text, in order; white space may differ, a match must fill whole lines."""
    found, at = [], 0
    for title in titles:
        words = title.title.split()
        if not words or len(title.title) > 200:
            continue
        pattern = re.compile(r"^[ \t]*" + r"\s+".join(map(re.escape, words)) + r"[ \t]*$", re.MULTILINE)
        match = pattern.search(text, at)
        if match:
            found.append(Heading(level=title.level, start=match.start(), title=" ".join(words)))
            at = match.end()
    return tuple(found)
