"""finetune.dpo on a tiny model: the preferred answer gains, against the right reference."""

import json
import math
from pathlib import Path

import pytest
from tiny_model import tiny_model
from tuning import curve, recipe, tune, write_rows

pytestmark = pytest.mark.slow
SHORT = ("max_steps=10", "held_out=0", "gradient_accumulation_steps=1", "per_device_train_batch_size=4",
         "save_strategy=no", "learning_rate=1e-2")  # fmt: skip
# Losses of the first ten steps, float32. They may differ by TOLERANCE on another processor.
TOLERANCE = 0.02
TRAJECTORY = [0.6931, 0.6931, 0.532, 0.4321, 0.3884, 0.3135, 0.2596, 0.2513, 0.2416, 0.2363]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", "dpo")


def test_the_preferred_answers_gain_and_the_loss_goes_where_it_went(base: Path, rows: Path, tmp_path: Path) -> None:
    manifest = tune(recipe("dpo-lora", rows, base, *SHORT), tmp_path / "out")
    assert curve(tmp_path / "out") == pytest.approx(TRAJECTORY, abs=TOLERANCE)
    margins = curve(tmp_path / "out", "rewards/margins")
    assert margins[0] == 0
    assert margins[-1] > 1
    assert manifest.metrics["rewards/accuracies"] == 1
    # A copy of the adapter, that the reference is not needed for, is not saved.
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


def test_whole_weights_are_compared_with_a_copy_of_what_they_were(base: Path, rows: Path, tmp_path: Path) -> None:
    mine = tmp_path / "dpo-full.toml"
    mine.write_text('method = "dpo"\n[trained]\nweights = "full"\n')
    given = [one for one in SHORT if not one.startswith("learning_rate")]
    tune(recipe(str(mine), rows, base, *given, "learning_rate=1e-4", "beta=0.5"), tmp_path / "out")
    losses = curve(tmp_path / "out")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.6


def test_a_run_that_goes_on_from_an_adapter_is_compared_with_it(base: Path, rows: Path, tmp_path: Path) -> None:
    taught = write_rows(tmp_path / "sft.jsonl", "sft")
    before = tune(recipe("sft-lora", taught, base, *SHORT), tmp_path / "parent")
    limited = before.model_copy(
        update={"acl": ("engineers",), "documents": ("secret.md",), "prompt_version": "tuned-1"}
    )
    (tmp_path / "parent/manifest.json").write_text(limited.model_dump_json())
    parent = f"parent={json.dumps(str(tmp_path / 'parent'))}"
    manifest = tune(recipe("dpo-lora", rows, base, *SHORT, parent), tmp_path / "out")
    assert curve(tmp_path / "out")[0] == pytest.approx(
        math.log(2), abs=1e-5
    )  # the bare base as reference would give less
    assert curve(tmp_path / "out", "rewards/margins")[-1] > 0.5
    assert str(manifest.parent).startswith("parent@")
    assert manifest.acl == ("engineers",)  # what it was trained on before is in the weights still
    assert "secret.md" in manifest.documents
    assert manifest.prompt_version == "tuned-1"
    assert not (tmp_path / "out/ref").exists()
