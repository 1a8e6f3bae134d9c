"""finetune.grpo on a tiny model that knows two answers: the one that is rewarded becomes the likelier."""

import json
import shutil
from pathlib import Path
from statistics import mean

import pytest
from tiny_model import tiny_model
from tuning import curve, question, recipe, tune, write_rows

from finetune.hooks import Hooks, StoppedError
from finetune.schemas import Manifest
from ingest.errors import InvalidError

pytestmark = pytest.mark.slow
QUICK = ("gradient_accumulation_steps=1", "held_out=0", "warmup_steps=0")
RUN = ("rewards={exact_match=1.0}", "max_steps=16", "per_device_train_batch_size=16", "num_generations=8",
       "max_completion_length=6", "learning_rate=5e-3", "save_steps=4", *QUICK)  # fmt: skip


def lines_of(*answers: str) -> str:
    """To every question each of them."""
    rows = [
        {"prompt": [question(at)], "completion": [{"role": "assistant", "content": said}]}
        for at in range(12)
        for said in answers
    ]
    return "".join(f"{json.dumps(row)}\n" for row in rows)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says "Steel." and "Wood.", one as often as the other. All of its weights learned it: an adapter alone does not
    make a model with random embeddings sure of anything.
    """
    folder = tmp_path_factory.mktemp("base")
    (folder / "rows.jsonl").write_text(lines_of("Steel.", "Wood."))
    asked = recipe("sft-full", folder / "rows.jsonl", tiny_model(folder / "tiny"), "max_steps=60",
                   "per_device_train_batch_size=8", "learning_rate=1e-2", "save_strategy=no", *QUICK)  # fmt: skip
    tune(asked, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def parent(base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter that changes a little."""
    folder = tmp_path_factory.mktemp("parent")
    (folder / "rows.jsonl").write_text(lines_of("Steel.", "Wood."))
    tune(recipe("sft-lora", folder / "rows.jsonl", base, "max_steps=2", "save_strategy=no", *QUICK), folder / "out")
    return f"parent={json.dumps(str(folder / 'out'))}"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last of them is longer than the model's window."""
    lines = [{"prompt": [question(at)], "known": {"answers": ["steel"]}} for at in range(8)]
    lines.append({"prompt": "pump " * 2100, "known": {"answers": ["steel"]}})
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def unbroken(base: Path, parent: str, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("runs") / "grpo"
    return out, tune(recipe("grpo", prompts, base, *RUN, parent), out)


def test_the_rewarded_answer_becomes_the_likelier(unbroken: tuple[Path, Manifest]) -> None:
    out, manifest = unbroken
    rewards, kl = curve(out, "reward"), curve(out, "kl")
    assert 0.2 < mean(rewards[:2]) < 0.75
    assert mean(rewards[-4:]) > mean(rewards[:2]) + 0.15
    assert curve(out, "rewards/exact_match/mean") == pytest.approx(rewards)
    assert kl[0] == pytest.approx(
        0, abs=1e-4
    )  # measured against the adapter that it goes on from, not against the bare base
    assert kl[-1] > 0
    assert len(curve(out, "completions/mean_length")) == 16
    assert (manifest.method, manifest.servable) == ("grpo", True)
    assert str(manifest.parent).startswith("out@")
    assert manifest.metrics["tokens"] > 0
    assert {"adapter_model.safetensors", "curve.png"} <= {one.name for one in out.iterdir()}
    assert not (out / "ref").exists()


def test_a_prompt_longer_than_the_window_is_left_out_by_its_place(
    unbroken: tuple[Path, Manifest], base: Path, prompts: Path, tmp_path: Path
) -> None:
    manifest = unbroken[1]
    assert (manifest.rows, manifest.metrics["rows_left_out"]) == (8, 1)
    assert "left out: prompts.jsonl:9" in manifest.notes[0]
    (tmp_path / "long.jsonl").write_text(prompts.read_text().splitlines()[-1] + "\n")
    with pytest.raises(InvalidError, match=r"no prompt fits: the shortest, long\.jsonl:1, has 2\d\d\d tokens"):
        tune(recipe("grpo", tmp_path / "long.jsonl", base, *RUN), tmp_path / "out")


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    unbroken: tuple[Path, Manifest], base: Path, parent: str, prompts: Path, tmp_path: Path
) -> None:
    asked, steps = recipe("grpo", prompts, base, *RUN, parent), list[int]()

    def after_five() -> bool:
        steps.append(1)
        return len(steps) >= 5

    with pytest.raises(StoppedError):
        tune(asked, tmp_path / "out", Hooks(cancelled=after_five))
    tune(asked, tmp_path / "out")
    for name in ("reward", "loss", "kl"):
        assert curve(tmp_path / "out", name) == pytest.approx(curve(unbroken[0], name), rel=1e-3, abs=1e-5)


def test_an_empty_answer_has_a_score_and_a_reward_that_is_no_number_ends_the_run(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    pairs = write_rows(tmp_path / "pairs.jsonl", "dpo", 8)
    rm = tmp_path / "rm"
    tune(recipe("reward", pairs, base, "max_steps=1", "per_device_train_batch_size=2", *QUICK), rm)
    rewards = "rewards={reward_model=1.0, short=1.0, refusal_right=1.0, token_f1=1.0}"
    ends = "generation_kwargs={forced_eos_token_id=2}"
    asked = (rewards, "max_steps=1", "per_device_train_batch_size=4", "max_completion_length=1", ends, *QUICK)
    tune(recipe("grpo", pairs, base, *asked, f"reward_model={json.dumps(str(rm))}"), tmp_path / "empty")
    assert curve(tmp_path / "empty", "completions/mean_length") == [1]  # its end alone
    for name in ("short", "refusal_right", "token_f1"):
        assert curve(tmp_path / "empty", f"rewards/{name}/mean") == [0]
    assert curve(tmp_path / "empty", "rewards/reward_model/mean") != [0]

    broken = shutil.copytree(rm, tmp_path / "broken")
    held = load_file(broken / "adapter_model.safetensors")
    head = next(name for name in held if ".score." in name)
    save_file(held | {head: held[head] * float("nan")}, broken / "adapter_model.safetensors")
    with pytest.raises(
        InvalidError, match=r"reward 'reward_model' is nan for the answer '' to 'What is the code of part"
    ):
        tune(recipe("grpo", pairs, base, *asked, f"reward_model={json.dumps(str(broken))}"), tmp_path / "nan")


def test_whole_weights_are_compared_with_a_copy_and_held_out_prompts_choose_the_best(
    base: Path, prompts: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "grpo-full.toml"
    mine.write_text('method = "grpo"\n[trained]\nweights = "full"\n[reward]\nrewards = { short = 1.0 }\n')
    asked = ("max_steps=2", "eval_steps=1", "per_device_train_batch_size=4", "num_generations=2", "beta=0.1",
             "max_completion_length=4", "gradient_accumulation_steps=1", "held_out=0.25")  # fmt: skip
    manifest = tune(recipe(str(mine), prompts, base, *asked), tmp_path / "out")
    held_out = curve(tmp_path / "out", "eval_reward")
    assert len(held_out) >= 2
    assert manifest.metrics["eval_reward"] == max(held_out)
    assert curve(tmp_path / "out", "kl")[0] == pytest.approx(0, abs=1e-4)
    with pytest.raises(InvalidError, match="a step takes 32 prompts"):
        tune(recipe(str(mine), prompts, base, *asked[1:], "gradient_accumulation_steps=16"), tmp_path / "few")
