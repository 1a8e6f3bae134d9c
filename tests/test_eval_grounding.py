"""Answers against what was retrieved: precision, recall and faithfulness counted by hand."""

import pytest
from service_fixtures import hit

from eval.grounding import Link, ground, holders, link
from ingest.schemas import Hit
from service.cite import split_sentences
from service.schemas import Citation, Sentence

IRON = hit("The impeller is made of high-chromium white iron. It weighs 12 kg.", 1, heading="Heron H75 > Materials")
OIL = hit("Change the oil every 4,000 running hours with 3.2 litres of Lumina.", 2)
LEAVE = hit("工作满一年不满十年的员工，每年享有7天年休假。", 3)


def cited(text: str, *ns: tuple[int, ...]) -> list[Sentence]:
    """The sentences of an answer, each with the numbers of its citations."""
    spans = split_sentences(text)
    assert len(spans) == len(ns)
    return [
        Sentence(text=text[start:end], start=start, end=end, citations=cites)
        for (start, end), cites in zip(spans, ns, strict=True)
    ]


def citation(n: int, of: Hit, start: int = 0, end: int | None = None) -> Citation:
    end = of.end if end is None else end
    return Citation(
        n=n, document_id=of.document_id, path=of.path, page=None, heading=None, quote=of.text[start:end], start=start, end=end,
        score=1.0, by="match",
    )  # fmt: skip


def test_scores_of_an_answer_that_is_half_right() -> None:
    sentences = cited(
        "The impeller is of white iron. The oil is changed every 5,000 running hours. Lumina is dear.", (1,), (2,), ()
    )
    found = ground(sentences, [citation(1, IRON), citation(2, OIL)], [IRON, OIL], [True, False])
    assert found.scores == {
        "citation_precision": 1 / 2,  # the oil's number is another
        "citation_recall": 1 / 3,
        "gold_citation": 1 / 2,
        "faithfulness": 1 / 3,  # "Lumina is dear" has one of its two words
        "faithful_numbers": 0,  # 5000
    }
    assert found.missing == {}


def test_a_wrong_number_is_not_held_however_many_words_are() -> None:
    right = ground(cited("It weighs 12 kg.", (1,)), [citation(1, IRON)], [IRON], None)
    wrong = ground(cited("It weighs 21 kg.", (1,)), [citation(1, IRON)], [IRON], None)
    assert right.scores["citation_precision"] == right.scores["faithfulness"] == right.scores["faithful_numbers"] == 1
    assert wrong.scores["citation_precision"] == wrong.scores["faithfulness"] == wrong.scores["faithful_numbers"] == 0


def test_thousands_separators_are_no_difference() -> None:
    found = ground(cited("Change the oil every 4000 running hours.", (2,)), [citation(2, OIL)], [IRON, OIL], None)
    assert found.scores["faithful_numbers"] == found.scores["citation_precision"] == 1


def test_a_name_may_stand_in_the_heading() -> None:
    assert ground(cited("The H75 weighs 12 kg.", (1,)), [citation(1, IRON)], [IRON], None).scores["faithfulness"] == 1
    assert ground(cited("The H76 weighs 12 kg.", (1,)), [citation(1, IRON)], [IRON], None).scores["faithfulness"] == 0


def test_a_citation_of_what_was_not_retrieved_is_wrong() -> None:
    [elsewhere] = link(cited("It weighs 12 kg.", (1,)), [citation(1, OIL)], [IRON])
    [beyond] = link(cited("It weighs 12 kg.", (1,)), [citation(1, IRON, 0, IRON.end + 5)], [IRON])
    [unexplained] = link(cited("It weighs 12 kg.", (7,)), [citation(1, IRON)], [IRON])
    assert elsewhere == beyond == unexplained == Link(0, None, False)
    found = ground(cited("It weighs 12 kg.", (1,)), [citation(1, OIL)], [IRON], [True])
    assert (found.scores["citation_precision"], found.scores["gold_citation"]) == (0, 0)
    assert found.scores["faithfulness"] == 1


def test_a_marker_that_the_service_made_no_citation_of_is_judged_all_the_same() -> None:
    sentences = cited("It weighs 12 kg [1]. Lumina oil [1]. It is steel [9].", (1,), (), ())
    found = link(sentences, [citation(1, IRON)], [IRON, OIL])
    assert found == (Link(0, 1, True), Link(1, 1, False), Link(2, None, False))


def test_two_quotes_of_one_passage_are_one_citation() -> None:
    quotes = [citation(1, IRON, 0, 49), citation(3, IRON, 50)]
    [found] = link(cited("The white iron impeller weighs 12 kg.", (1, 3)), quotes, [IRON])
    assert found == Link(0, 1, True)


def test_faithfulness_takes_the_passages_together_and_a_citation_does_not() -> None:
    sentences = cited("The white iron impeller needs 3.2 litres of Lumina.", (1, 2))
    found = ground(sentences, [citation(1, IRON), citation(2, OIL)], [IRON, OIL], None)
    assert found.scores["faithfulness"] == 1
    assert found.scores["citation_precision"] == 0


def test_chinese() -> None:
    right = ground(cited("每年享有7天年休假。", (1,)), [citation(1, LEAVE)], [LEAVE], [True])
    assert set(right.scores.values()) == {1}
    wrong = ground(cited("每年享有12天年休假。", (1,)), [citation(1, LEAVE)], [LEAVE], [True])
    assert wrong.scores["faithfulness"] == 0


def test_markers_and_list_numbers_are_no_claims() -> None:
    found = ground(cited("1. It weighs 12 kg [1].", (1,)), [citation(1, IRON)], [IRON], None)
    assert found.scores["faithful_numbers"] == found.scores["faithfulness"] == 1


def test_what_cannot_be_had_is_absent_and_says_why() -> None:
    none = ground(cited("Yes.", ()), [], [IRON], [True])
    assert none.scores == {}
    assert none.missing["faithfulness"] == none.missing["citation_recall"] == "the answer claims nothing"
    uncited = ground(cited("It weighs much.", ()), [], [IRON], [True])
    assert uncited.missing == {
        "citation_precision": "the answer cites nothing",
        "gold_citation": "the answer cites nothing",
        "faithful_numbers": "the answer has no number",
    }
    blind = ground(cited("It weighs 12 kg.", ()), [], [], [])
    assert blind.scores == {}
    assert set(blind.missing.values()) == {"no passage was in the prompt"}
    assert ground([], [], [IRON], None).scores == {}


@pytest.mark.parametrize(
    ("text", "ranks"),
    [("It weighs 12 kg.", (1,)), ("Lumina oil.", (2,)), ("It weighs 12 kg. Lumina oil.", ()), ("Yes.", ())],
)
def test_holders_hold_all_that_was_said(text: str, ranks: tuple[int, ...]) -> None:
    assert holders(cited(text, *[()] * len(split_sentences(text))), [IRON, OIL]) == ranks
