"""A vLLM plugin: on the CPU, the rows of a batch are grouped by adapter, and each adapter is one matrix product per layer.

vLLM 0.32's own CPU path copies the adapter's weights for every row, and gives rows without adapter (index -1) those of the
last slot. This puts other methods on its `PunicaWrapperCPU`, only where the code it replaces or relies on is the one it was
written for (SOURCES); otherwise it says so once and leaves vLLM as it is. Products are in the data type of the layer's
input. Mixture-of-experts layers, full linear layers, sharded adapters and compiled models stay vLLM's own.

VLLM_PLUGINS, when set without `graft_lora_cpu`, switches it off.
"""

import functools
import hashlib
import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger("vllm.graft_lora")  # below vLLM's own, which is set up
WRAPPER = "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU"
BASE = "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase"
MANAGER = "vllm.lora.model_manager:LoRAModelManager"

# What is replaced or relied on, by the first 16 digits of its source's SHA-256.
SOURCES = {
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU": "acc9bc9cf24eb2db",
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.__init__": "f0e9954acd9e7b32",
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.update_metadata": "d495e482e77f030a",
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase._update_base_metadata": "e0c8bab8013a624b",
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.token_lora_indices": "3f9867f42f47684d",
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.sampler_indices": "f486b59b6a623812",
    "vllm.lora.punica_wrapper.utils:convert_mapping": "f95d398f21afb453",
    "vllm.lora.ops.torch_ops:bgmv_shrink": "e7a5eafed74a2bc1",
    "vllm.lora.ops.torch_ops:bgmv_expand": "634dfed323317a2a",
    "vllm.lora.ops.torch_ops:bgmv_expand_slice": "3534905281a25201",
    "vllm.lora.model_manager:LoRAModelManager.activate_adapter": "0661f9e08a07fe15",
    "vllm.lora.model_manager:LoRAModelManager.set_adapter_mapping": "fc14134c10e98bb3",
    "vllm.lora.model_manager:LoRAModelManager._set_adapter_mapping": "6ae4384167f2dee5",
    "vllm.lora.model_manager:LRUCacheLoRAModelManager.activate_adapter": "d1b81b771adb0a60",
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.create_lora_weights": "94edaf24d2fcb81f",
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.set_lora": "c73fd59a99a6ae54",
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_lora_to_output": "57c8604ccec2e37f",
    "vllm.lora.layers:MergedColumnParallelLinearWithLoRA.create_lora_weights": "5495fcfe4c518304",
    "vllm.lora.layers:MergedColumnParallelLinearWithLoRA.set_lora": "111b25b22b35b4ac",
    "vllm.lora.layers:VocabParallelEmbeddingWithLoRA.create_lora_weights": "e1f8d8dd64fb3f71",
    "vllm.lora.layers:VocabParallelEmbeddingWithLoRA.forward": "5b169c35ea69b6e9",
    "vllm.lora.layers:LogitsProcessorWithLoRA.create_lora_weights": "0a138a0cecf6ff40",
    "vllm.lora.layers:LogitsProcessorWithLoRA._get_logits": "e78cb65460f61061",
}


class Group(NamedTuple):
    """The rows of a batch that use the adapter in `slot`: a slice where they lie together, else their indices."""

    slot: int
    rows: slice | Tensor
    stop: int  # the last row + 1


class Part(NamedTuple):
    """One output slice: `b` is [rank, width], for columns `start`.. of x @ a and columns `offset`.. of y."""

    start: int
    offset: int
    b: Tensor


class Layer(NamedTuple):
    """One adapter in one layer, without its padding. `a` is [input width, sum of ranks]; None: the layer is not adapted."""

    held: Tensor  # its id is in the key, so it must live
    a: Tensor | None
    parts: tuple[Part, ...]


Key = tuple[int, torch.dtype, tuple[int, ...]]  # id of the layer's first stacked tensor, type, widths of the slices
_layers: dict[int, dict[Key, Layer]] = {}  # by slot


def register() -> None:
    """vLLM calls this early in each of its processes, perhaps several times.

    The rest follows when the first wrapper is made, in a process that uses adapters: then all that is looked at here has
    been imported, while importing it now would cost every other process more than a second.
    """
    try:
        platform: Any = importlib.import_module("vllm.platforms")
        if not platform.current_platform.is_cpu():
            logger.debug("graft: not vLLM's CPU platform, LoRA stays as it is")
            return
        wrapper = _resolve(WRAPPER)
        if hasattr(wrapper, "graft_tokens"):
            return
        original = wrapper.__init__

        @functools.wraps(original)
        def first(self: Any, *args: Any, **kwargs: Any) -> None:
            wrapper.__init__ = original
            _mend()
            original(self, *args, **kwargs)

        wrapper.__init__ = first
        wrapper.graft_tokens = wrapper.graft_samples = ()
    except Exception as error:
        logger.warning("graft: LoRA on the CPU stays as vLLM has it, slow and mixed up: %r", error)


def changed() -> list[str]:
    """-> which of SOURCES are missing or differ from what this was written for."""
    return [name for name, expected in SOURCES.items() if _fingerprint(name) != expected]


def _mend() -> None:
    """Sets the methods below, or none of them. Never raises."""
    try:
        if differing := changed():
            logger.warning(
                "graft: this vLLM's %s is not the code that was mended; LoRA on the CPU stays as vLLM has it: "
                "slow, and wrong for requests without adapter that share a batch with others",
                ", ".join(differing),
            )
            return
        wrapper, base, manager = map(_resolve, (WRAPPER, BASE, MANAGER))
        mended: list[tuple[Any, str, Callable[..., Any]]] = [
            (wrapper, "update_metadata", _update_metadata(base.update_metadata)),
            (wrapper, "add_lora_linear", _add_lora_linear(wrapper.add_lora_linear)),
            (wrapper, "add_lora_logits", _add_lora_logits(wrapper.add_lora_logits)),
            (wrapper, "add_lora_embedding", _add_lora_embedding(wrapper.add_lora_embedding)),
            (manager, "activate_adapter", _activate_adapter(manager.activate_adapter)),
        ]
        for owner, name, method in mended:
            setattr(owner, name, method)
        logger.info("graft: LoRA rows are grouped by adapter on the CPU")
    except Exception as error:
        logger.warning("graft: LoRA on the CPU stays as vLLM has it, slow and mixed up: %r", error)


def _update_metadata(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.graft_tokens = group(self.token_lora_indices)
        self.graft_samples = group(self.sampler_indices)

    return update_metadata


def _activate_adapter(original: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(original)
    def activate_adapter(self: Any, lora_id: int) -> bool:
        active = lora_id in self._active_adapters
        try:
            return original(self, lora_id)
        finally:
            if not active:  # its slot holds other weights now
                slots = self.lora_index_to_id
                _forget(slots.index(lora_id) if lora_id in slots else None)

    return activate_adapter


def _add_lora_linear(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def add_lora_linear(
        self: Any,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        # A compiled model would keep the groups of the batch that it was traced with.
        if buffer is not None or torch.compiler.is_compiling():
            original(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, **kwargs)
        elif self.graft_tokens:
            _add(self.graft_tokens, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices)

    return add_lora_linear


def _add_lora_logits(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def add_lora_logits(
        self: Any,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        if buffer is not None or torch.compiler.is_compiling():
            original(self, y, x, lora_a_stacked, lora_b_stacked, scale, buffer=buffer, **kwargs)
        elif self.graft_samples:
            width = min(y.shape[-1], lora_b_stacked.shape[-2])  # y and the adapter may be padded differently
            _add(self.graft_samples, y, x, (lora_a_stacked,), (lora_b_stacked,), scale, (width,))

    return add_lora_logits


def _add_lora_embedding(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def add_lora_embedding(
        self: Any, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """Here x is the product with A already: the rows that the embedding looked up."""
        if not add_inputs or torch.compiler.is_compiling():
            original(self, y, x, lora_b_stacked, add_inputs, **kwargs)
        elif self.graft_tokens:
            width = min(y.shape[-1], lora_b_stacked.shape[-2])
            _add(self.graft_tokens, y, x, None, (lora_b_stacked,), 1.0, (width,))

    return add_lora_embedding


def group(indices: Tensor) -> tuple[Group, ...]:
    """-> the rows of each slot in `indices` [rows]; rows with -1 (no adapter) are in none."""
    rows: dict[int, list[int]] = {}
    for row, slot in enumerate(indices.tolist()):
        if slot >= 0:
            rows.setdefault(slot, []).append(row)
    return tuple(
        Group(slot, slice(at[0], at[-1] + 1) if at[-1] - at[0] + 1 == len(at) else torch.tensor(at), at[-1] + 1)
        for slot, at in rows.items()
    )


def _add(
    groups: tuple[Group, ...],
    y: Tensor,
    x: Tensor,
    lora_a: tuple[Tensor, ...] | None,
    lora_b: tuple[Tensor, ...],
    scale: float,
    widths: tuple[int, ...],
) -> None:
    """y[rows] += x[rows] @ A @ B * scale, for each group's adapter; without `lora_a`, x is x @ A already."""
    if y.dim() != 2 or x.dim() != 2:
        y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    height = min(x.shape[0], y.shape[0])
    for slot, rows, stop in groups:
        layer = _layer(slot, lora_a, lora_b, widths, x.dtype)
        if not layer.parts:
            continue
        if stop > height:  # fewer rows than the mapping has
            rows = slice(rows.start, height) if isinstance(rows, slice) else rows[rows < height]
        if isinstance(rows, slice):
            if rows.start >= height:
                continue
            whole = rows.start == 0 and rows.stop == x.shape[0] == y.shape[0]
            _add_rows(y, x, layer, scale) if whole else _add_rows(y[rows], x[rows], layer, scale)
        elif len(rows):
            some = y.index_select(0, rows)
            _add_rows(some, x.index_select(0, rows), layer, scale)
            y.index_copy_(0, rows, some)


def _add_rows(y: Tensor, x: Tensor, layer: Layer, scale: float) -> None:
    shrunk = x if layer.a is None else x @ layer.a
    for start, offset, b in layer.parts:
        rank, width = b.shape
        # For a few rows, a view takes as long as the product.
        inner = shrunk if rank == shrunk.shape[1] else shrunk.narrow(1, start, rank)
        outer = y if width == y.shape[1] else y.narrow(1, offset, width)
        if y.dtype == x.dtype:
            outer.addmm_(inner, b, alpha=scale)
        else:
            outer.add_(inner @ b, alpha=scale)


def _layer(
    slot: int,
    lora_a: tuple[Tensor, ...] | None,
    lora_b: tuple[Tensor, ...],
    widths: tuple[int, ...],
    dtype: torch.dtype,
) -> Layer:
    """-> the slot's adapter in the layer of these stacked tensors, kept until other weights are put in the slot."""
    held = (lora_a or lora_b)[0]
    layers, key = _layers.setdefault(slot, {}), (id(held), dtype, widths)
    layer = layers.get(key)
    if layer is None:
        layer = layers[key] = _without_padding(slot, held, lora_a, lora_b, widths, dtype)
    return layer


def _without_padding(
    slot: int,
    held: Tensor,
    lora_a: tuple[Tensor, ...] | None,
    lora_b: tuple[Tensor, ...],
    widths: tuple[int, ...],
    dtype: torch.dtype,
) -> Layer:
    """The stacked tensors are padded with zeros to the highest rank; slices that come out as zero are left out."""
    a_parts, parts, start, offset = [], [], 0, 0
    for n, width in enumerate(widths):
        a = _of_slot(lora_a[n], slot) if lora_a else None  # [rank, input width]
        rank = _used(a, 1) if a is not None else lora_b[n].shape[-1]
        if rank:
            b = _of_slot(lora_b[n], slot)[:width, :rank]
            rank = _used(b, 0)
        if rank:
            parts.append(Part(start, offset, b[:, :rank].T.to(dtype).contiguous()))
            if a is not None:
                a_parts.append(a[:rank].to(dtype))
                start += rank
        offset += width
    if not a_parts:
        return Layer(held, None, tuple(parts))
    return Layer(held, (a_parts[0] if len(a_parts) == 1 else torch.cat(a_parts)).T, tuple(parts))


def _of_slot(stacked: Tensor, slot: int) -> Tensor:
    """[slots, 1, rows, columns] or [slots, rows, columns] -> [rows, columns]"""
    one = stacked[slot]
    return one[0] if one.dim() == 3 else one


def _used(weights: Tensor, dim: int) -> int:
    """-> the number of rows (`dim` 1: looked at along columns) or columns (0) up to the last that is not zero."""
    found = (weights != 0).any(dim).nonzero()
    return int(found[-1]) + 1 if len(found) else 0


def _forget(slot: int | None) -> None:
    if slot is None:
        _layers.clear()
    else:
        _layers.pop(slot, None)


def _fingerprint(name: str) -> str:
    try:
        found = _resolve(name)
        source = inspect.getsource(getattr(found, "fget", found))  # a property's code is its getter
    except (ImportError, AttributeError, TypeError, OSError):
        return "missing"
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _resolve(name: str) -> Any:
    """ "module:attribute.attribute" -> the object."""
    module, _, path = name.partition(":")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))
