"""Citations: what a sentence needs to be supported, and that every offset is exact."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from service_fixtures import hit

from ingest.schemas import Hit
from service.cite import cite, split_sentences
from service.schemas import Citation

OIL = hit(
    "Change the oil in the seal chamber every 4,000 running hours. The chamber holds 3.2 litres of Lumina White 32.",
    n=1,
    start=100,
    heading="Heron H75 > Oil",
    page=2,
)
ALARM = hit("The sensor P-17 raises an alarm at 80 degrees. It is checked once a month by the electricians.", n=2)
LEAVE = hit(
    "满十年不满二十年的，每年12天；满二十年的，每年16天。单笔超过5000元的报销由财务总监陆承志签字。", n=3, start=7
)
PASSAGES = [OIL, ALARM, LEAVE]


def only_citation(answer: str, passages: list[Hit] = PASSAGES) -> Citation:
    cited = cite(answer, passages)
    assert len(cited.citations) == 1, cited
    return cited.citations[0]


def assert_exact(answer: str, passages: list[Hit]) -> None:
    """What the API promises of every answer, whatever it says."""
    cited = cite(answer, passages)
    numbers = [citation.n for citation in cited.citations]
    assert len(set(numbers)) == len(numbers)
    by_id = {passage.document_id: passage for passage in passages}
    for citation in cited.citations:
        passage = by_id[citation.document_id]
        assert citation.quote == passage.text[citation.start - passage.start : citation.end - passage.start]
        assert citation.quote
    end = 0
    for sentence in cited.sentences:
        assert answer[sentence.start : sentence.end] == sentence.text
        assert end <= sentence.start < sentence.end
        assert set(sentence.citations) <= set(numbers)
        end = sentence.end


def test_supported_sentence_is_matched_to_its_span() -> None:
    citation = only_citation("The chamber holds 3.2 litres of Lumina White 32.")
    assert citation.quote == "The chamber holds 3.2 litres of Lumina White 32."
    assert (citation.n, citation.document_id, citation.by) == (1, "d1", "match")
    assert (citation.path, citation.page, citation.heading) == ("p1.md", 2, "Heron H75 > Oil")
    assert citation.start == 100 + OIL.text.index("The chamber holds")
    assert citation.score == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        "The chamber holds 3.3 litres of Lumina White 32.",
        "Change the oil in the seal chamber every 400 running hours.",
        "The sensor P-18 raises an alarm at 80 degrees.",
        "满十年不满二十年的，每年13天。",
        "The director of the museum opened a new exhibition on Sunday.",
    ],
)
def test_wrong_numbers_names_or_words_get_no_citation(wrong: str) -> None:
    assert cite(wrong, PASSAGES).citations == ()


def test_numbers_match_whatever_their_thousands_separators() -> None:
    assert only_citation("Change the oil in the seal chamber every 4000 running hours.").n == 1


def test_name_with_digits_may_stand_in_the_heading() -> None:
    assert only_citation("The chamber of the H75 holds 3.2 litres of Lumina White 32.").document_id == "d1"
    without_heading = OIL.model_copy(update={"heading": "Oil"})
    assert cite("The chamber of the H75 holds 3.2 litres of Lumina White 32.", [without_heading]).citations == ()


def test_name_matches_with_and_without_its_hyphen() -> None:
    assert only_citation("Sensor P17 raises an alarm at 80 degrees.").n == 2


def test_short_answers() -> None:
    assert only_citation("3.2 litres").n == 1
    assert only_citation("陆承志").quote == "单笔超过5000元的报销由财务总监陆承志签字。"
    assert cite("Yes.", PASSAGES).citations == ()


def test_chinese() -> None:
    citation = only_citation("满十年不满二十年的员工，每年12天。")
    assert citation.document_id == "d3"
    assert "每年12天" in citation.quote
    assert_exact("满十年不满二十年的员工，每年12天。报销由陆承志签字。", PASSAGES)


def test_number_that_the_model_wrote_is_kept_when_the_passage_supports_it() -> None:
    citation = only_citation("An alarm comes from sensor P-17 at 80 degrees, as the operators know [2].")
    assert (citation.n, citation.by) == (2, "model")


def test_number_that_the_model_wrote_is_dropped_when_the_passage_does_not_say_so() -> None:
    citation = only_citation("The chamber holds 3.2 litres of Lumina White 32 [2].")
    assert (citation.n, citation.by) == (1, "match")  # the passage that does say so is found instead
    assert cite("The museum opens on Sunday [1].", PASSAGES).citations == ()
    assert cite("The museum opens on Sunday [9].", PASSAGES).citations == ()


def test_marker_after_the_full_stop_belongs_to_the_sentence_before() -> None:
    cited = cite("The chamber holds 3.2 litres. [1] Sensor P-17 raises an alarm at 80 degrees. [2]", PASSAGES)
    assert [sentence.citations for sentence in cited.sentences] == [(1,), (2,)]
    assert {citation.by for citation in cited.citations} == {"model"}


def test_second_quote_of_a_passage_gets_a_number_of_its_own() -> None:
    answer = "The chamber holds 3.2 litres of Lumina White 32. Change the oil in the seal chamber every 4,000 hours."
    cited = cite(answer, PASSAGES)
    assert [sentence.citations for sentence in cited.sentences] == [(1,), (4,)]
    assert [(one.n, one.document_id) for one in cited.citations] == [(1, "d1"), (4, "d1")]
    assert_exact(answer, PASSAGES)


def test_the_same_quote_twice_is_one_citation() -> None:
    cited = cite("The chamber holds 3.2 litres of Lumina White 32. It holds 3.2 litres of Lumina White 32.", PASSAGES)
    assert [sentence.citations for sentence in cited.sentences] == [(1,), (1,)]
    assert len(cited.citations) == 1


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It holds 3.2 litres. Change it.", ["It holds 3.2 litres.", "Change it."]),
        ("See e.g. Dr. Lind, Fig. 3 and no. 4. Then go.", ["See e.g. Dr. Lind, Fig. 3 and no. 4.", "Then go."]),
        ("J. R. Smith came. He left!", ["J. R. Smith came.", "He left!"]),
        ("每年12天。满二十年的，16天！好吗？好", ["每年12天。", "满二十年的，16天！", "好吗？", "好"]),
        ("- oil\n- water\n", ["- oil", "- water"]),
        ("1. Open the valve.\n2. Wait.", ["1. Open the valve.", "2. Wait."]),
        ("First part\n\nSecond part", ["First part", "Second part"]),
        ('He said "stop." Then he left.', ['He said "stop."', "Then he left."]),
        ("   ", []),
        ("", []),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert [text[start:end] for start, end in split_sentences(text)] == sentences


# words and marks that the rules turn on, mixed with whatever text there is
fragments = st.sampled_from(
    ["[1]", "[2, 3]", "[", "]", " ", ".", "。", "\n", "- ", "3.2", "4,000", "P-17", "H75", "12天", "oil ", "chamber "]
)
texts = st.lists(st.one_of(fragments, st.text(max_size=8)), max_size=20).map("".join)


@settings(max_examples=150, deadline=None)
@given(texts, st.lists(texts, max_size=3))
def test_any_answer_over_any_passages_keeps_the_promises(answer: str, passages: list[str]) -> None:
    assert_exact(answer, [hit(text, n, start=13 * n) for n, text in enumerate(passages, 1)])


@settings(max_examples=100, deadline=None)
@given(texts)
def test_any_answer_over_real_passages_keeps_the_promises(answer: str) -> None:
    assert_exact(answer, PASSAGES)
