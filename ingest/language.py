"""Which language a text is in, and whether an embedder reads its script."""

import unicodedata
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

SCRIPT_OF = {
    "zh": {"CJK"}, "ja": {"CJK", "HIRAGANA", "KATAKANA"}, "ko": {"HANGUL"}, "ru": {"CYRILLIC"}, "uk": {"CYRILLIC"},
    "bg": {"CYRILLIC"}, "el": {"GREEK"}, "ar": {"ARABIC"}, "fa": {"ARABIC"}, "he": {"HEBREW"}, "hi": {"DEVANAGARI"},
    "th": {"THAI"},
}  # fmt: skip
LATIN = {"LATIN"}
NAMES = {
    "en": "English", "zh": "Chinese", "ja": "Japanese", "ko": "Korean", "fr": "French", "de": "German", "es": "Spanish",
    "pt": "Portuguese", "it": "Italian", "nl": "Dutch", "sv": "Swedish", "da": "Danish", "no": "Norwegian", "fi": "Finnish",
    "pl": "Polish", "cs": "Czech", "hu": "Hungarian", "ro": "Romanian", "el": "Greek", "tr": "Turkish", "ru": "Russian",
    "uk": "Ukrainian", "bg": "Bulgarian", "ar": "Arabic", "fa": "Persian", "he": "Hebrew", "hi": "Hindi", "th": "Thai",
    "vi": "Vietnamese", "id": "Indonesian",
}  # fmt: skip
NOTED = 0.01  # the share of a language worth a word, when it is of a script that is not read
NOTED_OF_SCRIPT, NOTED_CHUNKS = 0.1, 20  # and of one that is: short texts are easily taken for a neighbouring language
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


def unread(chunks: Mapping[str, int], languages: tuple[str, ...]) -> str | None:
    """What of `chunks` (by language) is in none of an embedder's `languages`, in words; None when that is next to nothing.

    Languages of a script that it reads are told from each other by statistics, so a few such chunks say nothing.
    """
    total = sum(count for language, count in chunks.items() if language != "und")
    if not total or "*" in languages:
        return None
    scripts = set().union(*(SCRIPT_OF.get(language, LATIN) for language in languages))
    said = []
    for language, count in sorted(chunks.items(), key=lambda one: -one[1]):
        readable = bool(SCRIPT_OF.get(language, LATIN) & scripts)
        share = count / total
        noted = (share >= NOTED_OF_SCRIPT and count >= NOTED_CHUNKS) if readable else share >= NOTED
        if noted and language not in {*languages, "und"}:
            said.append(f"{100 * share:.0f} % of the chunks are {name_of(language)}")
    return ", ".join(said) or None


def name_of(language: str) -> str:
    return NAMES.get(language, language)


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
