"""A run that is killed, stopped or started twice: it goes on as if nothing had happened, or says what is in the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_model import tiny_model
from tuning import curve, recipe, tune, write_other_rows, write_rows

from finetune import runs
from finetune.hooks import Hooks, StoppedError
from finetune.recipe import Recipe
from ingest.errors import ConflictError, LockedError
from service.tuning import TuneProgress

pytestmark = pytest.mark.slow
# With dropout, whose random states have to come back, and held-out rows that are best at step 8: with early stopping's patience
# it ends at step 14, also when it goes on after step 10.
RUN = ("max_steps=16", "eval_steps=2", "gradient_accumulation_steps=2", "per_device_train_batch_size=2",
       "learning_rate=5e-3", "lr_scheduler_type=constant", "lora_dropout=0.1", "patience=3")  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_other_rows(folder / "held-out.jsonl")
    return write_rows(folder / "rows.jsonl", "sft")


def asked_of(rows: Path, base: Path, *more: str) -> Recipe:
    return recipe("sft-lora", rows, base, f"eval_data={json.dumps(str(rows.with_name('held-out.jsonl')))}", *RUN, *more)


@pytest.fixture(scope="module")
def unbroken(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    tune(asked_of(rows, base), out)
    return out


def stopping(after: int, act: Any) -> Hooks:
    """Hooks that act once, when a step's loss is known."""
    done: list[int] = []

    def progress(at: TuneProgress) -> None:
        if at.step >= after and at.loss is not None and not done:
            done.append(at.step)
            act()

    return Hooks(progress)


def assert_the_same(out: Path, unbroken: Path) -> None:
    for name in ("loss", "eval_loss", "learning_rate", "grad_norm"):
        assert curve(out, name) == pytest.approx(curve(unbroken, name), rel=1e-4)
    said = [
        [json.loads(line)["step"] for line in (one / "log.jsonl").read_text().splitlines()] for one in (out, unbroken)
    ]
    assert said[0] == said[1]
    spent = [json.loads(line)["seconds"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert spent == sorted(spent)  # with those before it was ended
    assert json.loads((out / "manifest.json").read_text())["seconds"] >= spent[-1]
    from safetensors.numpy import load_file

    ours, theirs = (load_file(one / "adapter_model.safetensors") for one in (out, unbroken))
    assert all(abs(ours[name] - theirs[name]).max() < 1e-5 for name in theirs)
    assert not (out / "checkpoints").exists()


def in_a_process(rows: Path, base: Path, out: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Of its own, which may be killed or limited. `code` has `asked` and `out`."""
    script = (
        f"import os, resource, signal, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nfrom tuning import tune\nfrom ingest.errors import NoRoomError\n"
        "from test_finetune_resume import asked_of, stopping\n"
        f"asked, out = asked_of(Path({str(rows)!r}), Path({str(base)!r})), Path({str(out)!r})\n"
    )
    command = [sys.executable, "-c", script + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


def test_a_killed_run_goes_on_and_its_curve_is_that_of_an_unbroken_one(
    base: Path, rows: Path, unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    died = in_a_process(
        rows, base, out, "tune(asked, out, stopping(11, lambda: os.kill(os.getpid(), signal.SIGKILL)))\n"
    )
    assert died.returncode == -signal.SIGKILL, died.stderr[-500:]
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == [
        "checkpoint-10",
        "checkpoint-8",
    ]  # the last, the best
    assert not (out / "manifest.json").exists()
    # As if the kill had come while a checkpoint was written.
    half = out / "checkpoints/checkpoint-12"
    shutil.copytree(out / "checkpoints/checkpoint-10", half)
    (half / "trainer_state.json").write_text('{"global_step": 12, "log_hist')

    assert goes_on(asked_of(rows, base), out) == 11
    assert_the_same(out, unbroken)


def test_a_disk_that_fills_up_in_a_checkpoint_is_said_and_the_run_goes_on(
    base: Path, rows: Path, unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = in_a_process(
        rows, base, out,
        "def full(): resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))\n"
        "try: tune(asked, out, stopping(9, full))\n"
        "except NoRoomError as error: print(error)\n",
    )  # fmt: skip
    assert "Traceback" not in ran.stderr
    assert f"{str(out)!r} cannot be written to" in ran.stdout
    assert "the same command again" in ran.stdout
    assert goes_on(asked_of(rows, base), out) == 9
    assert_the_same(out, unbroken)


def goes_on(asked: Any, out: Path) -> int:
    """-> the first step that was trained."""
    told: list[TuneProgress] = []
    tune(asked, out, Hooks(told.append))
    return next(one.step for one in told if one.loss is not None)


@pytest.mark.parametrize(("way", "last"), [("cancelled", 2), ("SIGTERM", 11)])  # with an evaluation, and between two
def test_a_run_that_is_ended_keeps_a_checkpoint_says_so_and_goes_on(
    way: str, last: int, base: Path, rows: Path, unbroken: Path, tmp_path: Path
) -> None:
    asked, out, ended = asked_of(rows, base), tmp_path / "out", False

    def end() -> None:
        nonlocal ended
        ended = True

    act = {"cancelled": end, "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM)}[way]
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(StoppedError, match=f"its checkpoint of step {last} is kept") as stopped:
        tune(asked, out, stopping(last - 1, act)._replace(cancelled=lambda: ended))
    assert (stopped.value.step, stopped.value.out) == (last, out)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert not (out / "manifest.json").exists()
    assert goes_on(asked, out) == last + 1
    assert_the_same(out, unbroken)


def test_a_finished_run_is_not_trained_over_unless_it_is_asked_for(
    base: Path, rows: Path, unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    asked = asked_of(rows, base)
    with pytest.raises(ConflictError, match="holds a finished run: add --restart"):
        tune(asked, out)
    with pytest.raises(ConflictError, match="holds a finished run: add --restart"):
        tune(recipe("sft-ia3", rows, base, "max_steps=1"), out)
    assert (out / "adapter_model.safetensors").read_bytes() == (unbroken / "adapter_model.safetensors").read_bytes()
    manifest = tune(recipe("sft-ia3", rows, base, "max_steps=1"), out, restart=True)
    assert manifest.weights == "ia3"
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "IA3"


def test_an_unfinished_run_of_something_else_is_not_mixed_with(base: Path, rows: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", write_rows(rows.with_name("other.jsonl"), "sft", 12)
    asked = asked_of(rows, base)
    # One that has not come as far as a checkpoint is replaced without a word.
    tune_until_stopped(asked_of(rows, base, "r=2"), out, keep=False)
    tune_until_stopped(asked, out)
    with pytest.raises(ConflictError, match="an unfinished run of another recipe: add --restart"):
        tune(asked_of(rows, base, "r=4"), out)
    with pytest.raises(ConflictError, match="an unfinished run of another rows"):
        tune(asked_of(other, base), out)
    # Where rows and base lie makes no difference, nor does the recipe's name.
    moved = rows.rename(rows.with_name("moved.jsonl"))
    try:
        again = asked_of(moved, base).model_copy(update={"name": "mine"})
        assert tune(again, out).metrics["steps"] == 14
    finally:
        moved.rename(rows)


def tune_until_stopped(asked: Any, out: Path, keep: bool = True) -> None:
    with pytest.raises(StoppedError):
        tune(asked, out, Hooks(cancelled=lambda: True))
    if not keep:
        shutil.rmtree(out / "checkpoints")


def test_other_files_are_left_alone(base: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("x")
    for restart in (False, True):
        with pytest.raises(ConflictError, match=r"holds other files, as 'thesis\.txt'"):
            tune(asked_of(rows, base), tmp_path / "out", restart=restart)
    assert (tmp_path / "out/thesis.txt").read_text() == "x"


def test_two_at_once_do_not_write_into_one_folder(base: Path, rows: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from finetune.runs import claimed\n"
        f"with claimed(Path({str(tmp_path / 'out')!r})):\n    print('claimed', flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "claimed"
        with pytest.raises(LockedError, match="another process is training into"):
            tune(asked_of(rows, base), tmp_path / "out")
    finally:
        other.communicate("", timeout=30)
    started = time.monotonic()
    with runs.claimed(tmp_path / "out"):  # its end gives the folder back
        assert time.monotonic() - started < 5
