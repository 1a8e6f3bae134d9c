"""finetune.kto on a tiny model: wanted answers gain on unwanted ones."""

from pathlib import Path

import pytest
from tiny_model import tiny_model
from tuning import curve, recipe, tune, write_rows

from ingest.errors import InvalidError

pytestmark = pytest.mark.slow
SHORT = ("max_steps=10", "held_out=0", "gradient_accumulation_steps=1", "save_strategy=no", "learning_rate=1e-2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", "kto", 25)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_wanted_answers_gain_on_unwanted_ones(loss: str, base: Path, rows: Path, tmp_path: Path) -> None:
    tune(recipe("kto-lora", rows, base, *SHORT, f"loss_type={loss}"), tmp_path / "out")
    losses, margins = curve(tmp_path / "out"), curve(tmp_path / "out", "rewards/margins")
    assert losses[0] == pytest.approx(0.5, abs=1e-4)
    assert losses[-1] < 0.45
    assert margins[-1] > 0.5


def test_a_batch_of_one_has_no_other_prompts_to_compare_with(base: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="set per_device_train_batch_size to 2"):
        tune(recipe("kto-lora", rows, base, *SHORT, "per_device_train_batch_size=1"), tmp_path / "out")


def test_the_drift_is_estimated_on_answers_to_other_prompts(base: Path, rows: Path) -> None:
    from types import SimpleNamespace

    from finetune.chat import read_chat
    from finetune.kto import _dataset
    from finetune.rows import read_rows
    from finetune.run import Run

    held = read_rows(rows, "kto")
    run = Run(recipe("kto-lora", rows, base), base, base, read_chat(base), held, held, "float32", (), (), None)
    args = SimpleNamespace(max_length=512, seed=1, per_device_train_batch_size=4, loss_type="kto")
    dataset, left_out = _dataset(run, held, args)
    assert (len(dataset), left_out) == (25, 0)
    for start in range(0, 25, 4):
        batch = dataset[start : start + 4]
        others = batch["completion_ids"] if start < 24 else [dataset[23]["completion_ids"]]
        assert sorted(batch["KL_completion_ids"]) == sorted(others)
    assert dataset["label"][:] != [bool(at % 2) for at in range(25)]  # the trainer keeps the order: it is drawn before
