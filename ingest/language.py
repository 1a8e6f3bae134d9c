"""Which language a text is in, and whether an embedder reads its script."""

import unicodedata
from collections import Counter
from functools import lru_cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

SCRIPT_OF = {
    "zh": {"CJK"}, "ja": {"CJK", "HIRAGANA", "KATAKANA"}, "ko": {"HANGUL"}, "ru": {"CYRILLIC"}, "uk": {"CYRILLIC"},
    "bg": {"CYRILLIC"}, "el": {"GREEK"}, "ar": {"ARABIC"}, "fa": {"ARABIC"}, "he": {"HEBREW"}, "hi": {"DEVANAGARI"},
    "th": {"THAI"},
}  # fmt: skip
LATIN = {"LATIN"}
SAMPLE = 600  # characters that are looked at
# the whole model also knows rare ones, which win on tables and names
WIDESPREAD = (
    "en zh ja ko fr de es pt it nl sv da no fi pl cs sk hu ro bg el tr ru uk sr hr sl lt lv et ar fa he hi bn ta th vi id "
    "ms ca"
)


def detect(text: str) -> str:
    """-> ISO 639-1 code; "und" when there are no letters. Source: langid.py (Lui and Baldwin, 2012)."""
    sample = text[:SAMPLE]
    scripts = _scripts(sample)
    if not scripts:
        return "und"
    total = sum(scripts.values())
    if scripts["CJK"] + scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.3 * total:
        return "ja" if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.05 * total else "zh"
    language, _ = _identifier().classify(sample)
    return str(language)


def reads(languages: tuple[str, ...], text: str) -> bool:
    """Whether at least half of the letters are of a script that one of the languages is written in; ("*",) reads all.

    By script, since a question is too short to tell one Latin-script language from another.
    """
    if "*" in languages:
        return True
    scripts = _scripts(text[:SAMPLE])
    readable = set().union(*(SCRIPT_OF.get(language, LATIN) for language in languages))
    return 2 * sum(scripts[script] for script in readable) >= sum(scripts.values())


@lru_cache(maxsize=1)
def _identifier() -> LanguageIdentifier:
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(WIDESPREAD.split())
    return identifier


def _scripts(text: str) -> Counter[str]:
    return Counter(_script(character) for character in text if character.isalpha())


@lru_cache(maxsize=8192)
def _script(character: str) -> str:
    return unicodedata.name(character, "UNKNOWN").split(" ", 1)[0].split("-", 1)[0]
