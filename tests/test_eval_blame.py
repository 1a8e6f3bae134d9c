"""Where a bad answer went wrong."""

from typing import Any, get_args

import pytest

from eval.blame import LEVERS, Seen, blame, gold_test
from eval.schemas import Blame, Case

# five hits, three of them in the prompt; the gold passage is the first
FINE = Seen(
    in_corpus=True,
    gold=(1,),
    deep=None,
    reranked=False,
    retrieved=5,
    takes=20,
    in_prompt=3,
    finish_reason="stop",
    cites=(1,),
    supported=(1,),
    says=(1,),
    in_part=False,
)


def blamed(answerable: bool = True, refused: bool = False, **seen: Any) -> tuple[Blame, str]:
    return blame(answerable, refused, FINE._replace(**seen))


@pytest.mark.parametrize(
    ("seen", "expected", "said"),
    [
        ({"in_corpus": False, "gold": ()}, "not_in_corpus", "no relevant document"),
        ({"gold": (), "deep": 37}, "not_retrieved", "found at rank 37; 5 were retrieved"),
        ({"gold": ()}, "not_retrieved", "beyond rank 100"),
        ({"gold": (), "deep": 37, "finish_reason": "length"}, "not_retrieved", "rank 37"),
        ({"gold": (3,), "takes": 1, "in_prompt": 1}, "not_retrieved", "found at rank 3; the prompt takes 1"),
        ({"gold": (), "deep": 2, "reranked": True}, "lost_by_reranker", "rank 2 before reranking, none of 5 after"),
        ({"gold": (5,), "deep": 1, "reranked": True}, "lost_by_reranker", "rank 1 before reranking, rank 5 after"),
        ({"gold": (), "deep": 9, "reranked": True}, "not_retrieved", "found at rank 9"),
        ({"gold": (4, 5)}, "truncated", "rank 4 was left out of the prompt, which had room for 3"),
        ({"finish_reason": "length"}, "truncated", "cut off"),
        ({"in_part": True}, "truncated", "a part without the answer"),
        ({}, "ignored", "says something else"),
        ({"cites": (), "supported": (), "says": ()}, "ignored", "does not use it"),
        ({"cites": (2,), "supported": (2,)}, "cited_wrongly", "cites rank 2; the answer stands at rank 1"),
        ({"cites": (3, 2), "supported": ()}, "cited_wrongly", "cites ranks 2, 3"),
        ({"supported": ()}, "cited_wrongly", "does not hold what it says"),
        ({"cites": (), "supported": (), "says": (2,)}, "cited_wrongly", "says what rank 2 says"),
        ({"cites": (), "supported": (), "says": (1, 2)}, "ignored", "does not use it"),
        ({"in_corpus": None, "gold": (2,), "cites": (2,), "supported": (2,)}, "ignored", "rank 2"),
    ],
)
def test_the_first_stage_that_lost_it(seen: dict[str, Any], expected: Blame, said: str) -> None:
    found, detail = blamed(**seen)
    assert found == expected
    assert said in detail


def test_refusals() -> None:
    assert blamed(refused=True, finish_reason="stop", cites=()) == (
        "ignored",
        "refused, though the passage at rank 1 was in the prompt",
    )
    found, detail = blamed(refused=True, finish_reason="refused", in_prompt=0, takes=5, cites=())
    assert found == "ignored"
    assert "threshold" in detail
    assert blamed(refused=True, finish_reason="refused", in_prompt=0, gold=(), deep=8)[0] == "not_retrieved"


def test_what_the_documents_do_not_say_is_not_in_the_corpus() -> None:
    found, detail = blamed(answerable=False)
    assert found == "not_in_corpus"
    assert "answered all the same" in detail


def test_each_class_names_its_lever() -> None:
    assert set(LEVERS) == set(get_args(Blame))
    assert all(LEVERS.values())


def case(**fields: Any) -> Case:
    return Case.model_validate(
        {"id": "1", "question": "?", "relevant": {"d": 1}, "slices": {"language": "en"}, **fields}
    )


def test_a_gold_passage_holds_the_answer_and_is_of_a_relevant_document() -> None:
    is_gold = gold_test(case(answers=["white iron"]), ("It is of white iron. It weighs 12 kg.",))
    assert is_gold(True, "It is of white iron.")
    assert not is_gold(True, "It weighs 12 kg.")
    assert not is_gold(False, "White iron is dear.")


def test_where_the_documents_do_not_have_the_words_a_passage_is_gold_by_its_document() -> None:
    for asked in (
        case(answers=["in their own words"]),
        case(answers=["yes"], kind="yes_no_maybe"),
        case(answers=["no"]),
    ):
        is_gold = gold_test(asked, ("It is of white iron; there is no other.",))
        assert is_gold(True, "It weighs 12 kg.")
        assert not is_gold(False, "In their own words, no.")


def test_where_no_document_is_named_the_words_tell() -> None:
    is_gold = gold_test(case(relevant={}, answers=["7天"]), ())
    assert is_gold(False, "每年享有7天年休假")
    assert not is_gold(False, "每年享有17天年休假")
