"""finetune.recipe and finetune.arguments: what a recipe may say, and how it is told what it may not."""

import subprocess
import sys
from pathlib import Path

import pytest

from finetune.arguments import refuse_unknown
from finetune.recipe import about, read_recipe, recipe_of, recipes, with_settings
from finetune.runs import as_parent, settled
from ingest.errors import InvalidError, NotFoundError
from ingest.settings import CHECKOUT


@pytest.mark.parametrize("name", recipes())
def test_each_recipe_reads_says_what_it_is_and_can_be_read_again_from_a_manifest(name: str) -> None:
    recipe = read_recipe(name)
    refuse_unknown(recipe)
    assert recipe.method == ("sft" if name.startswith("raft") else name.partition("-")[0])
    assert len(about(name)) > 20
    assert recipe_of(settled(recipe)) == recipe.model_copy(update={"trained": recipe_of(settled(recipe)).trained})
    assert settled(recipe_of(settled(recipe))) == settled(recipe)


def test_lora_recipes_train_all_linear_layers_at_ten_times_the_rate_of_full_fine_tuning() -> None:
    lora, full = read_recipe("sft-lora"), read_recipe("sft-full")
    assert lora.trained.target_modules == "all-linear"
    assert lora.training["learning_rate"] == pytest.approx(10 * full.training["learning_rate"])


def test_a_key_needs_no_section_and_a_value_is_as_toml_has_it() -> None:
    given = [
        "max_steps=4",
        "r=8",
        "base=some/folder",
        "held_out=0",
        "target_modules=['q_proj']",
        "training.packing=True",
    ]
    recipe = read_recipe("sft-lora", given)
    assert (recipe.training["max_steps"], recipe.trained.r, recipe.model.base) == (4, 8, "some/folder")
    assert (recipe.data.held_out, recipe.trained.target_modules, recipe.training["packing"]) == (0, ("q_proj",), True)
    again = with_settings(recipe, ["r=4"])
    assert (again.trained.r, again.training["max_steps"], again.model.base) == (4, 4, "some/folder")


def test_a_parent_brings_its_own_shape_unless_another_is_set() -> None:
    parent = f"parent={CHECKOUT / 'deploy' / 'adapters' / 'answers'}"
    recipe = as_parent(read_recipe("sft-lora", [parent]))
    assert (recipe.trained.r, recipe.trained.lora_alpha) == (8, 8)
    assert settled(recipe)["trained"]["lora_alpha"] == 8
    assert as_parent(with_settings(read_recipe("sft-lora"), [parent])) == recipe
    other = as_parent(read_recipe("sft-lora", [parent, "lora_alpha=16"])).trained  # which is refused where it is loaded
    assert (other.r, other.lora_alpha) == (8, 16)
    assert as_parent(read_recipe("sft-lora")) == read_recipe("sft-lora")
    nowhere = read_recipe("sft-lora", ["parent=nowhere"])
    assert as_parent(nowhere) == nowhere


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("max_steps", "KEY=VALUE"),
        ("nowhere.r=8", "sections model, trained, data, reward, training"),
        ("r=0", "greater than or equal to 1"),
        ("bits=4", "weights = 'lora' has no bits"),
        ("weights=ia3", "weights = 'ia3' has no lora_alpha, r"),
        ("trained.rank=8", "trained.rank"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(setting: str, said: str) -> None:
    with pytest.raises(InvalidError, match=said):
        read_recipe("sft-lora", [setting])


def test_layers_must_be_named() -> None:
    with pytest.raises(InvalidError, match="needs `layers`"):
        recipe_of({"name": "x", "method": "sft", "trained": {"weights": "layers"}})


def test_a_recipe_that_is_not_there_or_is_no_toml_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there are dpo-lora, dpo-qlora"):
        read_recipe("sft-lore")
    with pytest.raises(NotFoundError, match="cannot be read"):
        read_recipe(str(tmp_path / "none.toml"))
    (tmp_path / "broken.toml").write_text("method = sft")
    with pytest.raises(InvalidError, match="not valid TOML"):
        read_recipe(str(tmp_path / "broken.toml"))


@pytest.mark.parametrize(
    ("name", "recipe", "said"),
    [
        ("learning_rat", "sft-lora", "'learning_rat': did you mean learning_rate"),
        ("lora_rank", "sft-lora", "'lora_rank'"),
        ("training.lora_alpha", "sft-lora", r"it belongs to \[trained\]"),
        ("beta", "sft-lora", "'beta'"),
        ("packing", "dpo-lora", "'packing'"),
        ("bf16", "sft-lora", "cannot be set: set model.dtype"),
        ("assistant_only_loss", "sft-lora", "chat template"),
        ("zzz", "kto-lora", "TrainingArguments"),
    ],
)
def test_an_unknown_training_argument_is_refused_by_name_with_what_helps(name: str, recipe: str, said: str) -> None:
    with pytest.raises(InvalidError, match=said):
        refuse_unknown(read_recipe(recipe, [f"{name}=1"]))


def test_the_trainers_own_names_are_known() -> None:
    names = ["optim=adafactor", "max_grad_norm=0.5", "neftune_noise_alpha=5", "packing_strategy=wrapped"]
    refuse_unknown(read_recipe("sft-lora", names))
    refuse_unknown(read_recipe("dpo-lora", ["loss_type=['ipo']", "precompute_ref_log_probs=true"]))


def test_what_reads_recipes_and_rows_loads_no_training_stack() -> None:
    run = "import sys, finetune.train, finetune.cli_tune; print({'torch', 'transformers', 'trl'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "setting", ["max_length=long", "max_length=1.5", "seed=true", "per_device_train_batch_size=auto"]
)
def test_a_number_that_is_none_is_refused_by_name_before_anything_trains(setting: str) -> None:
    name = setting.partition("=")[0]
    with pytest.raises(InvalidError, match=f"{name} = .* give a whole number"):
        read_recipe("sft-lora", [setting]).whole(name, 8)


def test_no_code_of_a_hub_is_named_as_an_attention() -> None:
    with pytest.raises(InvalidError, match="attn_implementation"):
        read_recipe("sft-lora", ["attn_implementation=somebody/kernel"])


@pytest.mark.parametrize("name", ["embedder", "reranker", "query-adapter"])
def test_a_recipe_of_what_finds_passages_is_refused_with_its_command(name: str) -> None:
    with pytest.raises(InvalidError, match=f"`graft tune {name}`"):
        read_recipe(name)
