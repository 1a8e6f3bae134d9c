"""The failures that were labelled by reading, and the agreement of blame with them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from eval.blame import Seen, blame
from eval.failures import BAR, CLASSES, Failure, agreement, confusion_table, disagreements, read_failures
from eval.schemas import Blame
from ingest.errors import InvalidError

FAILURES = read_failures()
SEEN = {
    "in_corpus": True,
    "gold": [1],
    "deep": None,
    "reranked": False,
    "retrieved": 2,
    "takes": 20,
    "in_prompt": 2,
    "finish_reason": "stop",
    "cites": [1],
    "supported": [1],
    "says": [1],
    "in_part": False,
}


def row(number: int = 1, label: str = "ignored", **fields: Any) -> dict[str, Any]:
    return {
        "id": f"q{number}",
        "half": "first",
        "setting": "defaults",
        "question": "What is it of?",
        "language": "en",
        "answerable": True,
        "gold": ["white iron"],
        "relevant": ["pump.md"],
        "passages": [{"rank": 1, "document": "pump.md", "text": "It is of white iron.", "in_prompt": True}],
        "answer": "It weighs 12 kg.",
        "refused": False,
        "sentences": [{"text": "It weighs 12 kg.", "quotes": ["pump.md: It weighs 12 kg."]}],
        "seen": SEEN,
        "label": label,
        "why": "another sentence",
        **fields,
    }


def failures(*rows: dict[str, Any]) -> list[Failure]:
    return [Failure.model_validate(one) for one in rows]


def test_blame_agrees_with_the_labels() -> None:
    whole = agreement(FAILURES)
    assert whole.share >= BAR, confusion_table(whole)
    assert whole.commonest < BAR / 2  # nobody gets there by saying always the same
    for half in ("first", "second"):
        found = agreement([one for one in FAILURES if one.half == half])
        assert found.share >= BAR, f"{half} half\n{confusion_table(found)}"


def test_blame_finds_each_class() -> None:
    whole = agreement(FAILURES)
    assert {label: whole.recall(label) for label in CLASSES if (whole.recall(label) or 0) < 0.7} == {}


def test_the_set_is_a_hundred_failures_of_every_class() -> None:
    assert len(FAILURES) >= 100
    labels = Counter(one.label for one in FAILURES)
    assert min(labels[label] for label in CLASSES) >= 8
    assert {one.language for one in FAILURES} == {"en", "zh"}
    assert all(one.why and one.answer for one in FAILURES)
    questions = {half: {one.question for one in FAILURES if one.half == half} for half in ("first", "second")}
    assert not questions["first"] & questions["second"]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda one: one.id)
def test_what_was_seen_is_what_a_reader_sees(failure: Failure) -> None:
    seen = failure.seen
    shown = {one.rank: one for one in failure.passages}
    assert sorted(rank for rank, one in shown.items() if one.in_prompt) == list(range(1, seen.in_prompt + 1))
    assert all(shown[rank].document in failure.relevant for rank in seen.gold)
    assert max([*seen.gold, *shown], default=0) <= seen.retrieved
    assert set(seen.cites) | set(seen.says) <= set(range(1, seen.in_prompt + 1))
    assert bool(failure.unreranked) <= seen.reranked


def test_agreement_of_a_set_made_by_hand() -> None:
    """Two of four agree: labels 2 ignored, 1 cited_wrongly, 1 truncated; classes 3 ignored, 1 cited_wrongly."""
    cited = {**SEEN, "cites": [2]}
    found = agreement(
        failures(
            row(1, "ignored"),
            row(2, "ignored", seen=cited, also="cited_wrongly"),
            row(3, "cited_wrongly"),
            row(4, "truncated", also="ignored"),
        )
    )
    assert found.failures == 4
    assert found.share == 0.25
    assert found.allowing == 0.75
    assert found.commonest == 0.5
    chance = (2 * 3 + 1 * 1 + 1 * 0) / 16
    assert found.kappa == pytest.approx((0.25 - chance) / (1 - chance))
    assert found.confusion == {
        ("ignored", "ignored"): 1,
        ("ignored", "cited_wrongly"): 1,
        ("cited_wrongly", "ignored"): 1,
        ("truncated", "ignored"): 1,
    }
    assert (found.recall("ignored"), found.recall("truncated"), found.recall("not_in_corpus")) == (0.5, 0, None)
    lines = confusion_table(found).splitlines()
    assert len(lines) == 2 + len(CLASSES)
    assert next(line for line in lines if line.startswith("| ignored")) == "| ignored |  |  |  | 1 | 1 |  | 2 |"


def test_one_class_alone_agrees_beyond_doubt() -> None:
    assert agreement(failures(row())).kappa == 1


def test_disagreements_say_why() -> None:
    (one, found, words), *more = disagreements(failures(row(1, "truncated"), row(2)))
    assert (one.id, found, more) == ("q1", "ignored", [])
    assert "says something else" in words


def test_a_classifier_that_knows_no_reranker_loses_those_failures() -> None:
    def blind(answerable: bool, refused: bool, seen: Seen) -> tuple[Blame, str]:
        return blame(answerable, refused, seen._replace(reranked=False))

    found = agreement(FAILURES, blind)
    assert found.recall("lost_by_reranker") == 0
    assert found.share < agreement(FAILURES).share


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"cites": (2,)}, "cited_wrongly"),
        ({"cites": (), "says": (2,)}, "cited_wrongly"),
        ({"cites": (1, 2)}, "truncated"),
        ({"cites": (), "says": ()}, "truncated"),
    ],
)
def test_an_answer_that_was_cut_off_while_it_told_of_another_passage_lacked_no_room(
    told: dict[str, Any], expected: Blame
) -> None:
    seen = failures(row())[0].seen._replace(finish_reason="length", **told)
    assert blame(True, False, seen)[0] == expected


def test_rows_that_do_not_fit_are_refused_together(tmp_path: Path) -> None:
    path = tmp_path / "failures.jsonl"
    wrong = [
        row(),
        row(),
        row(2, "lost"),
        row(3, also="ignored"),
        row(4, seen={**SEEN, "guess": 1}),
        row(5, mood="bad"),
    ]
    path.write_text("\n".join(json.dumps(one) for one in wrong) + "\nnot JSON\n", encoding="utf-8")
    with pytest.raises(InvalidError) as caught:
        read_failures(path)
    said = str(caught.value)
    assert "6 rows do not fit" in said
    for part in (":2: id 'q1' is that of an earlier line", ":3: label", ":4:", ":5: seen", ":6: mood", ":7:"):
        assert f"failures.jsonl{part}" in said
