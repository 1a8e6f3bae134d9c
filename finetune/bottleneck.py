"""Bottleneck adapters: two small matrices with a nonlinearity between them, behind attention and MLP of each layer.

Houlsby et al., 2019, "Parameter-Efficient Transfer Learning for NLP" (arXiv 1902.00751), without its trained layer norms:
the base stays as it is. They are modules of the layer's own `self_attn` and `mlp`, so that a model's names stay the same, and
a hook adds what they say to the output, which a checkpointed layer computes again like everything else in it.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ingest.errors import InvalidError
from ingest.schemas import Frozen

CONFIG, WEIGHTS = "bottleneck_config.json", "bottleneck_model.safetensors"
NAME = "bottleneck"  # of the module below `self_attn` and `mlp`
PLACES = ("self_attn", "mlp")
DEVIATION = 0.01  # of the first weights, as in the paper


class Config(Frozen):
    """`bottleneck_config.json`. `base`: the hub name or the folder of the model that they were trained in."""

    kind: Literal["bottleneck"] = "bottleneck"
    width: int = Field(ge=1)
    hidden: int = Field(ge=1)
    layers: int = Field(ge=1)
    base: str


class Bottleneck(nn.Module):  # type: ignore[misc]  # torch is not read by mypy
    """(..., hidden) -> (..., hidden). The last matrix starts at zero, so that the model is at first exactly the base."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, width)
        self.up = nn.Linear(width, hidden)
        nn.init.normal_(self.down.weight, std=DEVIATION)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        added = self.up(nn.functional.gelu(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + added.to(hidden.dtype)


def insert(model: Any, width: int) -> Any:
    """-> the model with adapters in float32, and everything else frozen. Raises InvalidError for another kind of model."""
    hidden = model.config.get_text_config().hidden_size
    model.requires_grad_(False)
    for layer in decoder_layers(model):
        for place in PLACES:
            module = getattr(layer, place, None)
            if module is None:
                raise InvalidError(
                    f"bottleneck adapters stand behind `self_attn` and `mlp`, and a layer of {model.config.model_type!r} "
                    f"has no {place!r}; train it with weights = 'lora'"
                )
            adapter = Bottleneck(hidden, width).to(next(module.parameters()).device)
            module.add_module(NAME, adapter)
            module.register_forward_hook(_adapted)
    return model


def save(model: Any, out: Path, base: str) -> None:
    """Writes weights and configuration into `out`, which is there."""
    weights = {name: weight.detach().cpu().contiguous() for name, weight in model.state_dict().items() if _own(name)}
    layers = decoder_layers(model)
    first = getattr(layers[0].self_attn, NAME)
    config = Config(width=first.down.out_features, hidden=first.down.in_features, layers=len(layers), base=base)
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    (out / CONFIG).write_text(config.model_dump_json(indent=2) + "\n")


def load(model: Any, folder: Path) -> Any:
    """-> `model`, a plain base, with the adapters that `save` wrote. Raises InvalidError."""
    try:
        config = Config.model_validate(json.loads((folder / CONFIG).read_text()))
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, ValidationError, SafetensorError) as error:
        raise InvalidError(f"bottleneck adapters in {str(folder)!r} cannot be read: {error}") from error
    held = (config.hidden, config.layers)
    wanted = (model.config.get_text_config().hidden_size, len(decoder_layers(model)))
    if held != wanted:
        raise InvalidError(
            f"bottleneck adapters in {str(folder)!r} are for {held[1]} layers {held[0]} wide, the base has {wanted[1]} of "
            f"{wanted[0]}; name the base that they were trained in, {config.base!r}"
        )
    insert(model, config.width)
    expected = {name: weight.shape for name, weight in model.state_dict().items() if _own(name)}
    if {name: weight.shape for name, weight in weights.items()} != expected:
        raise InvalidError(
            f"{str(folder / WEIGHTS)!r} does not hold what its configuration says; train the adapters anew"
        )
    model.load_state_dict(weights, strict=False)
    return model


def decoder_layers(model: Any) -> Any:
    """-> the layers of a decoder, from the bottom. Raises InvalidError for a model without `model.layers`."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None or not len(layers):
        raise InvalidError(
            f"a model of type {model.config.model_type!r} has no `model.layers`; train it with weights = 'lora' or 'full'"
        )
    return layers


def _adapted(module: Any, _: Any, output: Any) -> Any:
    """Attention gives its weights besides the states, an MLP the states alone."""
    adapter = getattr(module, NAME)
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)


def _own(name: str) -> bool:
    return f".{NAME}." in name
