"""Each way of training: what requires gradients, what a step changes, and what comes back from the folder that it leaves."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from finetune.recipe import Trained
from ingest.errors import InvalidError, NotFoundError

pytestmark = pytest.mark.slow

WAYS = {
    "full": Trained(weights="full"),
    "layers": Trained(weights="layers", layers=(-1,)),
    "lora": Trained(weights="lora", r=4, lora_alpha=8),
    "dora": Trained(weights="lora", r=4, lora_alpha=8, use_dora=True),
    "rslora": Trained(weights="lora", r=4, lora_alpha=8, use_rslora=True, target_modules=("q_proj", "v_proj")),
    "qlora": Trained(weights="qlora", r=4, lora_alpha=8),
    "qlora-8": Trained(weights="qlora", r=4, lora_alpha=8, bits=8),
    "ia3": Trained(weights="ia3"),
    "bottleneck": Trained(weights="bottleneck", bottleneck=8),
}
# What requires gradients, by the last parts of the names; `...` stands for the layer.
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
HIDDEN, WIDTHS, INNER = 64, {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 64}, 128


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_model import tiny_model

    return tiny_model(tmp_path_factory.mktemp("base") / "tiny")


def made(base: Path, way: str, dtype: str = "float32") -> Any:
    import torch

    from finetune.methods import apply, load_base

    torch.manual_seed(3)
    return apply(load_base(base, WAYS[way], dtype), WAYS[way])


def tokens() -> Any:
    import torch

    return torch.randint(5, 40_000, (2, 24), generator=torch.Generator().manual_seed(1))


def step(model: Any, steps: int = 3, rate: float = 1e-2) -> list[float]:
    """Some steps on the same tokens. -> the losses."""
    import torch

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0), []
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits.float()


def trained_names(model: Any) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def expected(way: str) -> int:
    """Of how many parameters the way is made, by hand."""
    low_rank = 2 * 4 * (4 * HIDDEN + sum(WIDTHS.values()) + 3 * (HIDDEN + INNER))
    matrices = sum(HIDDEN * width for width in WIDTHS.values()) + 3 * HIDDEN * INNER
    return {
        "full": 49152 * HIDDEN + 2 * (matrices + 2 * HIDDEN) + HIDDEN,
        "layers": matrices + 2 * HIDDEN,
        "lora": low_rank,
        "dora": low_rank + 2 * (sum(WIDTHS.values()) + 2 * INNER + HIDDEN),
        "rslora": 2 * 4 * (HIDDEN + 64 + HIDDEN + 32),
        "qlora": low_rank,
        "qlora-8": low_rank,
        "ia3": 2 * (32 + 32 + INNER),
        "bottleneck": 2 * 2 * (2 * HIDDEN * 8 + HIDDEN + 8),
    }[way]


@pytest.mark.parametrize("way", WAYS)
def test_what_trains_is_what_the_recipe_says(base: Path, way: str) -> None:
    from finetune.methods import counts

    model = made(base, way)
    assert counts(model)[0] == expected(way)
    names = trained_names(model)
    match way:
        case "layers":
            assert all(name.startswith("model.layers.1.") for name in names)
        case "lora" | "dora" | "qlora" | "qlora-8":
            assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == LINEAR
            assert any("magnitude" in name for name in names) == (way == "dora")
        case "rslora":
            assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {"q_proj", "v_proj"}
        case "ia3":
            assert {name.split(".ia3_")[0].rpartition(".")[2] for name in names} == {"k_proj", "v_proj", "down_proj"}
        case "bottleneck":
            assert all(".bottleneck." in name for name in names)


@pytest.mark.parametrize("way", WAYS)
def test_steps_lower_the_loss_and_change_nothing_else(base: Path, way: str) -> None:
    model = made(base, way).train()
    names, before = trained_names(model), {n: w.detach().clone() for n, w in model.named_parameters()}
    losses = step(model)
    changed = {n for n, w in model.named_parameters() if not (w == before[n]).all()}
    assert losses[-1] < losses[0]
    assert changed == names
    for name, weight in model.named_parameters():
        assert name in names or weight.grad is None, name


@pytest.mark.parametrize("way", WAYS)
def test_what_was_saved_comes_back(base: Path, tmp_path: Path, way: str) -> None:
    """On the plain base; where the training's base was quantised, that is another one, and the adapter alone is the same."""
    from peft import get_peft_model_state_dict

    from finetune.methods import load_tuned, save

    digest = digest_of(base)
    model = made(base, way)
    step(model)
    save(model, WAYS[way], tmp_path / "out", base)
    again = load_tuned(tmp_path / "out", base, "float32")
    if way.startswith("qlora"):
        given, held = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
        assert given.keys() == held.keys()
        assert all((given[name] == held[name]).all() for name in given)
        assert (logits(model) - logits(again)).abs().max() < 0.5
    else:
        assert (logits(model) == logits(again)).all()
    assert digest_of(base) == digest
    assert not list(tmp_path.glob("out/*.bin"))
    assert not (tmp_path / "out/README.md").exists()


def digest_of(folder: Path) -> str:
    held = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        held.update(file.name.encode() + file.read_bytes())
    return held.hexdigest()


def test_all_parameters_are_counted_alike(base: Path) -> None:
    """A 4-bit matrix holds two parameters in a byte."""
    from finetune.methods import counts

    plain = counts(made(base, "full"))[1]
    for way in ("qlora", "qlora-8", "lora"):
        assert counts(made(base, way)) == (expected(way), plain + expected(way))


def test_whole_model_is_a_model_folder(base: Path, tmp_path: Path) -> None:
    """In a base of bfloat16 the weights that trained keep their small changes, and the rest is as it was."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune.methods import apply, load_base, save

    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (half / name).write_bytes((base / name).read_bytes())
    (half / "graft-model.json").write_text('{"hub_name": "somebody/half"}')
    model = apply(load_base(half, WAYS["layers"], "bfloat16"), WAYS["layers"])
    model.config.use_cache = False  # as a trainer does
    step(model, 1, 1e-6)
    save(model, WAYS["layers"], tmp_path / "out", half)
    held, before = load_file(tmp_path / "out/model.safetensors"), load_file(half / "model.safetensors")
    assert held.keys() == before.keys()
    for name, weight in held.items():
        trained = name.startswith("model.layers.1.")
        assert weight.dtype == (torch.float32 if trained else torch.bfloat16)
        assert (weight.float() == before[name].float()).all() != trained, name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((half / "config.json").read_text())
    asked = [{"role": "user", "content": "Which oil?"}]
    given, own = (AutoTokenizer.from_pretrained(one).apply_chat_template(asked) for one in (tmp_path / "out", half))
    assert given == own
    assert not (tmp_path / "out/graft-model.json").exists()  # or adapters of the base would be taken for it


def test_bfloat16_base_has_float32_adapters(base: Path) -> None:
    import torch

    for way in ("lora", "ia3", "bottleneck", "qlora"):
        model = made(base, way, "bfloat16")
        kinds = {weight.requires_grad: set() for weight in model.parameters()}
        for weight in model.parameters():
            kinds[weight.requires_grad].add(weight.dtype)
        assert kinds[True] == {torch.float32}
        assert kinds[False] <= {torch.bfloat16, torch.uint8}
        assert step(model)[0] > 0
    assert {weight.dtype for weight in made(base, "full", "bfloat16").parameters()} == {torch.float32}


@pytest.mark.parametrize("way", ["lora", "qlora", "bottleneck", "layers"])
def test_checkpointed_layers_give_the_same_gradients(base: Path, way: str) -> None:
    model = made(base, way).train()
    step(model, 1)  # so that nothing is zero
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        found.append({n: w.grad.clone() for n, w in model.named_parameters() if w.requires_grad})
        model.zero_grad()
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).abs().max() < 1e-6, name
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("way", ["qlora", "qlora-8"])
def test_evaluation_leaves_the_gradients_right(base: Path, way: str) -> None:
    """Of a quantised base: some processors have other products for inference, which have none."""
    model = made(base, way)
    step(model, 1)
    found = []
    for _ in range(2):
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        found.append({n: w.grad.clone() for n, w in model.named_parameters() if w.requires_grad})
        model.zero_grad()
        logits(model)
    assert all((found[1][name] == gradient).all() for name, gradient in found[0].items())


def test_parent_goes_on(base: Path, tmp_path: Path) -> None:
    from finetune.methods import apply, load_base, save

    first = made(base, "lora")
    step(first)
    save(first, WAYS["lora"], tmp_path / "first", base)
    on = Trained(weights="lora", r=4, parent=tmp_path / "first", lora_dropout=0.5)
    again = apply(load_base(base, on, "float32"), on)
    assert (logits(first) == logits(again)).all()
    assert trained_names(again) == trained_names(first)
    assert again.peft_config["default"].lora_dropout == 0.5
    before = logits(again)
    step(again.train())
    assert (logits(again) != before).any()
    for wrong, said in (
        ({"r": 8}, "r = 8"),
        ({"lora_alpha": 16}, "lora_alpha = 16, but the parent .* has 8: set that"),
        ({"use_dora": True}, "use_dora"),
        ({"target_modules": ("q_proj",)}, "q_proj"),
    ):
        asked = Trained(weights="lora", parent=tmp_path / "first", **wrong)
        with pytest.raises(InvalidError, match=said):
            apply(load_base(base, asked, "float32"), asked)


def test_what_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    from finetune.methods import apply, load_base, load_tuned

    for trained, said in (
        (Trained(weights="layers", layers=(2,)), "from 0 to 1"),
        (Trained(weights="lora", target_modules=("nothing",)), "nothing"),
        (Trained(weights="ia3", target_modules=("nothing",)), "nothing"),
        (Trained(weights="lora", parent=tmp_path), "adapter_config"),
    ):
        with pytest.raises(InvalidError, match=said):
            apply(load_base(base, trained, "float32"), trained)
    with pytest.raises(NotFoundError, match="no model"):
        load_base(tmp_path / "none", Trained(), "float32")
    with pytest.raises(InvalidError, match="nothing that graft trained"):
        load_tuned(tmp_path, base, "float32")


def test_model_that_lacks_weights_is_refused(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from finetune.methods import load_base

    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    for way in ("lora", "qlora"):
        with pytest.raises(InvalidError, match=r"lacks 1 of its weights, as 'model\.layers\.1\.mlp\.up_proj\.weight'"):
            load_base(tmp_path, WAYS[way], "float32")


def test_foreign_and_cut_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    from finetune.methods import load_base, load_tuned, save

    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(load_base(base, Trained(), "float32"), prompt).save_pretrained(tmp_path / "prompt")
    with pytest.raises(InvalidError, match="PROMPT_TUNING"):
        load_tuned(tmp_path / "prompt", base, "float32")
    save(made(base, "lora"), WAYS["lora"], tmp_path / "cut", base)
    weights = load_file(tmp_path / "cut/adapter_model.safetensors")
    lost = min(weights)
    save_file(
        {name: weight for name, weight in weights.items() if name != lost}, tmp_path / "cut/adapter_model.safetensors"
    )
    with pytest.raises(InvalidError, match=r"does not fit the base.*lora_A"):
        load_tuned(tmp_path / "cut", base, "float32")
    (tmp_path / "cut/adapter_model.safetensors").unlink()
    with pytest.raises(InvalidError, match="pickled"):
        load_tuned(tmp_path / "cut", base, "float32")


def test_names_the_hub_where_the_base_has_a_name(base: Path, tmp_path: Path) -> None:
    from finetune.methods import save

    model = made(base, "lora")
    save(model, WAYS["lora"], tmp_path / "out", base)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)


def test_what_the_engine_loads() -> None:
    from finetune.methods import why_not_servable

    assert {way for way, trained in WAYS.items() if why_not_servable(trained)} == {"dora", "ia3", "bottleneck"}
