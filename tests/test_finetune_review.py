"""Rows that a person accepts, edits or rejects."""

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.cli_dataset import review
from finetune.review import decisions_path, edited_by, read_decisions
from finetune.rows import read_rows
from finetune.rows_lines import write_rows
from finetune.rows_messages import Unfit
from finetune.schemas import Message, PreferenceRow, Provenance, SftRow
from ingest.errors import InvalidError

HOSTILE = "[red]x[/] \x1b[2J\u202ey"


def row(at: int, answer: str | None = None) -> SftRow:
    return SftRow(
        prompt=(Message(role="user", content=f"What is the code of part {at}?"),),
        completion=(Message(role="assistant", content=answer or f"GR-{at}"),),
        source=Provenance(documents=(f"{at}.md",), acl=("staff",)),
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    write_rows([row(at) for at in range(5)], path)
    return path


def press(monkeypatch: pytest.MonkeyPatch, keys: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(keys))


def verdicts(file: Path) -> list[tuple[str, str]]:
    return [(one.place, one.verdict) for one in read_decisions(decisions_path(file)).values()]


def applied(file: Path) -> list[str]:
    out = file.with_name("out.jsonl")
    review(file, apply=out)
    if not out.stat().st_size:
        return []
    return [one.completion[0].content for one in read_rows(out, "sft").rows if isinstance(one, SftRow)]


def test_decisions_are_kept_and_go_on(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    press(monkeypatch, "a\nr\nq")
    review(file)
    shown = capsys.readouterr()
    assert "1 of 5 · rows.jsonl:1\ndocuments: 0.md\nuser: What is the code of part 0?\nanswer: GR-0" in shown.out
    assert "1 accepted, 0 edited, 1 rejected, 3 undecided" in shown.err
    press(monkeypatch, "a")  # the end of the pipe is the end of the review
    review(file)
    shown = capsys.readouterr()
    assert "1 of 3 · rows.jsonl:3" in shown.out
    assert "part 0?" not in shown.out
    assert verdicts(file) == [("rows.jsonl:1", "accept"), ("rows.jsonl:2", "reject"), ("rows.jsonl:3", "accept")]
    assert applied(file) == ["GR-0", "GR-2"]


def test_an_answer_is_edited_on_the_line(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    press(monkeypatch, "eGR-zero\ne\nGR-one\\nand more\ne \nra")
    review(file)
    assert "nothing was changed" in capsys.readouterr().out
    assert applied(file) == ["GR-zero", "GR-one\nand more", "GR-3"]
    first = read_rows(file.with_name("out.jsonl"), "sft").rows[0]
    assert first.source == Provenance(documents=("0.md",), acl=("staff",))  # who may see it stays


def test_back_skip_and_help(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    press(monkeypatch, "abr?sabq")
    review(file)
    assert verdicts(file) == [("rows.jsonl:1", "reject"), ("rows.jsonl:3", "accept")]
    shown = capsys.readouterr().out
    assert "1 of 5, accepted before · rows.jsonl:1" in shown
    assert shown.count("a accept, e edit") == 8  # under each row shown, and for the question mark
    press(monkeypatch, "a")
    review(file, again=True)
    assert verdicts(file)[0] == ("rows.jsonl:1", "accept")


def test_decisions_hold_when_the_file_is_extended(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    press(monkeypatch, "arrrr")
    review(file)
    write_rows([row(9), row(1), row(0, "GR-other"), row(0), row(0)], file)
    assert applied(file) == ["GR-0", "GR-0"]  # a changed row is another one; the same row twice is decided once
    press(monkeypatch, "aa")
    review(file)
    assert applied(file) == ["GR-9", "GR-other", "GR-0", "GR-0"]


def test_a_line_that_a_kill_cut_off(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    press(monkeypatch, "aa")
    review(file)
    kept = decisions_path(file)
    whole = kept.read_bytes()
    for cut in (1, 20, len(whole.splitlines()[1])):
        kept.write_bytes(whole[:-cut])
        assert [place for place, _ in verdicts(file)] == ["rows.jsonl:1"]
        press(monkeypatch, "r")
        review(file)
        assert verdicts(file) == [("rows.jsonl:1", "accept"), ("rows.jsonl:2", "reject")]
        assert all(json.loads(line) for line in kept.read_text().splitlines())
    kept.write_text("{}\n" + kept.read_text())
    with pytest.raises(InvalidError, match=r"rows.jsonl.review.jsonl:1: row: Field required"):
        review(file)


def test_hostile_rows_are_shown_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    pair = PreferenceRow(
        prompt=(Message(role="user", content=HOSTILE + "x" * 5000 + HOSTILE),),
        chosen=(Message(role="assistant", content=HOSTILE),),
        rejected=(Message(role="assistant", content="no"),),
        source=Provenance(documents=(HOSTILE,), kind=HOSTILE),
    )
    write_rows([pair], path)
    press(monkeypatch, "fq")
    review(path)
    cut, whole = capsys.readouterr().out.split("a accept")[:2]
    assert not {"\x1b", "\u202e"} & set(cut + whole)
    assert r"chosen: [red]x[/] \x1b[2J\u202ey" in cut
    assert "... 3532 characters ..." in cut
    assert cut.count(r"[red]x[/] \x1b[2J\u202ey") == 5  # source, both ends of the prompt, answer
    assert "x" * 5000 in whole


def test_rows_that_do_not_fit_are_left_out(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("not json\n" + file.read_text())
    press(monkeypatch, "a")
    review(file)
    assert "1 rows do not fit and are left out" in capsys.readouterr().err
    assert applied(file) == ["GR-0"]


def test_where_rows_are_not_written(file: Path) -> None:
    file.with_name("kept.jsonl.card.json").write_text("{}")
    for out, wanted in (
        (file, "is the file that is read"),
        (file.with_name("kept.jsonl"), "never changes"),
        (file.parent / "nowhere" / "x.jsonl", "cannot be written"),
    ):
        with pytest.raises(InvalidError, match=wanted):
            review(file, apply=out)


def editor(folder: Path, script: str) -> str:
    path = folder / "editor.py"
    path.write_text(f"import sys, pathlib\nfile = pathlib.Path(sys.argv[1])\ntext = file.read_text()\n{script}\n")
    return f"{sys.executable} -IS {path}"


def test_a_row_is_edited_in_an_editor(tmp_path: Path) -> None:
    before = row(1, "first\nsecond")
    changed = edited_by(editor(tmp_path, "file.write_text(text.replace('second', 'other'))"), before)
    assert changed == row(1, "first\nother")
    assert edited_by(editor(tmp_path, "assert '    first\\n    second' in text"), before) is None
    for script, wanted in (
        ("sys.exit(3)", "status 3"),
        ("file.write_text('a: [')", "not YAML any more"),
        ("file.write_text('x')", "no fields"),
        ("file.write_text(text.replace('assistant', 'user'))", "an answer is the assistant's"),
        ("file.write_text('prompt: a\\ncompletion: b\\nlabel: true')", "another kind"),
    ):
        with pytest.raises(Unfit, match=wanted):
            edited_by(editor(tmp_path, script), before)


def test_a_killed_review_keeps_what_was_decided(file: Path, tmp_path: Path) -> None:
    """On a pseudo-terminal a key counts without a line end, EDITOR is used, and a decision is on the disk before the next row."""
    master, slave = os.openpty()
    command = [sys.executable, "-c", "from service.cli import main; main()", "dataset", "review", str(file)]
    environment = {
        **os.environ,
        "EDITOR": editor(tmp_path, "file.write_text(text.replace('GR-1', 'GR-one'))"),
        "VISUAL": "",
    }
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    os.write(master, b"a")  # before anything is asked
    shown = _until(master, "2 of 5")
    os.write(master, b"e")
    shown += _until(master, "3 of 5")
    process.send_signal(signal.SIGKILL)
    process.wait(200)
    os.close(master)
    assert "Traceback" not in shown
    assert verdicts(file) == [("rows.jsonl:1", "accept"), ("rows.jsonl:2", "edit")]
    assert applied(file) == ["GR-0", "GR-one"]


def _until(master: int, wanted: str) -> str:
    """What is shown as far as the keys that stand under the row `wanted`."""
    shown = ""
    deadline = time.monotonic() + 200
    while wanted not in shown or "q quit" not in shown.split(wanted)[-1]:
        assert time.monotonic() < deadline, shown
        if select.select([master], [], [], 1)[0]:
            shown += os.read(master, 4096).decode("utf-8", "replace")
    return shown
