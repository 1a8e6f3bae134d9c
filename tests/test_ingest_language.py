"""Which language a text is in, and whether an embedder reads it."""

import pytest

from ingest.language import detect, reads

TEXTS = {
    "en": "The seal chamber of the pump holds three litres of oil, which is changed once a year by the maintenance team.",
    "zh": "水泵每年需要维护两次，维护之前必须先切断电源，并在配电柜上挂警示牌。",
    "ja": "ポンプは年に二回整備する必要があります。作業の前に電源を切ってください。",
    "ru": "Насос обслуживают два раза в год; перед началом работ нужно отключить питание.",
    "fr": "La pompe est entretenue deux fois par an ; avant les travaux, il faut couper le courant et fermer la vanne.",
}


@pytest.mark.parametrize("language", TEXTS)
def test_the_language_of_a_sentence_is_named(language: str) -> None:
    assert detect(TEXTS[language]) == language


def test_a_chinese_text_with_latin_part_numbers_is_chinese() -> None:
    assert detect("QH-200 型清水泵的轴承每运行 2000 小时加注一次 Lumina EP2 润滑脂，每个油嘴 35 g。") == "zh"


@pytest.mark.parametrize("text", ["12 345.67", "", "  \n", "+49 (0) 555 / 10-999 %"])
def test_a_text_without_letters_has_no_language(text: str) -> None:
    assert detect(text) == "und"


@pytest.mark.parametrize(
    ("language", "readable"), [("en", True), ("fr", True), ("zh", False), ("ja", False), ("ru", False)]
)
def test_an_english_embedder_reads_latin_script_alone(language: str, readable: bool) -> None:
    assert reads(("en",), TEXTS[language]) is readable


def test_an_embedder_of_all_languages_reads_all() -> None:
    assert all(reads(("*",), text) for text in TEXTS.values())


def test_an_embedder_of_chinese_and_english_reads_both_mixed() -> None:
    assert reads(("en", "zh"), TEXTS["zh"] + TEXTS["en"])
    assert not reads(("en", "zh"), TEXTS["ru"])


def test_half_of_the_letters_decide() -> None:
    assert reads(("en",), "What does 排污泵 mean in this manual?")
    assert not reads(("en",), "QH 系列水泵多久保养一次？请给出间隔。")


def test_digits_alone_are_read_by_every_embedder() -> None:
    assert reads(("en",), "0555 010 999")
    assert reads(("zh",), "0555 010 999")
