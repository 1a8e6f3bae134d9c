"""Which format a file is: its first bytes decide where they are clear, else its name. Knows no parser."""

import io
import mimetypes
import re
import zipfile
import zlib
from pathlib import PurePath

from ingest.errors import DocumentError, UnreadableTypeError
from ingest.parse_decode import utf16

PDF = "application/pdf"
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
PPTX = "application/vnd.openxmlformats-officedocument.presentationml.presentation"
XLSX = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
DOC, PPT, XLS = "application/msword", "application/vnd.ms-powerpoint", "application/vnd.ms-excel"
ODT, ODS, ODP = (f"application/vnd.oasis.opendocument.{kind}" for kind in ("text", "spreadsheet", "presentation"))
EPUB, RTF, MSG = "application/epub+zip", "application/rtf", "application/vnd.ms-outlook"
EML, MBOX, NOTEBOOK = "message/rfc822", "application/mbox", "application/x-ipynb+json"
HTML, XML, RST, MARKDOWN, PLAIN = (
    "text/html",
    "application/xml",
    "text/prs.fallenstein.rst",
    "text/markdown",
    "text/plain",
)
CSV, TSV, JSON, JSONL = "text/csv", "text/tab-separated-values", "application/json", "application/jsonl"

SOURCE_LANGUAGES = {
    ".py": "python", ".pyi": "python",
    ".js": "javascript", ".mjs": "javascript", ".cjs": "javascript", ".jsx": "javascript",
    ".ts": "typescript", ".mts": "typescript", ".cts": "typescript", ".tsx": "tsx",
    ".java": "java", ".c": "c", ".h": "c",
    ".cc": "cpp", ".cpp": "cpp", ".cxx": "cpp", ".hh": "cpp", ".hpp": "cpp", ".hxx": "cpp",
    ".cs": "csharp", ".go": "go", ".rs": "rust", ".rb": "ruby", ".php": "php", ".sh": "bash", ".bash": "bash",
}  # fmt: skip
OTHER_TEXT = [
    ".txt", ".text", ".log", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".conf", ".tex", ".sql", ".pl", ".ps1", ".r", ".jl", ".kt",
    ".scala", ".swift", ".lua", ".css", ".scss", ".vue", ".proto", ".graphql", ".tf", ".adoc", ".org",
]  # fmt: skip
TYPES = {
    **{suffix: f"text/x-{language}" for suffix, language in SOURCE_LANGUAGES.items()},
    **dict.fromkeys(OTHER_TEXT, PLAIN),
    ".md": MARKDOWN, ".markdown": MARKDOWN, ".mdx": MARKDOWN, ".rst": RST,
    ".csv": CSV, ".tsv": TSV, ".tab": TSV, ".json": JSON, ".jsonl": JSONL, ".ndjson": JSONL, ".ipynb": NOTEBOOK,
    ".html": HTML, ".htm": HTML, ".xhtml": HTML, ".xml": XML, ".rss": XML, ".atom": XML,
    ".pdf": PDF, ".docx": DOCX, ".docm": "application/vnd.ms-word.document.macroEnabled.12", ".doc": DOC,
    ".pptx": PPTX, ".pptm": "application/vnd.ms-powerpoint.presentation.macroEnabled.12", ".ppt": PPT,
    ".ppsx": "application/vnd.openxmlformats-officedocument.presentationml.slideshow",
    ".xlsx": XLSX, ".xlsm": "application/vnd.ms-excel.sheet.macroEnabled.12", ".xls": XLS,
    ".odt": ODT, ".ods": ODS, ".odp": ODP, ".epub": EPUB, ".rtf": RTF, ".msg": MSG, ".eml": EML, ".mbox": MBOX,
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".tif": "image/tiff", ".tiff": "image/tiff",
    ".bmp": "image/bmp", ".gif": "image/gif", ".webp": "image/webp",
}  # fmt: skip
IMAGES = frozenset(mime for mime in TYPES.values() if mime.startswith("image/"))
TEXTUAL = frozenset(
    {*(TYPES[suffix] for suffix in [*SOURCE_LANGUAGES, *OTHER_TEXT]), MARKDOWN, RST, CSV, TSV, JSON, JSONL}
)
BINARY = "application/octet-stream"
_READ = frozenset({*TYPES.values(), "text/xml"})
ENCRYPTED = "it is encrypted with a password"
_OTHER_TYPES = mimetypes.MimeTypes()  # without the files of the operating system, which differ
# What zipfile raises for a broken archive, an encrypted one, one packed in an unknown way.
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError, OSError, EOFError)
_HEAD = 8192  # bytes that are looked at
# Formats without text or of other formats' files: what stands at the start of a file, and what it is then.
_MEDIA = (
    (rb"ID3|\xff[\xfb\xf3\xf2]|OggS|fLaC|\x1aE\xdf\xa3|FLV\x01|RIFF....(WAVE|AVI )|....ftyp", "audio or video"),
    (rb"\x7fELF|MZ|\xca\xfe\xba\xbe|\xcf\xfa\xed\xfe|\0asm", "program"),
    (rb"SQLite format 3\0", "database"),
)
_ARCHIVES = (
    (rb"\x1f\x8b", "gzip"), (rb"BZh[1-9]", "bzip2"), (rb"\xfd7zXZ\0", "xz"), (rb"7z\xbc\xaf'\x1c", "7z"),
    (rb"Rar!\x1a\x07", "RAR"), (rb"\x28\xb5\x2f\xfd", "zstandard"),
)  # fmt: skip
_IMAGES = (
    (rb"\x89PNG\r\n\x1a\n", "image/png"), (rb"\xff\xd8\xff", "image/jpeg"), (rb"GIF8[79]a", "image/gif"),
    (rb"II\*\0|MM\0\*", "image/tiff"), (rb"RIFF....WEBP", "image/webp"), (rb"BM....\0\0\0\0", "image/bmp"),
)  # fmt: skip
_OLE_STREAMS = (("WordDocument", DOC), ("PowerPoint Document", PPT), ("Workbook", XLS), ("__substg1.0_", MSG))


def media_type(data: bytes, name: str) -> str:
    """-> a media type that `parse` reads.

    Raises UnreadableTypeError for a kind without text, DocumentError for a file that is not what its name says.
    """
    named = _named(name)
    found = _signed(data, named)
    if found:
        return found
    if named is None or named == BINARY:  # a name that says nothing: text is still text
        if b"\0" in data[:_HEAD] and utf16(data) is None:
            raise UnreadableTypeError("parse", f"no text is read from {PurePath(name).suffix or 'such'} files")
        return PLAIN
    if named.startswith(("audio/", "video/")) or (named.startswith("image/") and named not in IMAGES):
        raise UnreadableTypeError("parse", f"no text is read from {named} files")
    if named.startswith("text/") and named not in _READ:  # calendars, address cards, ...
        return PLAIN
    return named


def _named(name: str) -> str | None:
    return TYPES.get(PurePath(name).suffix.lower()) or _OTHER_TYPES.guess_type(name)[0]


def _signed(data: bytes, named: str | None) -> str | None:
    """The type that the first bytes show; null where they show none."""
    head = data[:_HEAD]
    if re.match(rb"%PDF-\d", head) or (named == PDF and b"%PDF-" in head[:1024]):
        return PDF
    if head.startswith(b"{\\rtf"):
        return RTF
    if named not in TEXTUAL and re.match(rb"\s*(<!doctype html|<html\b)", head, re.IGNORECASE):
        return HTML
    if b"\0" not in head and head.isascii():  # text may begin with letters that are a mark elsewhere
        return None
    if head.startswith(b"PK\x03\x04"):
        return _in_zip(data, named)
    if head.startswith(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"):
        return _in_ole(data)
    for mark, mime in _IMAGES:
        if re.match(mark, head, re.DOTALL):
            return mime
    if b"\0" in head:
        for mark, kind in _MEDIA:
            if re.match(mark, head, re.DOTALL):
                raise UnreadableTypeError("parse", f"no text is read from {kind} files")
    for mark, kind in _ARCHIVES:
        if re.match(mark, head, re.DOTALL):
            raise DocumentError("parse", f"it is a {kind} archive under another name; name it after what it is")
    return None


def _in_zip(data: bytes, named: str | None) -> str | None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = set(archive.namelist())
            if "mimetype" in names and archive.getinfo("mimetype").file_size < 200:
                inside = archive.read("mimetype").decode("ascii", "replace").strip().removesuffix("-template")
                if inside in {EPUB, ODT, ODS, ODP}:
                    return inside
    except BROKEN_ZIP:
        return None if named and named.startswith("application/") else _archive()
    for part, mime in (("word/document.xml", DOCX), ("ppt/presentation.xml", PPTX), ("xl/workbook.xml", XLSX)):
        if part in names:
            return named if named in _OFFICE_KIN[mime] else mime
    if "xl/workbook.bin" in names:
        raise UnreadableTypeError("parse", "no text is read from binary workbooks; save it as .xlsx")
    return named if named == EPUB else _archive()


_OFFICE_KIN = {
    DOCX: {DOCX, TYPES[".docm"]},
    PPTX: {PPTX, TYPES[".pptm"], TYPES[".ppsx"]},
    XLSX: {XLSX, TYPES[".xlsm"]},
}


def _archive() -> str:
    raise DocumentError("parse", "it is a zip archive under another name; name it .zip, and its files are read")


def _in_ole(data: bytes) -> str | None:
    """Microsoft's compound file ([MS-CFB]): its directory names the streams in UTF-16."""
    if "EncryptedPackage".encode("utf-16-le") in data:
        raise DocumentError("parse", f"{ENCRYPTED}, which only PDF and archives can be opened with; save it without")
    for stream, mime in _OLE_STREAMS:
        if stream.encode("utf-16-le") in data:
            return mime
    return None
