"""Answers against gold answers: values counted by hand from the rules of SQuAD and CMRC."""

import pytest

from eval.answer_metrics import (
    abstention,
    answer_scores,
    cmrc_words,
    contains,
    decision,
    exact_match,
    is_refusal,
    plain,
    rouge_l,
    squad_words,
    token_f1,
)
from eval.schemas import Case
from service.prompt import REFUSAL, REFUSAL_ZH

EN, ZH = {"language": "en"}, {"language": "zh"}


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "f1"),
    [
        ("The impeller", "impeller", 1, 1),  # articles and case are off
        ("Impeller!", "an impeller.", 1, 1),
        ("white iron", "high-chromium white iron", 0, 2 * 2 / 5),  # 2 of 2 and of 3 words
        ("It is made of white iron.", "white iron", 0, 2 * 2 / 8),
        ("iron iron iron", "iron", 0, 2 * 1 / 4),  # a word counts as often as both have it
        ("1,000 hours", "1000 hours", 1, 1),
        ("3.2", "32", 1, 1),  # so are SQuAD's rules: the point is punctuation
        ("the “Pump”", "pump", 1, 1),
        ("", "iron", 0, 0),
        ("...", "iron", 0, 0),
        ("the", "a", 1, 1),  # neither has a word
        ("steel", "the", 0, 0),
    ],
)
def test_spaced_languages_are_scored_as_squad_does(answer: str, gold: str, exact: float, f1: float) -> None:
    assert exact_match(answer, [gold]) == exact
    assert token_f1(answer, [gold]) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "f1"),
    [
        ("7天。", "7天", 1, 1),
        ("7 天", "7天", 1, 1),
        ("每年享有7天年休假", "7天", 0, 2 * 2 / (9 + 2)),  # 每 年 享 有 7 天 年 休 假
        ("天7", "7天", 0, 2 * 1 / 4),  # the longest run they share is one token
        ("陆先生承志", "陆承志", 0, 2 * 2 / 8),  # 承志, not all three characters
        ("QH-350 型电机", "qh350型电机", 1, 1),  # Latin in lower case, the hyphen is punctuation
        ("3.2 mm 厚", "32 mm 厚", 0, 2 * 2 / 6),  # within a number the point stays
        ("", "7天", 0, 0),
        ("。", "7天", 0, 0),
        ("李明", "王强", 0, 0),
    ],
)
def test_chinese_is_scored_as_cmrc_does(answer: str, gold: str, exact: float, f1: float) -> None:
    assert exact_match(answer, [gold], chinese=True) == exact
    assert token_f1(answer, [gold], chinese=True) == pytest.approx(f1)


def test_the_best_gold_answer_counts() -> None:
    assert token_f1("white iron", ["steel", "iron", "the white iron"]) == 1
    assert exact_match("white iron", ["steel", "White iron"]) == 1
    assert token_f1("white iron", []) == 0


def test_words() -> None:
    assert squad_words("The U.S. didn't pay 1,500 (a lot).") == ["us", "didnt", "pay", "1500", "lot"]
    assert cmrc_words("厚度为3.2 mm，共1,000片") == ["厚", "度", "为", "3.2", "mm", "共", "1,000", "片"]


@pytest.mark.parametrize(
    ("text", "gold", "held"),
    [
        ("The chamber holds 3.2 litres.", "3.2 litres", 1),
        ("It holds 3.2 litres.", "32", 0),
        ("They have 27 days.", "7", 0),
        ("It runs 4,000 hours.", "4000 hours", 1),
        ("Built 1990–1994 in Kiel.", "1994", 1),
        ("Denver won.", "the Denver", 1),
        ("William Tyndale’s Bible", "William Tyndale", 1),
        ("made in the U.S. alone", "US", 1),
        ("Anything", "...", 0),
        ("每年享有7天年休假", "7天", 1),
        ("共27天", "7天", 0),
        ("由财务总监陆承志签字", "陆承志", 1),
    ],
)
def test_a_gold_answer_is_contained_as_whole_words(text: str, gold: str, held: float) -> None:
    assert contains(text, [gold], chinese=not gold.isascii()) == held


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    assert rouge_l("the iron is white", ["white iron"]) == pytest.approx(2 * (1 / 4) * (1 / 2) / (1 / 4 + 1 / 2))
    assert rouge_l("每年享有7天", ["7天"]) == pytest.approx(2 * (2 / 6) * 1 / (2 / 6 + 1))
    assert rouge_l("", ["7天"]) == 0
    assert rouge_l("wholly other", ["steel", "wholly other"]) == 1


def test_rouge_l_of_ascii_is_that_of_the_package() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    gold, said = "It's high-chromium, 4,000 h!", "the H75's high chromium: 4,000 h_x"
    assert rouge_l(said, [gold]) == RougeScorer(["rougeL"]).score(gold, said)["rougeL"].fmeasure


@pytest.mark.parametrize(
    ("answer", "decided"),
    [
        ("Yes, it does [1].", "yes"),
        ("no", "no"),
        ("[2] Maybe.", "maybe"),
        ("Nobody knows.", None),
        ("The answer is yes.", None),
        ("", None),
        ("...", None),
    ],
)
def test_a_decision_is_the_first_word(answer: str, decided: str | None) -> None:
    assert decision(answer) == decided


def test_markers_are_no_part_of_an_answer() -> None:
    assert plain("White iron [1]. Painted twice [2, 3].") == "White iron. Painted twice."
    assert exact_match(plain("white iron [1]"), ["white iron"]) == 1


def test_a_refusal_is_told_by_its_finish_or_its_words() -> None:
    assert is_refusal("anything", "refused")
    assert is_refusal(REFUSAL, "stop")
    assert is_refusal(f"{REFUSAL_ZH} [1]", "stop")
    assert is_refusal("The passages do not mention the oil.", "stop")
    assert not is_refusal("", "stop")
    assert not is_refusal(f"{REFUSAL} But the oil is changed every 4,000 hours.", "stop")


def case(**fields: object) -> Case:
    return Case.model_validate({"id": "1", "question": "?", "slices": EN, **fields})


def test_a_span_is_good_by_f1_or_by_containing_it() -> None:
    iron = case(answers=["white iron"])
    assert answer_scores(iron, "It is, as I said before, of white iron.", False)[0]["good"] == 1
    assert answer_scores(iron, "iron [1]", False)[0]["f1"] == pytest.approx(2 / 3)
    assert answer_scores(iron, "iron [1]", False)[0]["good"] == 1
    assert answer_scores(iron, "It is of grey cast iron.", False)[0]["good"] == 0


def test_a_refusal_of_an_answerable_case_scores_nothing() -> None:
    scores, _ = answer_scores(case(answers=["the documents"]), REFUSAL, True)
    assert scores == {"answered": 0, "abstention": 0, "exact_match": 0, "f1": 0, "rouge_l": 0, "contains": 0, "good": 0}


def test_an_unanswerable_case_is_good_when_it_is_refused() -> None:
    nobody = case(answerable=False)
    assert answer_scores(nobody, REFUSAL, True)[0] == {"abstained": 1, "abstention": 1, "good": 1}
    assert answer_scores(nobody, "White iron.", False)[0] == {"abstained": 0, "abstention": 0, "good": 0}


def test_decisions() -> None:
    asked = case(answers=["yes"], kind="yes_no_maybe", long_answer="It does help")
    right, _ = answer_scores(asked, "Yes: it does help", False)
    assert (right["accuracy"], right["good"]) == (1, 1)
    assert right["rouge_l"] == pytest.approx(6 / 7)
    assert answer_scores(asked, "It does help", False)[0]["accuracy"] == 0
    assert (
        answer_scores(case(answers=["no"]), "There is no such pump.", False)[0]["accuracy"] == 0
    )  # by its gold answer
    assert answer_scores(case(answers=["no"]), "No.", False)[0]["good"] == 1


def test_without_a_gold_answer_nothing_is_scored_and_it_says_so() -> None:
    scores, missing = answer_scores(case(), "White iron.", False)
    assert scores == {"answered": 1, "abstention": 1}
    assert missing["f1"] == missing["good"] == "the case has no gold answer"
    scores, missing = answer_scores(case(kind="yes_no_maybe"), "Yes.", False)
    assert "accuracy" not in scores
    assert "accuracy" in missing


def test_chinese_is_told_by_language_or_gold() -> None:
    for slices in (ZH, EN):
        asked = Case(id="1", question="?", answers=("7天",), slices=slices)
        assert answer_scores(asked, "每年享有7天年休假", False)[0]["f1"] == pytest.approx(4 / 11)
    year = Case(id="1", question="?", answers=("1994",), slices=ZH)
    assert answer_scores(year, "1994年", False)[0]["contains"] == 1


def test_abstention_of_a_run() -> None:
    # two unanswerable, one of them refused; two answerable, one of them refused
    found = abstention([(False, True), (False, False), (True, True), (True, False)])
    assert found == (1 / 2, 1 / 2, 1 / 2)
    assert abstention([(True, False)]) == (None, None, None)
    assert abstention([(True, True)]) == (0, None, None)
    assert abstention([(False, False)]) == (None, 0, 0)
