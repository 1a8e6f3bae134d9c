"""finetune.human_pairs: transcripts as they are found, and parts that share no question."""

import gzip
import json
from pathlib import Path

import pytest

from finetune.human_pairs import apart, chosen_answers, opening, part, read_pairs
from finetune.rows import read_rows
from finetune.schemas import Message, PreferenceRow, PromptRow, SftRow
from ingest.errors import InvalidError


def talk(*turns: str) -> str:
    """-> a transcript in which both speak in turn."""
    return "".join(f"\n\n{('Human', 'Assistant')[at % 2]}: {said}" for at, said in enumerate(turns))


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    lines = "".join(f"{json.dumps({'chosen': chosen, 'rejected': rejected})}\n" for chosen, rejected in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def only(path: Path) -> PreferenceRow:
    (row,) = read_pairs(path).rows
    assert isinstance(row, PreferenceRow)
    return row


def test_the_last_answers_are_compared_and_all_before_them_is_the_prompt(tmp_path: Path) -> None:
    before = ("What's a pump?", "A machine.", "Which kind?")
    row = only(write(tmp_path / "p.jsonl.gz", [(talk(*before, "A\n\nlong one."), talk(*before, "None."))]))
    assert [one.role for one in row.prompt] == ["user", "assistant", "user"]
    assert (row.chosen[0].content, row.rejected[0].content) == ("A\n\nlong one.", "None.")
    assert opening(row) == "What's a pump?"


def test_two_turns_of_one_speaker_are_one_message(tmp_path: Path) -> None:
    twice = "\n\nHuman: Why?\n\nAssistant: Because.\n\nAssistant: It is so."
    row = only(write(tmp_path / "p.jsonl", [(twice, talk("Why?", "No."))]))
    assert row.chosen[0].content == "Because.\n\nIt is so."


def test_words_that_look_like_a_turn_within_a_line_are_words(tmp_path: Path) -> None:
    row = only(write(tmp_path / "p.jsonl", [(talk("Say Human: hi", "Assistant: hi"), talk("Say Human: hi", "No."))]))
    assert (row.prompt[0].content, row.chosen[0].content) == ("Say Human: hi", "Assistant: hi")


def test_a_pair_whose_better_answer_is_silence_is_left_out_and_named(tmp_path: Path) -> None:
    rows = [(talk("Why?", ""), talk("Why?", "Bad.")), (talk("How?", "So."), talk("How?", "Not so."))]
    found = read_pairs(write(tmp_path / "p.jsonl", rows))
    assert (len(found.rows), found.places) == (1, ("p.jsonl:2",))
    assert found.left_out == ("p.jsonl:1: chosen: the assistant says nothing",)
    assert read_rows(tmp_path / "p.jsonl", "dpo").left_out == found.left_out
    assert read_rows(tmp_path / "p.jsonl", "ppo").left_out == found.left_out


@pytest.mark.parametrize(
    ("chosen", "rejected", "said"),
    [
        (talk("Why?", "So."), talk("Why?", "So."), "chosen and rejected are the same"),
        (talk("Why?", "So.", "And?"), talk("Why?", "Not so."), "chosen ends with a message of the user"),
        (talk("Why?"), talk("Why?", "So."), "one of chosen and rejected is the beginning of the other"),
        (talk("Why?", "So."), talk("How?", "So."), "begin with different messages"),
    ],
)
def test_what_does_not_fit_is_refused_by_line(chosen: str, rejected: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [(talk("Why?", "So."), talk("Why?", "No.")), (chosen, rejected)])
    with pytest.raises(InvalidError, match=rf"(?s)p\.jsonl:2: .*{said}"):
        read_pairs(path)


def test_rows_in_other_formats_are_pairs_too(tmp_path: Path) -> None:
    user = {"role": "user", "content": "Why?"}
    said = [{"role": "assistant", "content": text} for text in ("So.", "No.")]
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": [user], "chosen": [said[0]], "rejected": [said[1]]}) + "\n")
    assert only(path).chosen[0].content == "So."


KINDS = ["rob a bank", "open a lock", "find my neighbour's address", "fool an exam", "hide a body", "say it in anger", "写一封信",
         "cook with mushrooms", "make somebody cry", "win every game"]  # fmt: skip


def many() -> list[tuple[str, str]]:
    """Each question in four wordings that differ little, and followed up differently."""
    rows = []
    for kind in KINDS:
        for asked in (f"How can I {kind}?", f"how can I {kind}", f"How can I  {kind} ?!", f"Please: how can I {kind}?"):
            rows.append(
                (talk(asked, "No.", f"Why {len(rows)}?", "So."), talk(asked, "No.", f"Why {len(rows)}?", "Ok."))
            )
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_no_opening_is_on_two_sides_however_it_is_worded(seed: int, tmp_path: Path) -> None:
    parts = part(read_pairs(write(tmp_path / "p.jsonl", many())), 0.2, seed)
    assert parts.openings == len(KINDS)
    sides = [{kind for kind in KINDS if any(kind in opening(row) for row in one.rows)} for one in parts[:3]]
    assert all(sides)
    assert sum(map(len, sides)) == len(set().union(*sides)) == len(KINDS)
    assert sum(len(one.rows) for one in parts[:3]) == 4 * len(KINDS)
    assert len(parts.held_out.rows) == 8


def test_pairs_hang_together_by_the_question_and_the_documents_that_they_name_as_well(tmp_path: Path) -> None:
    sources = ({"question": "How?"}, {"question": "how"}, {"documents": ["a", "b"]}, {"documents": ["b"]}, {}, {})
    lines = [
        json.dumps({"prompt": f"{at} w{at} x{at}", "chosen": "Yes.", "rejected": "No.", "source": source}) + "\n"
        for at, source in enumerate(sources)
    ]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    named = [row.source.question for row in read_pairs(tmp_path / "p.jsonl").rows]
    assert named[0] == named[1]
    assert named[2] == named[3]
    assert len(set(named)) == 4


def test_what_measures_is_left_out_also_in_nearly_its_words(tmp_path: Path) -> None:
    asked = ("How can I open a lock", "how can I open this lock", "How can I bake bread", "Why is the sky blue")
    rows = read_rows(write(tmp_path / "p.jsonl", [(talk(one, "So."), talk(one, "No.")) for one in asked]), "dpo")
    measured = [PromptRow(prompt=(Message(role="user", content="How can I open a lock?"),))]
    assert apart(rows, measured).places == ("p.jsonl:3", "p.jsonl:4")
    assert apart(rows, measured).left_out == ("p.jsonl:1: it measures", "p.jsonl:2: it measures")
    assert apart(rows, measured, nearly=False).places == ("p.jsonl:2", "p.jsonl:3", "p.jsonl:4")
    with pytest.raises(InvalidError, match="every row of 'p' asks, or shows, what measures"):
        apart(rows, rows.rows)


def test_pairs_that_all_ask_the_same_cannot_be_parted(tmp_path: Path) -> None:
    rows = [(talk("Why is it so?", str(at)), talk("Why is it so?", "No.")) for at in range(9)]
    with pytest.raises(InvalidError, match=r"1 different openings, and the second half would be empty.*--held-out"):
        part(read_pairs(write(tmp_path / "p.jsonl", rows)), 0.2, 17)


def test_chosen_answers_are_rows_to_imitate(tmp_path: Path) -> None:
    (row,) = chosen_answers(read_pairs(write(tmp_path / "p.jsonl", [(talk("Why?", "So."), talk("Why?", "No."))]))).rows
    assert isinstance(row, SftRow)
    assert row.completion[0].content == "So."
