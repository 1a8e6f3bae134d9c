"""Bytes -> text, whatever the encoding."""

import unicodedata

from charset_normalizer import from_bytes

from ingest.errors import DocumentError

# Tried for text that is not Unicode. Which of two fits cannot always be told; the earlier one here is the likelier.
LEGACY_ENCODINGS = (
    "cp1252", "gb18030", "cp932", "big5", "cp949", "euc_jis_2004", "cp1251", "koi8_r", "cp1250", "cp1253", "cp1254", "cp1255",
    "cp1256",
)  # fmt: skip
SAMPLE = 65_536  # bytes or characters that a judgement about the whole text rests on


def decode(data: bytes) -> str:
    """Raises DocumentError for bytes that are no text."""
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return data.decode("utf-32", "replace")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    text = utf16(data) or _utf8(data) or _legacy(data)
    if "\0" in text:
        text = text.replace("\0", "")
        if _noise(text[:SAMPLE]) > 0.02 or len(text) < len(data) / 4:
            raise DocumentError("parse", "it holds binary data, not text")
    return text


def utf16(data: bytes) -> str | None:
    """UTF-16 without a mark at its start: every ASCII character, such as a line's end, has a zero byte at its side."""
    if b"\0" not in data[:SAMPLE] or len(data) % 2:
        return None
    readings = [
        (_noise(data[:SAMPLE].decode(encoding, "replace")), encoding) for encoding in ("utf-16-le", "utf-16-be")
    ]
    noise, encoding = min(readings)
    if noise > 0.01:
        return None
    text = data.decode(encoding, "replace")
    return text if "\0" not in text and any(mark in text for mark in ("\n", " ", "。")) else None


def _noise(text: str) -> float:
    """The share of characters that no text has: controls, unassigned, private."""
    odd = sum(unicodedata.category(char) in {"Cc", "Cn", "Co", "Cs"} and char not in "\t\n\r\f\x1b" for char in text)
    return odd / max(len(text), 1)


def _utf8(data: bytes) -> str | None:
    """UTF-8, also with a few broken bytes, as a cut or a slip leaves them; null where it is something else."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("utf-8-sig", "replace")
    broken = text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
    whole = sum(1 for char in text if char > "\x7f") - broken
    return text if broken * 10 <= whole else None


def _legacy(data: bytes) -> str:
    matches = from_bytes(data[: SAMPLE * 4], cp_isolation=list(LEGACY_ENCODINGS))
    best = matches.best()
    if best is None:
        text = data.decode("utf-8", "replace")
        if text.count("\ufffd") * 20 > len(text):
            raise DocumentError("parse", "it is not text in any known encoding")
        return text
    fitting = {
        name
        for match in matches
        if (match.chaos, match.coherence) == (best.chaos, best.coherence)
        for name in match.could_be_from_charset
    }
    return data.decode(next((name for name in LEGACY_ENCODINGS if name in fitting), best.encoding), "replace")
