"""Text in images, by tesseract. Kreuzberg carries the program; the languages' data come with the system's package."""

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from ingest.errors import OcrMissingError, UnreadableTypeError
from ingest.parse_kreuzberg import extract, unix
from ingest.schemas import ParsedText

OCR_MISSING = "its text is in images, which are read where tesseract is installed"
REMEDY = "apt-get install tesseract-ocr tesseract-ocr-chi-sim"
DOUBTFUL = 60  # mean confidence in the words, of 100
_HAN = "\u3000-\u303f\u3400-\u9fff\uff00-\uffef"
_HAN_GAP = re.compile(f"(?<=[{_HAN}]) +(?=[{_HAN}])")
# Where kreuzberg looks on Linux, in its order, when TESSDATA_PREFIX is not set; the first folder that there is counts.
_FOLDERS = (
    "/usr/share/tesseract-ocr/5/tessdata",
    "/usr/share/tesseract-ocr/4/tessdata",
    "/usr/share/tessdata",
    "/usr/local/share/tessdata",
)


def ocr_languages_installed() -> tuple[str, ...]:
    """Tesseract's codes of the languages whose data are installed, such as ("chi_sim", "eng"); empty: no OCR."""
    return _languages_in(os.environ.get("TESSDATA_PREFIX"))


@lru_cache
def _languages_in(prefix: str | None) -> tuple[str, ...]:
    folders = [Path(prefix)] if prefix else [folder for place in _FOLDERS if (folder := Path(place)).is_dir()]
    return tuple(
        sorted(file.stem for folder in folders[:1] for file in folder.glob("*.traineddata") if file.stem != "osd")
    )


def languages(asked: str, enabled: bool) -> str:
    """Those of the asked ("eng+chi_sim") that are installed, in that form. Raises OcrMissingError when there are none."""
    if not enabled:
        raise OcrMissingError("parse", f"{OCR_MISSING}; here INGEST_OCR is off")
    installed = ocr_languages_installed()
    found = [language for language in asked.split("+") if language in installed]
    if not found:
        have = f"; of INGEST_OCR_LANGUAGES ({asked!r}) none is here" if installed else ""
        raise OcrMissingError("parse", f"{OCR_MISSING}{have}: {REMEDY}")
    return "+".join(found)


def read_image(data: bytes, mime: str, asked: str, enabled: bool) -> ParsedText:
    """Raises OcrMissingError, UnreadableTypeError for an image without text, DocumentError for a broken one."""
    together = languages(asked, enabled)
    confidence, text = _ocr(data, mime, together)
    if confidence < DOUBTFUL and "+" in together:  # a short line is read in the wrong script now and then
        confidence, text = max([(confidence, text), *(_ocr(data, mime, one) for one in together.split("+"))])
    if not any(map(str.isalnum, text)):
        raise UnreadableTypeError("parse", "no text is read from it: OCR found none in this image")
    return ParsedText(text=text, mime=mime)


def _ocr(data: bytes, mime: str, language: str) -> tuple[float, str]:
    """-> the mean confidence of its words, 0 to 100, and the text."""
    result = extract(data, mime, "plain", ocr=language)
    confidence: Any = dict(result.metadata).get("mean_text_conf")
    text = joined_han(unix(result.content)).strip()
    return (float(confidence or 0) if text else 0.0), text


def joined_han(text: str) -> str:
    """Tesseract puts spaces between Chinese characters when it reads several languages."""
    return _HAN_GAP.sub("", text)
