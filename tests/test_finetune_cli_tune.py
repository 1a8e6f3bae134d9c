"""`graft tune`: from a command to a folder, and what it says of what it is given."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from tiny_model import tiny_model
from tuning import write_rows
from typer.testing import CliRunner, Result

from finetune.base_folder import find_base
from finetune.cli_tune import tune
from finetune.runs import read_manifest
from ingest.errors import ConflictError, GraftError, NotFoundError, SettingsError
from service.show import clock, said_of_training
from service.tuning import TuneProgress

app = typer.Typer()
app.command()(tune)
SHORT = ("--set", "max_steps=2", "--set", "gradient_accumulation_steps=1", "--set", "dtype=float32")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GRAFT_MODELS", str(models))
    monkeypatch.setenv("FINETUNE_TRACKERS", "")
    monkeypatch.setenv("FINETUNE_THREADS", "1")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", "sft")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def refused(*arguments: object) -> GraftError:
    """-> what the command ends with, which `graft` shows as one line."""
    found = run(*arguments).exception
    assert isinstance(found, GraftError), found
    return found


def test_it_lists_its_recipes() -> None:
    shown = run("--list").output
    assert re.search(r"sft-lora +Supervised fine-tuning of low-rank matrices", shown)
    assert "kto-lora" in shown


def test_it_says_what_is_missing_or_unknown(rows: Path) -> None:
    assert "name a recipe" in str(refused())
    assert "give them with --data FILE" in str(refused("sft-lora"))
    assert isinstance(refused("sft-lorra", "--data", rows), NotFoundError)
    assert "did you mean learning_rate" in str(refused("sft-lora", "--data", rows, "--set", "learning_rat=1"))
    assert "not both" in str(refused("sft-lora", "--llamafactory", rows))
    assert "no model 'nowhere'" in str(refused("sft-lora", "--data", rows, "--base", "nowhere"))


def test_bad_rows_are_named_by_their_lines_all_at_once_before_anything_is_loaded(rows: Path, tmp_path: Path) -> None:
    with rows.open("a") as file:
        file.write('{"messages": []}\nnot json\n')
    error = str(refused("sft-lora", "--data", rows, "--out", tmp_path / "out"))
    assert "rows.jsonl:25" in error
    assert "rows.jsonl:26" in error
    assert not (tmp_path / "out").exists()


def test_a_setting_of_the_environment_that_does_not_fit_is_named(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_MEMORY_SHARE", "3")
    assert "FINETUNE_MEMORY_SHARE" in str(refused("sft-lora", "--data", rows))


@pytest.mark.slow
def test_what_cannot_be_begun_is_said_before_a_model_is_loaded(
    rows: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    asked = ("sft-lora", "--data", rows, "--base", base, "--out", tmp_path / "file/out")
    assert "cannot be made" in str(refused(*asked))
    monkeypatch.setenv("FINETUNE_MEMORY_SHARE", "0.0000001")
    assert "FINETUNE_MEMORY_SHARE" in str(refused(*asked))


def test_a_base_is_found_by_folder_name_and_hub_name(models: Path, tmp_path: Path) -> None:
    bundled = models / "smollm2-135m-instruct"
    for name in (None, "smollm2-135m-instruct", str(bundled), "HuggingFaceTB/SmolLM2-135M-Instruct"):
        assert find_base(name, models) == bundled
    for name in ("smollm", str(tmp_path), "../smollm2"):
        with pytest.raises(SettingsError):
            find_base(name, models)


def test_progress_is_said_in_a_line() -> None:
    at = TuneProgress(
        stage="training", step=12, steps=40, loss=1.23456, eval_loss=1.3, tokens_per_second=165.4, seconds_left=200
    )
    assert said_of_training(at) == "step 12/40, loss 1.235, held out 1.3, 165 tokens/s, 3:20 left"
    assert said_of_training(TuneProgress(stage="loading")) == ""
    assert (clock(59.6), clock(3725)) == ("1:00", "1:02:05")


@pytest.mark.slow
def test_one_command_trains_and_says_what_comes_next(base: Path, rows: Path, tmp_path: Path, home: Path) -> None:
    out, manifest = tmp_path / "out", tmp_path / "manifest.json"
    done = run("sft-lora", "--data", rows, "--base", base, "--out", out, "--json", manifest, *SHORT)
    assert done.exit_code == 0, done.exception
    shown = done.output
    assert re.search(r"22 rows for sft, 2 held out", shown)
    assert "memory: about" in shown
    assert re.search(r"trained 32,768 of 3,2\d\d,\d\d\d parameters of weights-", shown)
    assert f"graft check {out}" in shown.replace("\n", "")
    assert json.loads(manifest.read_text()) == json.loads((out / "manifest.json").read_text())
    assert {"adapter_model.safetensors", "adapter_config.json", "curve.png"} <= {one.name for one in out.iterdir()}
    assert isinstance(refused("sft-lora", "--data", rows, "--base", base, "--out", out, *SHORT), ConflictError)

    # Without --out, below the home, by recipe and by what is trained on what.
    done = run("sft-ia3", "--data", rows, "--eval-data", rows, "--base", base, *SHORT)
    assert done.exit_code == 0, done.exception
    found = [one for one in (home / "runs").iterdir() if re.fullmatch(r"sft-ia3-[0-9a-f]{8}", one.name)]
    assert len(found) == 1
    assert "rows that ask what is held out too" in done.output
    assert read_manifest(found[0]).held_out_rows == 24
    assert "graft export" in done.output


@pytest.mark.slow
def test_a_llamafactory_file_trains_into_its_own_folder(base: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {at}.", "input": "", "output": f"{at}, then."} for at in range(12)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "data.json"}}))
    file = tmp_path / "train.yaml"
    file.write_text(
        f"model_name_or_path: {base}\nstage: sft\ndo_train: true\nfinetuning_type: lora\nlora_rank: 4\nlora_target: all\n"
        f"dataset_dir: {tmp_path}\ndataset: mine\ntemplate: default\ncutoff_len: 128\nmax_samples: 8\n"
        f"per_device_train_batch_size: 2\nlearning_rate: 1.0e-4\nmax_steps: 2\noutput_dir: {tmp_path / 'lf'}\n"
    )
    done = run("--llamafactory", file, "--set", "max_steps=1")
    assert done.exit_code == 0, done.exception
    manifest = read_manifest(tmp_path / "lf")
    assert (manifest.rows, manifest.recipe["trained"]["r"], manifest.metrics["steps"]) == (8, 4, 1)
    with file.open("a") as more:
        more.write("frobnicate: 1\n")
    assert "frobnicate" in str(refused("--llamafactory", file))


@pytest.mark.slow
def test_a_run_in_a_terminal_is_ended_by_sigterm_with_one_line_and_goes_on(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    command = [str(Path(sys.executable).parent / "graft"), "tune", "sft-lora", "--data", str(rows), "--base", str(base),
               "--out", str(tmp_path / "out"), "--set", "max_steps=2000", "--set", "held_out=0", *SHORT[2:]]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        lines = []
        for line in child.stderr:
            lines.append(line)
            if line.startswith("training"):
                child.send_signal(signal.SIGTERM)
                break
        lines += child.stderr.readlines()
    assert child.returncode == 1
    assert "Traceback" not in "".join(lines)
    assert re.match(r"graft: training was stopped: its checkpoint of step \d+ is kept", lines[-1])
