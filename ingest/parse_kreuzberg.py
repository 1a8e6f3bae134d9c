"""The library that reads the binary formats, and what its errors mean to a user."""

import re
from functools import lru_cache
from typing import Any

import kreuzberg
from kreuzberg import ExtractionConfig, OcrConfig, PageConfig, PdfConfig, TesseractConfig

from ingest.errors import DocumentError, UnreadableTypeError
from ingest.parse_types import ENCRYPTED

PAGE_MARK = "\ue000 page {page_num} \ue000"  # of private characters, which documents hardly have
KEPT_METADATA = ("title", "authors", "subject", "keywords", "language", "created_at", "modified_at")
# Its own default drops forms, within which some pages stand whole; without the escapes, __init__ reads as emphasis.
_HTML: Any = {
    "escape_asterisks": True,
    "escape_underscores": True,
    "escape_misc": True,
    "extract_metadata": False,
    "preprocessing": {"enabled": True, "preset": "standard", "remove_navigation": True, "remove_forms": False},
}


def extract(
    data: bytes,
    mime: str,
    output: str = "markdown",
    pages: bool = False,
    passwords: tuple[str, ...] = (),
    ocr: str = "",
    ocr_pages: tuple[int, ...] = (),
) -> kreuzberg.ExtractionResult:
    """`output`: plain or markdown. `pages`: apart in the result, and parted by PAGE_MARK in its content.

    `ocr`: tesseract's languages, "eng+chi_sim". Raises DocumentError.
    """
    config = _config(output, pages, passwords, ocr, ocr_pages)
    try:
        return kreuzberg.extract_bytes_sync(data, mime, config=config)
    except kreuzberg.ValidationError as error:
        raise UnreadableTypeError("parse", f"no text is read from {mime} files") from error
    except MemoryError:
        raise
    except Exception as error:  # its Rust core raises many kinds; the reason is what counts
        said = re.sub(r"\s+", " ", str(error)).removeprefix("ParsingError: ")
        reason = ": ".join(dict.fromkeys(said.split(": ")))[:300]  # it names a cause twice
        if re.search(r"password|encrypt", reason, re.IGNORECASE):
            reason = f"{ENCRYPTED}; INGEST_PASSWORDS takes those to try, one a line" + (
                " (none of those given fits)" if passwords else ""
            )
            raise DocumentError("parse", reason) from error
        raise DocumentError("parse", f"it cannot be read as {mime}: {reason}") from error


@lru_cache
def _config(
    output: str, pages: bool, passwords: tuple[str, ...], ocr: str, ocr_pages: tuple[int, ...]
) -> ExtractionConfig:
    return ExtractionConfig(
        use_cache=False,  # by default the text of every document stays in the user's cache folder
        enable_quality_processing=False,
        output_format=output,
        pages=PageConfig(extract_pages=True, insert_page_markers=True, marker_format=f"\n\n{PAGE_MARK}\n\n")
        if pages
        else None,
        pdf_options=PdfConfig(passwords=list(passwords)) if passwords else None,
        html_options=_HTML,
        ocr=OcrConfig(
            backend="tesseract",
            language=ocr,
            tesseract_config=TesseractConfig(
                language=ocr, use_cache=False, output_format="text", enable_table_detection=False
            ),
        )
        if ocr
        else None,
        force_ocr_pages=list(ocr_pages) or None,
    )


def by_page(content: str) -> list[tuple[int, str]]:
    """-> (page number from 1, its content) for each page mark in the content."""
    mark = re.escape(PAGE_MARK).replace(re.escape("{page_num}"), r"(\d+)")
    parts = re.split(mark, content)
    return [(int(number), page.strip("\n")) for number, page in zip(parts[1::2], parts[2::2], strict=True)]


def unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")


def kept_metadata(result: kreuzberg.ExtractionResult) -> dict[str, Any]:
    found = dict(result.metadata)
    return {
        key: [str(one) for one in value] if isinstance(value, list) else str(value)
        for key in KEPT_METADATA
        if (value := found.get(key)) and _says_something(value)
    }


def _says_something(value: Any) -> bool:
    """False for what programs write where nobody did."""
    first = value[0] if isinstance(value, list) else value
    return str(first).strip("()").lower() not in {"anonymous", "untitled", "unspecified", "unknown"}
