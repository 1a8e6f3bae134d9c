"""What adapters cost the local engine: tokens/s and the time to the first token, as vLLM has it and with deploy/vllm/lora_cpu.

The engine runs with the service's own settings and the bundled model; the adapters are random, of rank 16, on all linear
layers. Requests are greedy, of one length, and no prompt comes twice. `N adapters` alternate from request to request.
"""

import asyncio
import json
import os
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from safetensors.numpy import save_file

from benchmarks.report import Options, Row, at_least, at_most, say, settings, shown, skipped
from ingest.errors import GraftError
from service.engine import LocalEngine
from service.settings import ServiceSettings

RANK = 16
ADAPTERS = 16
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
USES = (0, 1, 4, 16)  # adapters in use; 0: the base alone
STREAMS = (1, 4, 8)
PROMPT = 500  # tokens, for the time to the first
KEPT = 0.8  # of the base's tokens/s, at least, by one adapter at BAR_STREAMS
BAR_STREAMS = 4
LATER = 1.15  # times the base's time to the first token, at most
WITHOUT = {"VLLM_PLUGINS": "lora_filesystem_resolver"}  # vLLM's own plugin alone
SPREAD = "slowest {:.1f}, fastest {:.1f} of {}"


class Timing(NamedTuple):
    """Of one request: seconds to the first token, and tokens in all."""

    first: float
    tokens: int


def run(options: Options) -> list[Row]:
    given: dict[str, Any] = {}
    service = ServiceSettings(**given)
    if not (service.engine_venv / "bin/python").exists():
        return [skipped("adapters in the engine", "no engine is installed (make engine)")]
    if not (settings().models / service.model / "config.json").is_file():
        return [skipped("adapters in the engine", f"{service.model} is not in {settings().models} (make models)")]
    rows = []
    for how, environment in (("as installed", WITHOUT), ("grouped by adapter", {})):
        rows += asyncio.run(_measure(options, service, how, environment))
    return rows


async def _measure(options: Options, service: ServiceSettings, how: str, environment: dict[str, str]) -> list[Row]:
    tokens, rounds = (4, 1) if options.quick else (48, 1 if environment else 3)  # as installed, it takes too long
    uses, streams = ((0, 1), (1, BAR_STREAMS)) if options.quick else (USES, STREAMS)
    with_bars = not environment
    async with serving(options, service, environment) as (engine, client):
        names = await load(client, options.scratch / "adapters", Path(engine.model), ADAPTERS)
        await batch(client, [engine.served_name, *names[:1]], 2, 2, 4)  # to warm up
        first: dict[int, list[float]] = {use: [] for use in uses[:2]}
        for _ in range(rounds * 2):  # in turn, so that a slow minute of the machine meets all alike
            for use, seconds in first.items():
                timings = await batch(client, models(engine, names, use), 1, 1, 1, PROMPT)
                seconds.append(timings[0].first)
        rates: dict[tuple[int, int], list[float]] = {(use, n): [] for n in streams for use in uses}
        for _ in range(rounds):
            for (use, n), found in rates.items():
                start = time.perf_counter()
                done = await batch(client, models(engine, names, use), max(n, use), n, tokens)
                found.append(sum(one.tokens for one in done) / (time.perf_counter() - start))
                say(f"{how}, {label(use)}, {n} streams: {found[-1]:.1f} tokens/s")
    return _rows(how, rates, first, with_bars)


def _rows(
    how: str, rates: dict[tuple[int, int], list[float]], first: dict[int, list[float]], with_bars: bool
) -> list[Row]:
    rows = []
    for (use, n), found in rates.items():
        rate, base = statistics.median(found), statistics.median(rates[0, n])
        note = SPREAD.format(min(found), max(found), len(found)) + (f"; {rate / base:.0%} of the base" if use else "")
        name = f"{label(use)}, {n} at once, {how}"
        bar = with_bars and (use, n) == (1, BAR_STREAMS)
        rows.append(at_least(name, rate, "tokens/s", KEPT * base, note) if bar else shown(name, rate, "tokens/s", note))
    base = statistics.median(first[0])
    for use, found in first.items():
        seconds = statistics.median(found)
        note = f"{min(found):.2f} to {max(found):.2f} s" + (f"; {seconds / base:.0%} of the base" if use else "")
        name = f"first token after {PROMPT}, {label(use)}, {how}"
        bar = with_bars and use == 1
        rows.append(at_most(name, seconds, "s", LATER * base, note) if bar else shown(name, seconds, "s", note))
    return rows


def label(use: int) -> str:
    return f"{use} adapter{'s' if use > 1 else ''}" if use else "base"


def models(engine: LocalEngine, names: Sequence[str], use: int) -> Sequence[str]:
    return names[:use] or [engine.served_name]


@asynccontextmanager
async def serving(
    options: Options, service: ServiceSettings, environment: dict[str, str]
) -> AsyncIterator[tuple[LocalEngine, httpx.AsyncClient]]:
    """The engine as the service starts it, with `environment` added to ours while it starts."""
    home = options.scratch / "adapter-tokens"
    home.mkdir(parents=True, exist_ok=True)
    engine = LocalEngine(service, settings(home))
    kept = {name: os.environ.get(name) for name in environment}
    os.environ |= environment
    try:
        await engine.start()
    finally:
        for name, value in kept.items():
            os.environ.pop(name)
            os.environ |= {name: value} if value is not None else {}
    try:
        async with httpx.AsyncClient(base_url=engine.url, timeout=600, trust_env=False) as client:
            yield engine, client
    finally:
        await engine.stop()


async def load(client: httpx.AsyncClient, folder: Path, model: Path, count: int) -> list[str]:
    """-> the names of `count` random adapters, written below `folder` and loaded by the engine."""
    names = [f"random-{n}" for n in range(count)]
    for seed, name in enumerate(names):
        write_adapter(folder / name, model, RANK, seed)
        body = {"lora_name": name, "lora_path": str(folder / name)}
        (await client.post("/load_lora_adapter", json=body)).raise_for_status()
    return names


def write_adapter(folder: Path, model: Path, rank: int, seed: int, strength: float = 0.02) -> None:
    """A LoRA folder in PEFT's layout, on all linear layers. `strength`: the standard deviation of B."""
    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    keys, queries = config["num_key_value_heads"] * head, config["num_attention_heads"] * head
    attention = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    shapes = list(zip(LINEAR, [*attention, (hidden, inner), (hidden, inner), (inner, hidden)], strict=True))
    numbers = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (width_in, width_out) in shapes:
            block = "self_attn" if name in LINEAR[:4] else "mlp"
            key = f"base_model.model.model.layers.{layer}.{block}.{name}"
            a = numbers.standard_normal((rank, width_in), np.float32) / np.sqrt(width_in, dtype=np.float32)
            b = numbers.standard_normal((width_out, rank), np.float32) * np.float32(strength)
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(LINEAR),
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))


async def batch(
    client: httpx.AsyncClient, names: Sequence[str], requests: int, streams: int, tokens: int, prompt: int = 16
) -> list[Timing]:
    """`requests` requests of `tokens` tokens each, at most `streams` at once, to the models `names` in turn."""
    free = asyncio.Semaphore(streams)

    async def one(name: str) -> Timing:
        async with free:
            return await complete(client, name, tokens, prompt)

    return await asyncio.gather(*(one(names[n % len(names)]) for n in range(requests)))


async def complete(client: httpx.AsyncClient, name: str, tokens: int, prompt: int) -> Timing:
    """Raises GraftError when the engine ends the answer early."""
    body = {
        "model": name,
        "prompt": random.sample(range(1000, 40000), prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, first, counted = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event.get("choices") and not first:
                first = time.perf_counter() - start
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
    if counted != tokens:
        raise GraftError(f"{name} gave {counted} tokens of {tokens}")
    return Timing(first, counted)
