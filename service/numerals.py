"""One spelling for the numbers of a text, so that texts can be compared: full-width digits are ASCII, "20.0" is "20", "3,2" is
"3.2", "twelve" and "十二" are "12". Only for comparing: what it gives has no offsets of the text any more.
"""

import re

_FULL_WIDTH = {0xFF10 + digit: str(digit) for digit in range(10)}
_SPACED = re.compile(r"(?<![\d.,])(\d{1,3})((?:[\u00a0\u2009\u202f'’]\d{3})+)(?!\d)")
_DECIMAL_COMMA = re.compile(r"(?<![\d.,])(\d+),(\d{1,2}|\d{4,})(?![\d,]|\.\d)")
_WHOLE = re.compile(r"(?<![\d.])(\d[\d,]*)\.0+(?!\d|\.\d)")

_UNITS = "two three four five six seven eight nine ten eleven twelve"
_TEENS = "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_VALUES = (
    {"one": 1}
    | {word: value for value, word in enumerate(f"{_UNITS} {_TEENS}".split(), 2)}
    | {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
)
_SCALES = {"hundred": 100, "thousand": 1000}
_ANY = "|".join([*sorted(_VALUES, key=len, reverse=True), *_SCALES])
_WORDS = re.compile(rf"\b(?:{_ANY})(?:(?:\s+and\s+|[\s-]+)(?:{_ANY}))*\b", re.I)
_KNOWN_ALREADY = re.compile(r"\b(?:the|these|those|both|other|no)\s*$", re.I)  # "the two pumps" counts nothing anew

_HAN_DIGITS = {**{sign: value for value, sign in enumerate("〇一二三四五六七八九")}, "零": 0, "两": 2}
_HAN_SCALES = {"十": 10, "百": 100, "千": 1000, "万": 10_000}
_HAN = re.compile(r"[〇零一二两三四五六七八九十百千万]+")


def plain(text: str) -> str:
    """The text with its digits in one spelling. Thousands separated by a comma stay; whoever reads numbers drops it."""
    text = text.translate(_FULL_WIDTH)
    text = _SPACED.sub(lambda found: found[1] + re.sub(r"\D", "", found[2]), text)
    return _WHOLE.sub(r"\1", _DECIMAL_COMMA.sub(r"\1.\2", text))


def in_words(text: str, claimed: bool) -> frozenset[str]:
    """-> the numbers from 2 on that a text writes in words. `claimed`: those alone that surely count something, for a
    text that has to show where it has them from.
    """
    found = set()
    for match in _WORDS.finditer(text):
        if not (claimed and _KNOWN_ALREADY.search(text[: match.start()])):
            found.add(_english(match.group().lower()))
    if not text.isascii():
        for match in _HAN.finditer(text):
            if not claimed or _counts(match.group()):
                found.add(_chinese(match.group()))
    return frozenset(str(number) for number in found if number > 1)


def _english(words: str) -> int:
    """-> its value; 0 for a scale alone ("hundred")."""
    total = current = 0
    for word in re.split(r"[\s-]+", words):
        if word == "and":
            continue
        if word == "hundred":
            current *= 100
        elif word == "thousand":
            total, current = total + current * 1000, 0
        else:
            current += _VALUES[word]
    return total + current


def _counts(signs: str) -> bool:
    """More than one sign, with a scale, that begins with a digit or 十: not 万一 (in case), 千万 (by all means), 十 (of 十分)."""
    return len(signs) > 1 and signs[0] not in "百千万" and any(sign in _HAN_SCALES for sign in signs)


def _chinese(signs: str) -> int:
    if not any(sign in _HAN_SCALES for sign in signs):
        return int("".join(str(_HAN_DIGITS[sign]) for sign in signs))
    total = section = digit = 0
    for sign in signs:
        if sign in _HAN_DIGITS:
            digit = _HAN_DIGITS[sign]
        elif sign == "万":
            total, section, digit = (total + section + digit) * 10_000, 0, 0
        else:
            section, digit = section + (digit or 1) * _HAN_SCALES[sign], 0
    return total + section + digit
