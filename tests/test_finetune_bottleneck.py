"""Bottleneck adapters: exactly the base at first, in each place, and their own files."""

import json
from pathlib import Path
from typing import Any

import pytest

from ingest.errors import InvalidError

pytestmark = pytest.mark.slow
WIDTH = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_model import tiny_model

    return tiny_model(tmp_path_factory.mktemp("base") / "tiny")


def loaded(base: Path) -> Any:
    from finetune.methods import load_plain

    return load_plain(base, "float32")


def inserted(base: Path, spread: float = 0.0) -> Any:
    """`spread`: of random weights in the last matrices, which are zero in a new adapter."""
    import torch

    from finetune import bottleneck

    torch.manual_seed(5)
    model = bottleneck.insert(loaded(base), WIDTH)
    for name, weight in model.named_parameters():
        if spread and name.endswith("bottleneck.up.weight"):
            torch.nn.init.normal_(weight, std=spread)
    return model


def logits(model: Any) -> Any:
    import torch

    ids = torch.randint(5, 40_000, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_new_adapters_are_exactly_the_base(base: Path) -> None:
    assert (logits(inserted(base)) == logits(loaded(base))).all()


@pytest.mark.parametrize("place", ["self_attn", "mlp"])
@pytest.mark.parametrize("layer", [0, 1])
def test_each_place_counts(base: Path, layer: int, place: str) -> None:
    model = inserted(base, 1.0)
    before = logits(model)
    adapter = getattr(model.model.layers[layer], place).bottleneck
    adapter.up.weight.data.zero_()
    assert (logits(model) - before).abs().max() > 1e-4


def test_output_is_what_the_paper_says(base: Path) -> None:
    """h + up(gelu(down(h))), with h the output of attention or MLP."""
    import torch

    model, plain, seen = inserted(base, 1.0), loaded(base), []
    for one in (plain, model):
        one.model.layers[0].mlp.register_forward_hook(lambda *given: seen.append(given[2]))
        logits(one)
    model.model.layers[0].self_attn.bottleneck.up.weight.data.zero_()
    logits(model)
    h, adapter = seen[0], model.model.layers[0].mlp.bottleneck
    with torch.no_grad():
        hidden = torch.nn.functional.gelu(h @ adapter.down.weight.T + adapter.down.bias)
        assert torch.allclose(seen[2], h + hidden @ adapter.up.weight.T + adapter.up.bias, atol=1e-6)
    assert not torch.allclose(seen[1], seen[2])


def test_answers_token_by_token_as_at_once(base: Path) -> None:
    """With a cache of keys and values, attention's output is a tuple of another length in some models."""
    import torch

    model = inserted(base, 1.0)
    ids = torch.arange(100, 112)[None]
    made = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0)
    assert (made == plain).all()


def test_own_files_and_their_faults(base: Path, tmp_path: Path) -> None:
    from finetune import bottleneck

    model = inserted(base, 1.0)
    bottleneck.save(model, tmp_path, "somebody/tiny")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "bottleneck_config.json",
        "bottleneck_model.safetensors",
    ]
    assert (tmp_path / "bottleneck_model.safetensors").stat().st_size < 4 * 2 * 2 * (2 * 64 * WIDTH + 64 + WIDTH) + 4096
    assert (logits(bottleneck.load(loaded(base), tmp_path)) == logits(model)).all()
    good = json.loads((tmp_path / "bottleneck_config.json").read_text())
    for change, said in (
        ({"width": 4}, "does not hold"),
        ({"layers": 3}, "for 3 layers 64 wide.*somebody/tiny"),
        ({"kind": "other"}, "cannot be read"),
    ):
        (tmp_path / "bottleneck_config.json").write_text(json.dumps(good | change))
        with pytest.raises(InvalidError, match=said):
            bottleneck.load(loaded(base), tmp_path)
    (tmp_path / "bottleneck_config.json").write_text(json.dumps(good))
    (tmp_path / "bottleneck_model.safetensors").write_bytes(b"cut")
    with pytest.raises(InvalidError, match="cannot be read"):
        bottleneck.load(loaded(base), tmp_path)


def test_models_of_another_build_are_refused() -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from finetune import bottleneck

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
    with pytest.raises(InvalidError, match=r"'gpt2' has no `model.layers`"):
        bottleneck.insert(model, WIDTH)
