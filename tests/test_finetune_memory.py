"""The memory that a run is estimated to take: what it follows, and that the advice against too much of it helps."""

import json
import re
from pathlib import Path

import pytest

from finetune.memory import Estimate, advice, check_fits, estimate, trained_parameters
from finetune.recipe import Recipe, read_recipe, recipe_of
from finetune.schemas import Message, Rows, SftRow
from finetune.shape import read_shape
from ingest.errors import InvalidError, UnavailableError

GB = 1e9
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return described(tmp_path / "llama", LLAMA_7B)


def described(folder: Path, config: dict[str, object]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def of(name: str, base: Path, *settings: str, tokens: int = 2048) -> Estimate:
    return estimate(read_recipe(name, settings), base, longest=tokens, gpu=True)


def test_seven_billion_parameters_in_four_bits_train_at_2048_tokens_in_ten_gigabytes(tmp_path: Path) -> None:
    for name, config, parameters in (("llama", LLAMA_7B, 6.74), ("qwen", QWEN_7B, 7.62)):
        base = described(tmp_path / name, config)
        assert read_shape(base).all / 1e9 == pytest.approx(parameters, abs=0.01)
        assert 5 * GB < of("sft-qlora", base).bytes < 10 * GB
        assert of("sft-lora", base).bytes > 14 * GB
        assert of("sft-full", base).bytes > 16 * parameters * GB


def test_each_part_follows_what_it_depends_on(base: Path) -> None:
    plain = of("sft-qlora", base)
    longer = of("sft-qlora", base, tokens=1024)
    assert longer.activations < plain.activations
    assert longer.weights == plain.weights
    assert of("sft-qlora", base, "per_device_train_batch_size=4").activations > 3 * plain.activations
    assert of("sft-qlora", base, "gradient_checkpointing=false").activations > 5 * plain.activations
    wider = of("sft-qlora", base, "r=64")
    assert (wider.gradients, wider.optimizer) == (4 * plain.gradients, 4 * plain.optimizer)
    assert of("sft-qlora", base, "optim=adamw_8bit").optimizer < plain.optimizer
    assert plain.weights < of("sft-qlora-8bit", base).weights < of("sft-lora", base).weights
    assert of("dpo-qlora", base).activations > 1.8 * plain.activations
    upper, all_layers = of("sft-layers", base), of("sft-full", base)
    assert upper.gradients < all_layers.gradients / 10
    assert upper.activations < all_layers.activations / 10


def test_preferences_over_whole_weights_hold_a_second_model(base: Path) -> None:
    def whole(method: str) -> Recipe:
        return recipe_of({"name": method, "method": method, "trained": {"weights": "full"}})

    one, two = (estimate(whole(method), base, longest=128, gpu=True) for method in ("sft", "dpo"))
    assert two.weights == 2 * one.weights


def test_rewarded_answers_are_counted_behind_their_prompts_and_what_scores_them_beside_the_model(base: Path) -> None:
    plain = of("grpo", base, "max_prompt_length=500", "max_completion_length=60")
    assert "4 x 560 tokens" in plain.assumptions
    scored = of("grpo", base, "max_prompt_length=500", "max_completion_length=60", "rewards={reward_model=1.0}",
                "reward_model=RM")  # fmt: skip
    assert scored.weights - plain.weights == pytest.approx(2 * 6.74e9, rel=0.01)
    many = of("grpo", base, "gradient_checkpointing=true", "generation_batch_size=512")
    assert many.activations > of("grpo", base, "gradient_checkpointing=true").activations  # their keys and values
    pairs, rows = of("reward", base, "per_device_train_batch_size=1"), of("sft-lora", base)
    assert pairs.activations > 1.7 * rows.activations
    assert pairs.weights == pytest.approx(rows.weights, rel=0.01)


def test_the_longest_row_counts_as_far_as_it_trains(models: Path) -> None:
    base = models / "smollm2-135m-instruct"
    recipe = read_recipe("sft-lora")

    def rows(*words: int) -> Rows:
        made = [
            SftRow(
                prompt=(Message(role="user", content="pump " * count),),
                completion=(Message(role="assistant", content="steel " * 20),),
            )
            for count in words
        ]
        return Rows(rows=tuple(made), digest="")

    short, long, longer = (estimate(recipe, base, rows(10, most)) for most in (100, 500, 5000))
    assert short.activations < long.activations < longer.activations
    assert longer == estimate(recipe, base, rows(10, 9000)), "longer ones are left out"
    assert "1 x 1024 tokens" in longer.assumptions
    assert long.bytes == pytest.approx(estimate(recipe, base, longest=540, answer=30).bytes, rel=0.05)


def test_all_that_is_advised_takes_less(base: Path) -> None:
    for name, given in (
        ("sft-lora", ["per_device_train_batch_size=4"]),
        ("sft-qlora-8bit", ["gradient_checkpointing=false"]),
        ("kto-lora", []),
        ("reward", []),
        ("grpo", []),
        ("ppo", []),
    ):
        before = of(name, base, *given)
        said = advice(read_recipe(name, given), before)
        ways = re.findall(r"\((--set [^)]*?)[:)]", said)
        assert len(ways) >= 3, said
        for way in ways:
            settings = [one.strip() for one in way.split("--set ") if one.strip()]
            assert of(name, base, *given, *settings).bytes < before.bytes, way


def test_nothing_is_advised_that_is_already_so(base: Path) -> None:
    said = advice(read_recipe("sft-qlora"))
    assert "gradient_checkpointing" not in said
    assert "batch" not in said
    assert "weights=qlora" not in said
    assert "bits=4" not in said
    assert "per_device_train_batch_size" not in advice(read_recipe("kto-lora", ["per_device_train_batch_size=2"]))
    assert "LoRA" in advice(read_recipe("sft-full"))


def test_a_run_that_does_not_fit_is_refused_with_numbers_and_advice(base: Path) -> None:
    recipe, needed = read_recipe("sft-qlora"), of("sft-qlora", base)
    check_fits(needed, int(8 * GB), 0.9, recipe)
    with pytest.raises(
        UnavailableError, match=r"6\.\d GiB, and of the 4\.7 GiB .* 90% \(FINETUNE_MEMORY_SHARE\): try "
    ):
        check_fits(needed, int(5 * GB), 0.9, recipe)


def test_it_says_what_it_is_made_of(base: Path) -> None:
    said = str(of("sft-qlora", base))
    assert re.match(
        r"memory: about \d\.\d GiB \(weights 3\.\d GiB, .*\); batches of 1 x 2048 tokens, 16-bit .* GPU", said
    )


def test_a_configuration_that_says_too_little_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match=r"lacking/config.json.*cannot be read"):
        read_shape(tmp_path / "lacking")
    with pytest.raises(InvalidError, match=r"has no hidden_size"):
        read_shape(described(tmp_path / "empty", {}))
    older = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "tie_word_embeddings": True}
    assert 100e6 < read_shape(described(tmp_path / "gpt2", older)).all < 180e6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft-full", "sft-layers", "sft-lora", "sft-dora", "sft-ia3", "sft-bottleneck"])
def test_as_many_parameters_train_as_are_counted(name: str, tmp_path: Path) -> None:
    from tiny_model import tiny_model

    from finetune import methods

    base = tiny_model(tmp_path / "tiny")
    trained = read_recipe(name).trained
    model = methods.apply(methods.load_base(base, trained, "float32"), trained)
    trains, _ = methods.counts(model)
    assert trained_parameters(trained, read_shape(base)) == trains
    whole = sum(weight.numel() for weight in methods.load_base(base, trained, "float32").parameters())
    assert read_shape(base).all == whole
