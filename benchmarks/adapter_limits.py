"""What the engine's limits for adapters cost where none is in use: memory, start, and the base's tokens/s, by setting."""

import asyncio
import time
from typing import Any

from benchmarks.adapter_tokens import batch, serving
from benchmarks.report import Options, Row, median, say, settings, shown, skipped
from service.owner import ProcessMark
from service.settings import ServiceSettings

LIMITS: tuple[dict[str, Any], ...] = (
    {"max_lora_rank": 16, "max_loras": 1, "max_cpu_loras": 1},
    {"max_lora_rank": 64, "max_loras": 1, "max_cpu_loras": 1},
    {"max_lora_rank": 64, "max_loras": 4, "max_cpu_loras": 4},
    {},
    {"max_lora_rank": 256, "max_loras": 4, "max_cpu_loras": 64},
)
STREAMS, TOKENS = 4, 32


def run(options: Options) -> list[Row]:
    given: dict[str, Any] = {}
    service = ServiceSettings(**given)
    if not (service.engine_venv / "bin/python").exists():
        return [skipped("limits for adapters", "no engine is installed (make engine)")]
    rows = []
    for limits in LIMITS[3:4] if options.quick else LIMITS:
        rows += asyncio.run(_measure(options, service.model_copy(update=limits)))
    return rows


async def _measure(options: Options, service: ServiceSettings) -> list[Row]:
    name = f"rank {service.max_lora_rank}, {service.max_loras} in a batch, {service.max_cpu_loras} registered"
    start = time.monotonic()
    async with serving(options, service, {}) as (engine, client):
        seconds = time.monotonic() - start
        await batch(client, [engine.served_name], 2, 2, 4)  # to warm up
        held = _resident(options)
        rates = []
        for _ in range(1 if options.quick else 5):
            begun = time.perf_counter()
            done = await batch(client, [engine.served_name], STREAMS, STREAMS, TOKENS)
            rates.append(sum(one.tokens for one in done) / (time.perf_counter() - begun))
        say(f"{name}: {held:,.0f} MiB, {median(rates):.1f} tokens/s")
    spread = f"{median(rates):.1f} tokens/s ({min(rates):.1f} to {max(rates):.1f})"
    note = f"base at {STREAMS} streams: {spread}; up in {seconds:.0f} s"
    return [shown(f"engine's memory, limits {name}", held, "MiB", note)]


def _resident(options: Options) -> float:
    """MiB that the engine's processes hold and share with no other."""
    file = settings(options.scratch / "adapter-tokens").home / "engine.json"
    process = ProcessMark.model_validate_json(file.read_text()).process()
    assert process is not None
    return sum(one.memory_full_info().uss for one in (process, *process.children(recursive=True))) / 2**20
