"""finetune.citation_pairs and `graft dataset preferences --every`: pairs that teach what the citation check looks for."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from finetune import cli_raft, cli_reward
from finetune.citation_pairs import MOST, citation_pairs
from finetune.preferences import preference_rows
from finetune.rows import read_rows, write_rows
from finetune.schemas import Message, PreferenceRow, Provenance, SftRow
from ingest.errors import InvalidError
from service.refusal import REFUSAL

PASSAGES = "[1] The pump stands in Rotterdam.\n\n[2] The valve stands in Hamburg.\n\n[3] The filter is blue.\n\n"


def row(answer: str, question: str = "Where is the pump?", passages: str = PASSAGES) -> SftRow:
    asked = Message(role="user", content=f"{passages}Question: {question}")
    return SftRow(
        prompt=(asked,),
        completion=(Message(role="assistant", content=answer),),
        source=Provenance(documents=("a.md",), question=question),
    )


ANSWERS = ("Rotterdam [1]", "Rotterdam", "Rotterdam [2]", REFUSAL, "Rotterdam [1]. It is made of steel [1].")


def test_supported_answers_are_chosen_over_unsupported_ones_to_the_same_prompt() -> None:
    rows = [row(one) for one in ANSWERS] + [row("Hamburg [2]", "Where is the valve?"), row("Blue", "Which filter?")]
    found = citation_pairs(rows, [str(at) for at in range(len(rows))], seed=1)
    assert {one.chosen[0].content for one in found} == {"Rotterdam [1]"}
    assert {one.rejected[0].content: one.source.kind for one in found} == {
        "Rotterdam": "uncited",
        "Rotterdam [2]": "unsupported",
        REFUSAL: "refused",
        "Rotterdam [1]. It is made of steel [1].": "unsupported",
    }
    assert all(one.source.documents == ("a.md",) and one.prompt == rows[0].prompt for one in found)
    many = [row("Rotterdam [1]"), *(row(f"Rotterdam, or place {at}") for at in range(20))]
    assert len(citation_pairs(many, [""] * 21, seed=1)) == MOST


def test_what_cannot_be_checked_is_refused_by_its_place() -> None:
    with pytest.raises(InvalidError, match=r"rows\.jsonl:2: the prompt shows no passages"):
        citation_pairs([row("Rotterdam [1]"), row("Rotterdam [1]", passages="")], ["", "rows.jsonl:2"], seed=1)


def test_a_pair_is_made_of_every_fault_where_a_reward_model_wants_them() -> None:
    rows = [row("Rotterdam [1]"), row(REFUSAL, "Where is the engine?")]
    every = preference_rows(rows, 3, every=True)
    assert {one.source.kind for one in every} == {"uncited", "refused", "miscited", "wrong", "unsupported"}
    assert len(preference_rows(rows, 3)) == 2


def test_both_commands_write_rows_that_a_reward_model_learns_from(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(cli_reward.citation_pairs)
    app.command()(cli_raft.preferences)
    write_rows([row(one) for one in ANSWERS], tmp_path / "answers.jsonl")

    def run(*arguments: str) -> None:
        done = CliRunner().invoke(app, [*arguments])
        assert done.exit_code == 0, done.exception

    run("citation-pairs", str(tmp_path / "answers.jsonl"), "--out", str(tmp_path / "pairs.jsonl"))
    assert len(read_rows(tmp_path / "pairs.jsonl", "reward").rows) == 4
    assert json.loads((tmp_path / "pairs.jsonl.card.json").read_text())["made_by"]["command"] == "citation-pairs"
    write_rows([row("Rotterdam [1]")], tmp_path / "raft.jsonl")
    run("preferences", str(tmp_path / "raft.jsonl"), "--every", "--out", str(tmp_path / "every.jsonl"))
    assert all(isinstance(one, PreferenceRow) for one in read_rows(tmp_path / "every.jsonl", "reward").rows)
    write_rows([row("Rotterdam [1]")], tmp_path / "one.jsonl")
    said = CliRunner().invoke(
        app, ["citation-pairs", str(tmp_path / "one.jsonl"), "--out", str(tmp_path / "none.jsonl")]
    )
    assert "several answers to each" in str(said.exception)
