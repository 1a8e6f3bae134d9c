"""finetune.sft, and what the methods share: losses, packing, early stopping, what ends a run, the manifest. On a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_model import tiny_model
from tuning import curve, question, recipe, tune, write_other_rows, write_rows

from finetune.hooks import Hooks
from finetune.methods import load_tuned
from finetune.recipe import recipes
from finetune.runs import read_manifest
from finetune.schemas import SftRow
from ingest.errors import InvalidError, SettingsError
from service.tuning import TuneProgress

pytestmark = pytest.mark.slow
SHORT = ("max_steps=10", "held_out=0", "gradient_accumulation_steps=1", "per_device_train_batch_size=4")
FAST = ("learning_rate=1e-2", "save_strategy=no")
# Losses of the first ten steps, float32. They may differ by TOLERANCE on another processor.
TOLERANCE = 0.02
TRAJECTORIES = {
    "sft-lora": [10.7708, 10.767, 10.5448, 10.4122, 10.2537, 10.2316, 10.1053, 10.0687, 10.0106, 10.0257],
    "sft-qlora": [10.7708, 10.7668, 10.5443, 10.4156, 10.2396, 10.2293, 10.0893, 10.0674, 10.0048, 10.0049],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", "sft")


@pytest.mark.parametrize("name", recipes())
def test_each_recipe_trains_from_end_to_end(name: str, base: Path, tmp_path: Path) -> None:
    method = "sft" if name.startswith("raft") else name.partition("-")[0]
    data = write_rows(tmp_path / "rows.jsonl", method)
    manifest = tune(recipe(name, data, base, "max_steps=2", "held_out=0.2"), tmp_path / "out")
    assert manifest == read_manifest(tmp_path / "out")
    assert (manifest.method, manifest.rows + manifest.held_out_rows) == (method, 24)
    assert 0 < manifest.trainable_parameters <= manifest.all_parameters
    assert len(curve(tmp_path / "out")) == 2
    assert not (tmp_path / "out/checkpoints").exists()
    load_tuned(tmp_path / "out", base, "float32")


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_the_loss_goes_where_it_went(name: str, base: Path, rows: Path, tmp_path: Path) -> None:
    tune(recipe(name, rows, base, *SHORT, *FAST, "gradient_checkpointing=false"), tmp_path / "out")
    assert curve(tmp_path / "out") == pytest.approx(TRAJECTORIES[name], abs=TOLERANCE)
    from safetensors.numpy import load_file

    kept = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {str(one.dtype) for one in kept.values()} == {"float32"}  # the trainer would round small steps away


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_losses_that_they_have_alone(
    attention: str, base: Path, rows: Path, tmp_path: Path
) -> None:
    """All rows in one step: its loss is of the weights as they were, and its gradient's norm of them too."""
    one = ("max_steps=1", "held_out=0", "gradient_accumulation_steps=1", f"attn_implementation={attention}", *FAST)
    apart = tune(recipe("sft-lora", rows, base, *one, "per_device_train_batch_size=24"), tmp_path / "apart")
    together = tune(recipe("sft-lora", rows, base, *one, "packing=true", "max_length=2048"), tmp_path / "together")
    for name in ("loss", "grad_norm"):
        assert together.metrics[name] == pytest.approx(apart.metrics[name], rel=1e-4)
    assert together.metrics["tokens"] == apart.metrics["tokens"]


def test_scoring_the_answers_alone_changes_no_number(base: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from finetune.answer_positions import score_answers_only

    ids = torch.randint(5, 40_000, (2, 40), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(40) < torch.tensor([[28], [15]]), -100)
    found = []
    for answers_alone in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear"))
        add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        if answers_alone:
            score_answers_only(model)
        scored = model(input_ids=ids, labels=labels, fused_lm_head=True)
        scored.log_probs.sum().backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        found.append(
            ([scored[key] for key in ("log_probs", "entropy", "mean_logits", "is_top1", "label_mask")], gradients)
        )
    for whole, alone in zip(found[0][0] + found[0][1], found[1][0] + found[1][1], strict=True):
        torch.testing.assert_close(alone, whole)
    assert torch.isfinite(model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True).loss)


def test_training_stops_early_and_keeps_the_weights_that_were_best(base: Path, tmp_path: Path) -> None:
    rows, other = write_rows(tmp_path / "rows.jsonl", "sft"), write_other_rows(tmp_path / "held-out.jsonl")
    given = (f"eval_data={json.dumps(str(other))}", "learning_rate=3e-2", "max_steps=40", "eval_steps=2", "patience=2",
             "gradient_accumulation_steps=1", "per_device_train_batch_size=8", "lr_scheduler_type=constant")  # fmt: skip
    manifest = tune(recipe("sft-lora", rows, base, *given), tmp_path / "out")
    held_out = curve(tmp_path / "out", "eval_loss")
    best = min(range(len(held_out)), key=held_out.__getitem__)
    assert manifest.metrics["steps"] < 40
    assert len(held_out) == best + 1 + 2  # evaluations without a better one
    assert manifest.metrics["eval_loss"] == held_out[best] < held_out[-1]
    assert manifest.metrics["best_step"] == 2 * (best + 1)
    assert loss_of(load_tuned(tmp_path / "out", base, "float32"), base, other) == pytest.approx(
        held_out[best], abs=1e-3
    )


def loss_of(model: Any, base: Path, data: Path) -> float:
    """Over all answers' tokens."""
    import torch

    from finetune.chat import encode, read_chat
    from finetune.rows import read_rows

    chat, total, tokens = read_chat(base), 0.0, 0
    for row in read_rows(data, "sft").rows:
        assert isinstance(row, SftRow)
        one = encode(chat, row)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([one.ids]), labels=torch.tensor([one.labels()])).loss
        total, tokens = total + float(loss) * sum(one.learned), tokens + sum(one.learned)
    return total / tokens


def test_rows_that_are_too_long_are_left_out_and_counted(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "sft", 8)
    long = {"role": "assistant", "content": "on and on " * 40}
    with rows.open("a") as file:
        file.write(json.dumps({"messages": [question(99), long]}) + "\n")
    given = ("max_steps=1", "held_out=0", *FAST)
    manifest = tune(recipe("sft-lora", rows, base, *given, "max_length=64"), tmp_path / "out")
    assert (manifest.rows, manifest.metrics["rows_left_out"]) == (8, 1)
    with pytest.raises(InvalidError, match=r"max_length = 16 leaves no row: the shortest, .*rows\.jsonl:1, has"):
        tune(recipe("sft-lora", rows, base, *given, "max_length=16"), tmp_path / "none")


class Fails:
    """A callback that fails as torch does when memory is short."""

    def __new__(cls, error: Exception) -> Any:
        from transformers import TrainerCallback

        class Failing(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                raise error

        return Failing()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_out_of_memory_ends_with_what_helps(error: Exception, base: Path, rows: Path, tmp_path: Path) -> None:
    asked = recipe("sft-lora", rows, base, "max_steps=1", "per_device_train_batch_size=8", "max_length=512")
    with pytest.raises(SettingsError, match=r"(?s)out of memory.*batch.*gradient_checkpointing.*weights=qlora"):
        tune(asked, tmp_path / "out", Hooks(callbacks=(Fails(error),)))


def test_any_other_failure_is_not_taken_for_it(base: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="something else"):
        tune(
            recipe("sft-lora", rows, base), tmp_path / "out", Hooks(callbacks=(Fails(RuntimeError("something else")),))
        )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("learning_rate=1e38",), "the (eval_)?loss is (nan|inf) at step .*lower learning_rate"),
        (("learning_rate=fast",), "learning_rate = 'fast' does not fit"),
        (("seed=often",), "seed = 'often' does not fit: give a whole number"),
        (("optim=paged_adamw_8bit",), "needs a GPU"),
        (("dtype=float16",), "trains on a GPU only"),
        (("lr_scheduler_type=spiral",), "spiral is not a valid SchedulerType"),
        (("padding_free=true",), "does not fit: .*padding_free"),
    ],
)
def test_what_cannot_be_trained_is_said_and_how_to_mend_it(
    settings: tuple[str, ...], said: str, base: Path, rows: Path, tmp_path: Path
) -> None:
    asked = recipe("sft-lora", rows, base, "max_steps=6", "gradient_accumulation_steps=1", *settings)
    with pytest.raises(InvalidError, match=said):
        tune(asked, tmp_path / "out")


def test_a_run_tells_how_far_it_is_logs_it_and_calls_the_callers_callbacks(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    from transformers import TrainerCallback

    class Counts(TrainerCallback):  # type: ignore[misc]
        steps = 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.steps += 1

    told: list[TuneProgress] = []
    counts = Counts()
    asked = recipe("sft-lora", rows, base, "max_steps=4", "held_out=0.2", "gradient_accumulation_steps=1")
    manifest = tune(asked, tmp_path / "out", Hooks(told.append, callbacks=(counts,)))
    assert counts.steps == 4
    stages = [one.stage for one in told]
    assert stages[0] == "loading"
    assert stages[-1] == "saving"
    assert "evaluating" in stages
    training = [one for one in told if one.stage == "training" and one.loss is not None]
    assert [one.step for one in training][-1] == 4
    assert all(one.steps == 4 for one in training)
    assert training[-1].eval_loss is not None
    assert training[-1].tokens_per_second
    assert training[0].seconds_left is not None
    assert training[-1].seconds_left == 0
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [one["loss"] for one in log if "loss" in one] == curve(tmp_path / "out")
    assert manifest.metrics["tokens"] == log[-1]["num_input_tokens_seen"] > 0


def test_the_manifest_says_what_was_trained_on_and_who_may_see_it(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "sft", 6)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for at, groups in ((0, ["staff", "sales"]), (1, ["staff"]), (2, None)):
        lines[at]["source"] = {"documents": [f"d{at}.txt"], **({"acl": groups} if groups else {})}
    rows.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    manifest = tune(recipe("sft-ia3", rows, base, "max_steps=1", "held_out=0", *FAST), tmp_path / "out")
    assert manifest.documents == ("d0.txt", "d1.txt", "d2.txt")
    assert manifest.acl == ("staff",)
    assert (manifest.servable, "IA3" in str(manifest.why_not)) == (False, True)
    assert {"torch", "transformers", "trl", "peft"} <= set(manifest.versions)
    assert manifest.hardware["dtype"] == "float32"
    assert manifest.recipe["training"]["max_steps"] == 1
    assert str(tmp_path / "rows.jsonl") not in manifest.model_dump_json()
