"""What is told of rows before anything trains on them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from finetune.row_report import Report, report, show, visible
from finetune.rows_lines import rows_of, write_rows
from finetune.schemas import KtoRow, Message, PreferenceRow, Provenance, Row, SftRow
from ingest.errors import InvalidError
from service.settings import ServiceSettings


def asked(prompt: str, answer: str, *documents: str, **source: Any) -> SftRow:
    return SftRow(
        prompt=(Message(role="user", content=prompt),),
        completion=(Message(role="assistant", content=answer),),
        source=Provenance(documents=documents, **source),
    )


def said(text: str) -> tuple[Message, ...]:
    return (Message(role="assistant", content=text),)


def of(rows: list[Row], held_out: list[Row] | None = None, **more: Any) -> Report:
    places = [f"rows.jsonl:{at}" for at, _ in enumerate(rows, 1)]
    found = rows_of(rows, places, "pumps")
    return report(found, None if held_out is None else rows_of(held_out), more.pop("tokenizer", None), **more)


@pytest.fixture(scope="session")
def bundled(models: Path) -> tuple[Tokenizer, str]:
    """The chat model's tokenizer and template."""
    folder = models / ServiceSettings().model
    return Tokenizer.from_file(str(folder / "tokenizer.json")), (folder / "chat_template.jinja").read_text()


def test_lengths_are_those_of_the_chat_template(bundled: tuple[Tokenizer, str]) -> None:
    tokenizer, template = bundled
    rows: list[Row] = [
        asked("What?", "A pump."),
        asked("What is " + "very " * 50 + "long?", "Yes."),
        asked("Who?", "Me."),
    ]
    found = of(rows, tokenizer=tokenizer, template=template, max_length=60)
    opening = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    prompt = f"{opening}<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert found.prompt_tokens is not None
    assert found.prompt_tokens.min == len(tokenizer.encode(prompt, add_special_tokens=False).ids)
    assert found.answer_tokens is not None
    assert found.answer_tokens.max == len(tokenizer.encode("A pump.<|im_end|>", add_special_tokens=False).ids)
    assert found.total_tokens is not None
    assert found.total_tokens.max == found.prompt_tokens.max + 3  # "Yes." and the end
    assert found.too_long == ("rows.jsonl:2",)
    assert not found.estimated
    guessed = of(rows, tokenizer=tokenizer, max_length=60)
    assert (guessed.estimated, guessed.too_long) == (True, ("rows.jsonl:2",))
    assert of(rows, max_length=60).total_tokens is None


def test_a_row_that_the_template_does_not_take_is_named(bundled: tuple[Tokenizer, str]) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system!') }}{% endif %}"
    template = refusing + "{{ messages[0]['content'] }}"
    rows: list[Row] = [asked("What?", "A pump.")]
    assert not of(rows, tokenizer=bundled[0], template=template).estimated
    ruled = (Message(role="system", content="Be brief."), *rows[0].prompt)
    with pytest.raises(InvalidError, match=r"rows.jsonl:2: .* roles \['system', 'user'\]: No system!"):
        of([*rows, SftRow(prompt=ruled, completion=said("A pump."))], tokenizer=bundled[0], template=template)


def test_rows_that_are_there_twice_or_contradict() -> None:
    found = of([asked("What?", "A pump."), asked("Who?", "Me."), asked(" what? ", "a  PUMP."), asked("Who?", "You.")])
    assert found.duplicates == (("rows.jsonl:1", "rows.jsonl:3"),)
    assert found.contradictions == (("rows.jsonl:2", "rows.jsonl:4"),)


def test_preferences_and_labels_that_contradict() -> None:
    prompt = (Message(role="user", content="What?"),)
    pairs: list[Row] = [
        PreferenceRow(prompt=prompt, chosen=said("a"), rejected=said("b")),
        PreferenceRow(prompt=prompt, chosen=said("a"), rejected=said("c")),
        PreferenceRow(prompt=prompt, chosen=said("b"), rejected=said("c")),
    ]
    found = of(pairs)
    assert found.method == "dpo"
    assert found.contradictions == (("rows.jsonl:1", "rows.jsonl:3"),)
    labelled: list[Row] = [
        KtoRow(prompt=prompt, completion=said("a"), label=True),
        KtoRow(prompt=prompt, completion=said("b"), label=False),
        KtoRow(prompt=prompt, completion=said("a"), label=False),
        KtoRow(prompt=prompt, completion=said("c"), label=False),
    ]
    found = of(labelled)
    assert (found.method, found.wanted) == ("kto", 0.25)
    assert found.contradictions == (("rows.jsonl:1", "rows.jsonl:3"),)
    assert found.duplicates == ()


def test_an_empty_answer_is_named() -> None:
    prompt = (Message(role="user", content="What?"),)
    found = of([PreferenceRow(prompt=prompt, chosen=said("a"), rejected=said(" "))])
    assert found.empty_answers == ("rows.jsonl:1",)


def test_what_the_held_out_rows_share() -> None:
    rows: list[Row] = [
        asked("What?", "A.", "a.md"),
        asked("Who?", "B.", "b.md"),
        asked("passages: Why?", "C.", "c.md", question="Why?"),
    ]
    found = of(rows, [asked("WHAT?", "A.", "z.md"), asked("x", "y", "b.md"), asked("p2", "D.", question="why?")])
    assert found.overlap == ("rows.jsonl:1", "rows.jsonl:3")
    assert found.overlap_documents == ("b.md",)
    assert found.held_out == 3
    assert of(rows).overlap == ()


def test_refusals_groups_and_kinds() -> None:
    rows: list[Row] = [
        asked("a", "The documents say nothing about this.", acl=("staff", "it"), kind="refusal"),
        asked("b", "A pump [1]", acl=("it",), kind="answer"),
        asked("c", "A valve [1]", kind="answer"),
        asked("d", "A seal [1]", kind="answer"),
    ]
    found = of(rows)
    assert (found.refusals, found.acl, found.kinds) == (0.25, ("it",), {"refusal": 1, "answer": 3})


def test_shown_rows_do_nothing_to_the_terminal(
    capsys: pytest.CaptureFixture[str], bundled: tuple[Tokenizer, str]
) -> None:
    hostile = "[red]x[/] \x1b[2J\r\u202eevil\x00 \\[bold]y :smile: [/]"
    rows: list[Row] = [asked("What?", hostile, f"doc{hostile}"), asked("What?", "b", f"doc{hostile}")]
    places = (f"{hostile}:1", f"{hostile}:2")
    found = report(rows_of(rows, places, hostile), rows_of(rows), bundled[0], 4, bundled[1])
    show(found)
    shown = capsys.readouterr().out
    assert not {"\x1b", "\r", "\u202e", "\x00"} & set(shown)
    assert r"[red]x[/] \x1b[2J\r\u202eevil\x00 \[bold]y :smile: [/]: 2 rows for sft, 2 held out" in shown
    assert "2 rows longer than 4 tokens, so not trained on" in shown
    assert "1 rows in contradiction" in shown
    assert "1 documents on both sides" in shown
    assert json.loads(found.model_dump_json())["max_length"] == 4


def test_nothing_held_out_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    show(of([asked("a", "b")], []))
    assert "nothing is held out" in capsys.readouterr().out


def test_visible_keeps_every_language() -> None:
    assert visible("Füllmenge: 3 l\n阀门 V-3") == "Füllmenge: 3 l\n阀门 V-3"


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str], models: Path) -> None:
    from finetune.cli_dataset import inspect

    file = tmp_path / "rows.jsonl"
    write_rows([asked("What?", "A pump."), asked("Who?", "Me.")], file)
    inspect(file, max_length=40, samples=1, to=str(tmp_path / "report.json"))
    shown = capsys.readouterr().out
    assert "rows: 2 rows for sft" in shown
    assert "rows.jsonl:1\nuser: What?\nanswer: A pump." in shown
    assert "Who?" not in shown
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written["rows"], written["total_tokens"]["max"] > 30) == (2, True)
    file.write_text(file.read_text() + "not json\n")
    with pytest.raises(InvalidError, match=r"rows.jsonl:3: not JSON"):
        inspect(file, max_length=40, samples=0)
    good = tmp_path / "good.jsonl"
    inspect(file, max_length=40, samples=0, fitting=good, eval_data=good if good.exists() else None)
    assert len(good.read_text().splitlines()) == 2
    with pytest.raises(InvalidError, match="sft, dpo, kto"):
        inspect(file, method="rlhf", max_length=40, samples=0)
