"""LLaMA-Factory's training YAML as a recipe."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.llamafactory import FromFactory, read_llamafactory
from finetune.recipe import Data, Model, Trained
from finetune.training_names import training_names
from ingest.errors import InvalidError, NotFoundError

SFT: dict[str, Any] = {
    "model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "dataset_dir": "data",
    "dataset": "identity",
}


def read(folder: Path, ignore_unknown: bool = False, **keys: Any) -> FromFactory:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({**SFT, **keys}))
    return read_llamafactory(file, ignore_unknown)


def refusal_of(folder: Path, **keys: Any) -> str:
    with pytest.raises(InvalidError) as error:
        read(folder, **keys)
    return str(error.value)


def test_the_common_keys(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        lora_rank=8,
        lora_target="all",
        cutoff_len=256,
        max_samples=16,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        max_steps=2,
        val_size=0.2,
        output_dir="saves/one",
    )
    recipe = found.recipe
    assert (recipe.name, recipe.method, found.out, found.notes) == ("run", "sft", Path("saves/one"), ())
    assert recipe.model == Model(base="HuggingFaceTB/SmolLM2-135M-Instruct")
    assert recipe.trained.model_dump(exclude_unset=True) == {
        "weights": "lora",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "use_dora": False,
        "use_rslora": False,
    }
    assert recipe.data == Data(data=Path("data/dataset_info.json#identity"), held_out=0.2, max_rows=16, patience=0)
    assert recipe.training == {
        "learning_rate": 1e-4,
        "max_length": 256,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
    }


def test_what_is_left_out_is_as_llamafactory_has_it(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert (found.recipe.trained.r, found.recipe.trained.lora_alpha, found.out) == (8, 16, None)
    assert found.recipe.training == {"learning_rate": 5e-5, "max_length": 2048}
    assert (found.recipe.data.held_out, found.recipe.data.patience) == (0.0, 0)
    assert read(tmp_path, lora_rank=64).recipe.trained.lora_alpha == 128


def test_a_reward_model_is_the_stage_rm(tmp_path: Path) -> None:
    recipe = read(tmp_path, stage="rm", learning_rate=1e-4).recipe
    assert (recipe.method, recipe.training) == ("reward", {"learning_rate": 1e-4, "max_length": 2048})


def test_weights_that_train(tmp_path: Path) -> None:
    def trained(**keys: Any) -> Trained:
        return read(tmp_path, **keys).recipe.trained

    assert trained(finetuning_type="full") == Trained(weights="full")
    assert trained(finetuning_type="freeze").layers == (-2, -1)
    assert trained(finetuning_type="freeze", freeze_trainable_layers=-3).layers == (0, 1, 2)
    assert trained(lora_target="q_proj, v_proj", use_dora=True).target_modules == ("q_proj", "v_proj")
    assert trained(lora_target=["q_proj"], lora_dropout=0.1).lora_dropout == 0.1
    quantised = trained(quantization_bit=8, quantization_method="bnb", double_quantization=False)
    assert (quantised.weights, quantised.bits, quantised.double_quant) == ("qlora", 8, False)
    assert trained(adapter_name_or_path="saves/sft", use_rslora=True).parent == Path("saves/sft")


def test_preferences_and_labels(tmp_path: Path) -> None:
    dpo = read(tmp_path, stage="dpo", dataset="pairs", pref_beta=0.3, pref_loss="ipo", pref_ftx=0.5).recipe
    assert dpo.method == "dpo"
    assert {key: dpo.training[key] for key in ("beta", "loss_type", "loss_weights")} == {
        "beta": 0.3,
        "loss_type": ["ipo", "sft"],
        "loss_weights": [1.0, 0.5],
    }
    assert read(tmp_path, stage="dpo").recipe.training["loss_type"] == ["sigmoid"]
    kto = read(tmp_path, stage="kto", kto_rejected_weight=0.5).recipe
    assert (kto.method, kto.training["beta"], kto.training["undesirable_weight"]) == ("kto", 0.1, 0.5)


def test_several_data_sets(tmp_path: Path) -> None:
    data = read(tmp_path, dataset="identity, alpaca", max_samples=10, eval_dataset="held").recipe.data
    assert data.data == Path("data/dataset_info.json#identity[:10],alpaca[:10]")  # of each the first ten
    assert data.eval_data == Path("data/dataset_info.json#held[:10]")
    assert data.max_rows is None


def test_arguments_of_the_trainer_by_their_names(tmp_path: Path) -> None:
    given = {"lr_scheduler_type": "cosine", "weight_decay": 0.1, "packing": True, "neftune_noise_alpha": 5}
    training = read(tmp_path, **given, warmup_ratio=0.1, learning_rate="1e-4").recipe.training
    assert {key: training[key] for key in given} == given
    assert training["warmup_steps"] == 0.1  # a share, by its new name
    assert "warmup_ratio" not in training
    assert training["learning_rate"] == 1e-4  # YAML takes it for a text
    assert read(tmp_path, warmup_ratio=0.1, warmup_steps=20).recipe.training["warmup_steps"] == 20


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    message = refusal_of(
        tmp_path,
        stage="ppo",
        frobnicate=1,
        lora_rang=4,
        use_galore=True,
        quantization_bit=3,
        val_size=100,
        cutoff_len="long",
        lora_target=7,
        do_train=False,
        dataset_dir="ONLINE",
        model_name_or_path=None,
        flash_attn="fast",
    )
    for wanted in (
        "stage: 'ppo' (PPO, which has a recipe of its own here: graft tune ppo) is not read; there are sft, dpo, kto, rm",
        "frobnicate is not known",
        "lora_rang is not known; is lora_rank meant?",
        "use_galore: True is not supported; only False is",
        "quantization_bit: 3 is not 4 or 8",
        "val_size: 100 is no share",
        "cutoff_len: 'long' is not a whole number",
        "lora_target: 7 is neither names",
        "do_train: false leaves nothing to do",
        "dataset_dir: 'ONLINE' is on a hub",
        "model_name_or_path is missing",
        "flash_attn: 'fast' is not one of auto",
        "--ignore-unknown",
    ):
        assert wanted in message


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"stage": "dpo", "pref_loss": "orpo"}, "pref_loss: 'orpo' is not one of sigmoid, hinge, ipo"),
        ({"stage": "kto", "pref_ftx": 0.1}, "pref_ftx: 0.1 goes with stage: dpo"),
        ({"finetuning_type": "oft"}, "finetuning_type: 'oft' is not one of lora, freeze, full"),
        ({"finetuning_type": "full", "quantization_bit": 4}, "goes with finetuning_type: lora"),
        ({"quantization_bit": 4, "quantization_method": "hqq"}, "quantization_method: 'hqq'"),
        ({"dataset": None}, "dataset is missing"),
        ({"adapter_name_or_path": "a,b"}, "2 adapters are named"),
        ({"mask_history": True}, "mask_history: True is not supported"),
    ],
)
def test_values_that_are_not_trained(tmp_path: Path, keys: dict[str, Any], wanted: str) -> None:
    assert wanted in refusal_of(tmp_path, **keys)


def test_unknown_keys_can_be_left_out(tmp_path: Path) -> None:
    found = read(tmp_path, ignore_unknown=True, frobnicate=1, use_galore=True)
    assert found.recipe == read(tmp_path).recipe
    assert found.notes[0].startswith("ignored: frobnicate is not known")
    assert "use_galore" in found.notes[1]
    with pytest.raises(InvalidError, match="stage"):  # what cannot be trained is not unknown
        read(tmp_path, ignore_unknown=True, frobnicate=1, stage="pt")


def test_what_has_no_effect_is_said(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        template="llama3",
        trust_remote_code=True,
        overwrite_cache=True,
        use_unsloth=False,
        bf16=True,
        report_to="none",
        finetuning_type="full",
        lora_rank=4,
    )
    said = "\n".join(found.notes)
    assert "template: 'llama3' is not used: the base's own chat template is" in said
    assert "without effect here: overwrite_cache, trust_remote_code" in said
    assert "bf16: True is not taken over; set model.dtype" in said
    assert "without effect with finetuning_type: full: lora_rank" in said
    assert "report_to" not in said
    assert not {"trust_remote_code", "bf16", "report_to"} & found.recipe.training.keys()


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"missing\.yaml"):
        read_llamafactory(tmp_path / "missing.yaml")
    for text, wanted in (("a: [", "is not valid YAML"), ("- a", "is no LLaMA-Factory recipe"), ("", "is no LLaMA-")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InvalidError, match=wanted):
            read_llamafactory(tmp_path / "bad.yaml")


@pytest.mark.slow
def test_names_are_those_of_the_installed_trainers() -> None:
    import dataclasses

    from trl import DPOConfig, KTOConfig, SFTConfig

    assert training_names("sft") == {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    assert training_names("dpo") == {field.name for field in dataclasses.fields(DPOConfig) if field.init}
    assert training_names("kto") == {field.name for field in dataclasses.fields(KTOConfig) if field.init}
