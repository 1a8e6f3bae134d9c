"""Runs with the engine's Python: vLLM's CPU wrapper for adapters against a plain loop over rows; prints JSON.

One argument: `mended` (with the plugin), `installed` (without) or `changed` (the plugin meets code that it does not know).
"""

import json
import logging
import sys
from types import SimpleNamespace

import graft_vllm_lora
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

WIDTH, WIDTHS, RANK, SLOTS = 24, (10, 6, 6), 16, 4
IDS = [11, 12, 13, 14]  # of the adapters in the slots; 0 in a mapping is the base
USED = ((4, 4, 4), (16, 8, 16), (0, 0, 0), (8, 0, 8))  # ranks by slot and output slice
BATCHES = {
    "together": [11] * 5 + [12] * 3 + [0] * 2 + [14] * 2,
    "interleaved": [0, 11, 12, 11, 0, 14, 12, 11, 13, 0],
    "one": [12] * 7,
    "base": [0] * 6,
}


def weights() -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """-> A [slots, 1, rank, width] and B [slots, 1, width of the slice, rank] by slice, padded as vLLM does."""
    a = tuple(torch.zeros(SLOTS, 1, RANK, WIDTH) for _ in WIDTHS)
    b = tuple(torch.zeros(SLOTS, 1, width, RANK) for width in WIDTHS)
    for slot, ranks in enumerate(USED):
        for n, rank in enumerate(ranks):
            a[n][slot, 0, :rank] = torch.randn(rank, WIDTH)
            b[n][slot, 0, :, :rank] = torch.randn(WIDTHS[n], rank)
    return a, b


def expected(y, x, batch, a, b, scale=1.0):
    """Row by row; rows beyond the batch are padding."""
    y = y.clone()
    for row, adapter in enumerate(batch[: len(x)]):
        offset = 0
        for n in range(len(b)):
            width = b[n].shape[2]
            if adapter:
                slot = IDS.index(adapter)
                inner = x[row] if a is None else a[n][slot, 0] @ x[row]
                y[row, offset : offset + width] += b[n][slot, 0] @ inner * scale
            offset += width
    return y


def difference(batch: list[int], extra: int = 0) -> dict[str, float]:
    """-> by method, the largest difference to the loop, for a batch with `extra` rows more or fewer than its mapping."""
    wrapper = PunicaWrapperCPU(64, 16, "cpu")
    wrapper.update_metadata(LoRAMapping(tuple(batch), tuple(batch), is_prefill=True), IDS, SLOTS + 1, 100)
    rows = len(batch) + extra
    a, b = weights()
    x, y = torch.randn(rows, WIDTH), torch.randn(rows, sum(WIDTHS))
    found = {}
    linear = y.clone()
    wrapper.add_lora_linear(linear, x, a, b, 0.5, WIDTHS)
    found["linear"] = (linear, expected(y, x, batch, a, b, 0.5))
    logits = torch.randn(rows, WIDTHS[0] - 1)  # the adapter's side is padded more
    short = (b[0][:, :, :-1],)
    want = expected(logits, x, batch, a[:1], short)
    wrapper.add_lora_logits(logits, x, a[0], b[0], 1.0)
    found["logits"] = (logits, want)
    looked_up, embedded = torch.randn(rows, RANK), torch.randn(rows, WIDTHS[0])
    want = expected(embedded, looked_up, batch, None, b[:1])
    wrapper.add_lora_embedding(embedded, looked_up, b[0], add_input=True)
    found["embedding"] = (embedded, want)
    return {name: float((got - want).abs().max()) for name, (got, want) in found.items()}


def difference_after_another_adapter() -> float:
    """-> the same for a slot that was used, and then given to another adapter by vLLM's own manager."""
    a, b = weights()
    wrapper = PunicaWrapperCPU(64, 16, "cpu")
    batch = [11] * 3
    wrapper.update_metadata(LoRAMapping(tuple(batch), tuple(batch), is_prefill=True), IDS, SLOTS + 1, 100)
    x, y = torch.randn(3, WIDTH), torch.zeros(3, sum(WIDTHS))
    wrapper.add_lora_linear(y, x, a, b, 1.0, WIDTHS)

    def set_lora(slot: int, new_a: torch.Tensor, new_b: torch.Tensor) -> None:
        for n in range(len(WIDTHS)):
            a[n][slot, 0], b[n][slot, 0] = new_a[n], new_b[n]

    manager = LoRAModelManager.__new__(LoRAModelManager)
    manager.lora_index_to_id = [None, 12, 13, 14]
    manager._active_adapters = {}
    manager._registered_adapters = {15: SimpleNamespace(id=15)}
    manager.modules = {"layer": SimpleNamespace(set_lora=set_lora)}
    given = SimpleNamespace(
        lora_a=[torch.randn(RANK, WIDTH) for _ in WIDTHS], lora_b=[torch.randn(width, RANK) for width in WIDTHS]
    )
    manager._get_lora_layer_weights = lambda model, name: given
    assert manager.activate_adapter(15)
    y = torch.zeros(3, sum(WIDTHS))
    wrapper.add_lora_linear(y, x, a, b, 1.0, WIDTHS)
    return float((y - expected(torch.zeros_like(y), x, batch, a, b)).abs().max())


def main(how: str) -> None:
    torch.manual_seed(0)
    said: list[str] = []
    listening = logging.Handler()
    listening.emit = lambda record: said.append(f"{record.levelname} {record.getMessage()}")
    logging.getLogger("vllm.graft_lora").addHandler(listening)
    logging.getLogger("vllm.graft_lora").setLevel(logging.INFO)
    before = {name: getattr(PunicaWrapperCPU, name) for name in ("add_lora_linear", "update_metadata", "__init__")}
    if how == "changed":
        graft_vllm_lora.SOURCES["vllm.lora.ops.torch_ops:bgmv_shrink"] = "0" * 16
    for _ in range(2 if how != "installed" else 0):
        graft_vllm_lora.register()
    result = {"batches": {name: difference(batch) for name, batch in BATCHES.items()}}
    if how == "mended":
        graft_vllm_lora.register()  # once more, after the first wrapper was made
        for extra in (3, -3):
            result["batches"] |= {f"{name} {extra:+}": difference(batch, extra) for name, batch in BATCHES.items()}
        result["batches"]["another adapter"] = {"linear": difference_after_another_adapter()}
    result["untouched"] = all(getattr(PunicaWrapperCPU, name) is method for name, method in before.items())
    result["said"] = [line for line in said if "graft" in line]
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
