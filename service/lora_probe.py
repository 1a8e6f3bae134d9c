"""Tries an engine with two generated adapters: does each request get its own weights, and the bare base none?

As installed, vLLM's CPU path gives requests without an adapter the weights of another that shares their batch, and a release
had requests change adapter when one was added beside them (vLLM issue 47724). So every start of an engine is tried.
"""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ingest.errors import GraftError
from service.adapters import PROBE_LABEL
from service.base_model import BaseModel
from service.generate import Generator
from service.lora_file import NOT_SERVED
from service.preflight import CONFIG, WEIGHTS, write_config

PROMPTS = ("The pump of the house was", "In the year of the flood", "Seven engineers went to")
TOKENS = 10
ROUNDS = 3  # one clean round will do: a mixture shows in each
ALIKE = 5  # characters: in bfloat16 a batch rounds otherwise, which shows some words on; a mixture shows at once
RANK = 8
STRENGTHS = (4.0, 16.0)  # of the second matrix; what the base says must change wholly


class MixingError(GraftError):
    """The engine's answers depend on which adapters share a batch, or its adapters do nothing."""


async def try_engine(generator: Generator, folder: Path, base: BaseModel, slots: int) -> None:
    """`slots`: adapters in a batch; all are filled, since what mixes may only be seen then.

    Raises MixingError; UnavailableError when the engine does not answer or loads no adapters.
    """
    model = (await generator.model()).base
    bare = await asyncio.gather(*(_answer(generator, model, at) for at in range(len(PROMPTS))))
    for strength in STRENGTHS:
        seeds = range(1, max(slots, 2) + 1)
        names = [await asyncio.to_thread(write_probe, folder, base, seed, strength) for seed in seeds]
        alone = {model: bare[0], names[0]: await _answer(generator, names[0], 1)}
        changed = await _change_while_adding(generator, alone, names[1])
        alone[names[1]] = await _answer(generator, names[1], 2)
        others = [await _answer(generator, name, 0) for name in names[1:]]  # each takes a slot
        pairs = [(bare[1], alone[names[0]]), (bare[2], alone[names[1]]), *((bare[0], other) for other in others)]
        if not any(_alike(one, other) for one, other in pairs):
            break
    else:
        raise MixingError("the engine answers the same with and without an adapter")
    if changed:
        raise MixingError("answers in flight change while another adapter is added")
    if await _change_together(generator, alone):
        raise MixingError("answers of the base and of adapters change when they share a batch")


async def _change_while_adding(generator: Generator, alone: Mapping[str, str], added: str) -> bool:
    """Whether, in each of several rounds, answers in flight change while an adapter is added beside them."""
    for _ in range(ROUNDS):
        await _forget(generator, added)
        flying = [asyncio.create_task(_answer(generator, name, at)) for at, name in enumerate(alone)]
        try:
            await asyncio.sleep(0.05)
            await generator.complete(added, PROMPTS[2], 1)
            if _all_alike([await one for one in flying], alone):
                return False
        finally:
            await asyncio.gather(*flying, return_exceptions=True)
    return True


async def _change_together(generator: Generator, alone: Mapping[str, str]) -> bool:
    for _ in range(ROUNDS):
        answers = await asyncio.gather(*(_answer(generator, name, at) for at, name in enumerate(alone)))
        if _all_alike(answers, alone):
            return False
    return True


def _all_alike(answers: Sequence[str], alone: Mapping[str, str]) -> bool:
    return all(_alike(one, other) for one, other in zip(answers, alone.values(), strict=True))


def _alike(one: str, other: str) -> bool:
    """Whether two answers begin alike: the same weights wrote them."""
    return one[:ALIKE] == other[:ALIKE]


async def _answer(generator: Generator, name: str, prompt: int) -> str:
    return await generator.complete(name, PROMPTS[prompt], TOKENS)


async def _forget(generator: Generator, name: str) -> None:
    try:
        await generator.unload_adapter(name)
    except GraftError:
        return  # it was not loaded, or the engine does not unload: then it is only not added anew


def write_probe(folder: Path, base: BaseModel, seed: int, strength: float) -> str:
    """-> the name of a LoRA of random matrices, which changes what the base says. The same every time."""
    modules = _modules(base)
    said = f"{base.identity}:{sorted(modules.items())}:{seed}:{strength}:{RANK}"
    name = f"{PROBE_LABEL}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
    target = folder / name
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    if not (target / CONFIG).is_file():
        target.mkdir(exist_ok=True)
        random = np.random.default_rng(seed)
        tensors = {}
        for module, (out, width) in modules.items():
            down = random.standard_normal((RANK, width), np.float32) * (1.5 / width**0.5)
            up = random.standard_normal((out, RANK), np.float32) * (0.08 * strength)
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
        save_file(tensors, str(target / WEIGHTS))
    write_config(target, config, base.root)
    return name


def _modules(base: BaseModel) -> dict[str, tuple[int, int]]:
    """Two kinds of matrix, of every layer: queries and values where they are told apart."""
    plain = {
        module: shape
        for module, shape in base.shapes.items()
        if shape is not None and ".layers." in f".{module}" and not NOT_SERVED.search(module)
    }
    kinds = sorted(
        {module.rpartition(".")[2] for module in plain}, key=lambda kind: (kind not in {"q_proj", "v_proj"}, kind)
    )
    return {module: shape for module, shape in plain.items() if module.rpartition(".")[2] in kinds[:2]}
