"""One file's bytes -> its text with structure (pages, headings). Knows nothing of folders, catalogs or chunks.

Markdown, plain text and code are kept as decoded. Everything else is Kreuzberg's plain output, page by page where the
format has pages, joined here, so that page offsets are exact; its headings exist only in the Markdown output and are
aligned onto the plain text in order (one that does not occur there is dropped).
"""

import mimetypes
import re
from functools import lru_cache
from itertools import pairwise
from pathlib import PurePath
from typing import Any

import kreuzberg
from charset_normalizer import from_bytes
from kreuzberg import ExtractionConfig, PageConfig
from markdown_it import MarkdownIt

from ingest.errors import DocumentError
from ingest.schemas import Heading, PageSpan, ParsedText

MARKDOWN = frozenset({".md", ".markdown", ".mdx"})
AS_DECODED = MARKDOWN | frozenset(
    [
        ".txt",
        ".text",
        ".rst",
        ".log",
        ".csv",
        ".tsv",
        ".json",
        ".jsonl",
        ".yaml",
        ".yml",
        ".toml",
        ".ini",
        ".cfg",
        ".conf",
        ".tex",
        ".sql",
        ".py",
        ".js",
        ".ts",
        ".jsx",
        ".tsx",
        ".java",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".cs",
        ".go",
        ".rs",
        ".rb",
        ".php",
        ".pl",
        ".sh",
        ".bash",
        ".ps1",
        ".r",
        ".jl",
        ".kt",
        ".scala",
        ".swift",
        ".lua",
        ".css",
        ".scss",
        ".vue",
        ".proto",
        ".graphql",
        ".tf",
        ".adoc",
        ".org",
    ]
)
MORE_TYPES = {  # what Python's own table lacks
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    ".docm": "application/vnd.ms-word.document.macroEnabled.12",
    ".pptx": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
    ".pptm": "application/vnd.ms-powerpoint.presentation.macroEnabled.12",
    ".ppsx": "application/vnd.openxmlformats-officedocument.presentationml.slideshow",
    ".xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    ".xlsm": "application/vnd.ms-excel.sheet.macroEnabled.12",
    ".odt": "application/vnd.oasis.opendocument.text",
    ".ods": "application/vnd.oasis.opendocument.spreadsheet",
    ".epub": "application/epub+zip",
    ".rtf": "application/rtf",
    ".msg": "application/vnd.ms-outlook",
    ".ipynb": "application/x-ipynb+json",
    ".htm": "text/html",
    ".xhtml": "text/html",
}
BINARY = "application/octet-stream"
MARKUP = frozenset({"text/html", "text/xml"})
# Tried for text that is not UTF-8. Which of two fits cannot always be told; the earlier one here is the likelier.
LEGACY_ENCODINGS = (
    "cp1252", "gb18030", "cp932", "big5", "cp949", "euc_jis_2004", "cp1251", "koi8_r", "cp1250", "cp1253", "cp1254", "cp1255",
    "cp1256", "utf_16", "utf_32",
)  # fmt: skip
PAGED = frozenset({".pdf", ".pptx", ".ppt", ".odp"})
KEPT_METADATA = ("title", "authors", "subject", "keywords", "language", "created_at", "modified_at")
_TYPES = mimetypes.MimeTypes()  # without the files of the operating system, which differ
_MARKDOWN = MarkdownIt("commonmark")


class UnreadableTypeError(DocumentError):
    """No text is read from files of this kind; such a file is skipped, not failed."""


def parse(data: bytes, name: str, max_chars: int) -> ParsedText:
    """`name` decides the format. Raises DocumentError with a reason that a user understands."""
    if not data:
        raise DocumentError("parse", "the file is empty")
    suffix = PurePath(name).suffix.lower()
    parsed = _as_decoded(data, suffix) if suffix in AS_DECODED else _extracted(data, name, suffix)
    if not parsed.text.strip():
        raise DocumentError("parse", "no text was found in it" + (" (a scan?)" if suffix == ".pdf" else ""))
    if len(parsed.text) > max_chars:
        raise DocumentError(
            "parse", f"its text has {len(parsed.text):,} characters, over INGEST_MAX_TEXT_CHARS ({max_chars:,})"
        )
    return parsed


def decode(data: bytes) -> str:
    """Raises DocumentError for bytes that are no text."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode(_legacy_encoding(data), "replace")
    if "\0" in text[:10_000]:
        raise DocumentError("parse", "it holds binary data, not text")
    return text


def markdown_headings(text: str) -> tuple[Heading, ...]:
    """ATX and setext headings outside code, by CommonMark's rules."""
    line_starts = [0, *(match.end() for match in re.finditer(r"\n|\r\n?", text))]
    tokens = _MARKDOWN.parse(text)
    found = []
    for opened, inline in pairwise(tokens):
        if opened.type == "heading_open" and opened.map:
            title = "".join(child.content for child in inline.children or []).strip()
            found.append(Heading(level=int(opened.tag[1]), start=line_starts[opened.map[0]], title=title))
    return tuple(found)


def _legacy_encoding(data: bytes) -> str:
    matches = from_bytes(data, cp_isolation=list(LEGACY_ENCODINGS))
    best = matches.best()
    if best is None:
        raise DocumentError("parse", "it is not text in any known encoding")
    fitting = {
        name
        for match in matches
        if (match.chaos, match.coherence) == (best.chaos, best.coherence)
        for name in match.could_be_from_charset
    }
    return next((name for name in LEGACY_ENCODINGS if name in fitting), best.encoding)


def _as_decoded(data: bytes, suffix: str) -> ParsedText:
    text = decode(data)
    headings = markdown_headings(text) if suffix in MARKDOWN else ()
    return ParsedText(text=text, mime="text/markdown" if suffix in MARKDOWN else "text/plain", headings=headings)


def _extracted(data: bytes, name: str, suffix: str) -> ParsedText:
    mime = MORE_TYPES.get(suffix) or _TYPES.guess_type(name)[0]
    if mime is None or mime == BINARY:  # a name that says nothing: text is still text
        if b"\0" in data[:10_000]:
            raise UnreadableTypeError("parse", f"no text is read from {suffix or 'such'} files")
        return _as_decoded(data, suffix)
    if mime.startswith(("image/", "audio/", "video/")):
        raise UnreadableTypeError("parse", f"no text is read from {mime} files")
    if mime in MARKUP:
        data = _utf8(data)
    plain = _kreuzberg(data, mime, "plain", pages=suffix in PAGED)
    text, pages = _join_pages(plain) if suffix in PAGED else (_unix(plain.content), ())
    titles = markdown_headings(_unix(_kreuzberg(data, mime, "markdown", pages=False).content))
    kept = {key: value for key, value in dict(plain.metadata).items() if key in KEPT_METADATA and value}
    return ParsedText(text=text, mime=mime, pages=pages, headings=_align(titles, text), metadata=_plain_values(kept))


def _utf8(data: bytes) -> bytes:
    """Markup in UTF-8: Kreuzberg takes no other, whatever the document declares."""
    try:
        data.decode("utf-8")
        return data
    except UnicodeDecodeError:
        declared = re.search(rb"""(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]+)""", data[:2048], re.IGNORECASE)
    try:
        if declared:
            return data.decode(declared[1].decode()).encode()
    except (LookupError, UnicodeDecodeError):
        pass
    return decode(data).encode()


def _kreuzberg(data: bytes, mime: str, output: str, pages: bool) -> kreuzberg.ExtractionResult:
    try:
        return kreuzberg.extract_bytes_sync(data, mime, config=_config(output, pages))
    except kreuzberg.ValidationError as error:
        raise UnreadableTypeError("parse", f"no text is read from {mime} files") from error
    except Exception as error:  # its Rust core raises many kinds; the reason is what counts
        said = re.sub(r"\s+", " ", str(error)).removeprefix("ParsingError: ")
        reason = ": ".join(dict.fromkeys(said.split(": ")))[:300]  # it names a cause twice
        if re.search(r"password|encrypt", reason, re.IGNORECASE):
            reason = "it is encrypted with a password"
        raise DocumentError("parse", f"it cannot be read as {mime}: {reason}") from error


@lru_cache
def _config(output: str, pages: bool) -> ExtractionConfig:
    return ExtractionConfig(
        use_cache=False,  # by default the text of every document stays in the user's cache folder
        enable_quality_processing=False,
        output_format=output,
        pages=PageConfig(extract_pages=True) if pages else None,
    )


def _join_pages(result: kreuzberg.ExtractionResult) -> tuple[str, tuple[PageSpan, ...]]:
    parts, spans, at = [], [], 0
    for page in result.pages or []:
        content = _unix(page["content"]).strip("\n")
        if not content.strip():
            continue
        spans.append(PageSpan(number=page["page_number"], start=at, end=at + len(content)))
        parts.append(content)
        at += len(content) + 2
    if not parts:
        return _unix(result.content), ()
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


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")


def _plain_values(metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        key: [str(one) for one in value] if isinstance(value, list) else str(value) for key, value in metadata.items()
    }
