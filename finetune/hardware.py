"""What this machine trains on: its fastest data type, its devices, and the memory that a run may take and took."""

import json
import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import psutil

from ingest.runtime import processor

logger = logging.getLogger(__name__)
TrainingDType = Literal["bfloat16", "float32"]
DTYPES: tuple[TrainingDType, ...] = ("float32", "bfloat16")
# Of the bundled model, whose products are the smallest that anybody trains; larger ones favour bfloat16 no less.
HIDDEN, INNER, KEYS, TOKENS = 576, 1536, 192, 256
CONTAINER = Path("/sys/fs/cgroup")
PROBE_SECONDS = 0.4  # of each data type, besides a run to warm up


def training_dtype(home: Path, threads: int | None = None) -> TrainingDType:
    """bfloat16 on a GPU that has it; else the faster one on this processor, by a short probe that is kept in `home`."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    kept = home / "training-probe.json"
    with suppress(OSError, ValueError, KeyError):
        probe = json.loads(kept.read_text())
        if probe["processor"] == processor():
            chosen: TrainingDType = probe["dtype"]
            return chosen
    rates = _probe(threads)
    fastest = max(DTYPES, key=lambda dtype: rates[dtype])
    home.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"processor": processor(), "dtype": fastest, "tokens_per_s": rates}, indent=1))
    return fastest


def hardware() -> dict[str, Any]:
    """-> processor, cores, memory_bytes, and the names of the GPUs: none for a run that has not loaded torch."""
    torch = sys.modules.get("torch")
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if torch else []
    cores = len(os.sched_getaffinity(0))
    return {"processor": processor(), "cores": cores, "memory_bytes": total_memory(), "gpus": gpus}


def free_memory() -> int:
    """Bytes that a run may take: of the GPU where there is one, else of the machine or of the container's share."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    available = psutil.virtual_memory().available
    limit, used = _container("memory.max"), _container("memory.current")
    return available if limit is None or used is None else min(available, max(limit - used + _reclaimable(), 0))


def reset_peak_memory() -> None:
    """What `peak_memory` says counts from here on."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # then it counts from the process' start
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The most bytes since `reset_peak_memory`: of tensors on a GPU where torch is loaded and has one, else of this process."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def total_memory() -> int:
    """Bytes of the machine, or of the container's share."""
    total = int(psutil.virtual_memory().total)
    limit = _container("memory.max")
    return total if limit is None else min(total, limit)


def _reclaimable() -> int:
    """Bytes of the container's share that hold files which were read, and are given up when memory is asked for."""
    with suppress(OSError, ValueError):
        for line in (CONTAINER / "memory.stat").read_text().splitlines():
            name, _, size = line.partition(" ")
            if name == "inactive_file":
                return int(size)
    return 0


def _container(file: str) -> int | None:
    """Bytes; None where there is no limit."""
    try:
        return int((CONTAINER / file).read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _probe(threads: int | None) -> dict[TrainingDType, float]:
    """-> tokens a second by data type; 0 for one that this build of torch cannot train in."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return {dtype: _rate(dtype) for dtype in DTYPES}
    finally:
        torch.set_num_threads(before)


def _rate(dtype: TrainingDType) -> float:
    """-> tokens a second, forward and backward through one layer: the best of those within PROBE_SECONDS."""
    import torch
    from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

    numbers = torch.Generator().manual_seed(0)  # the run's own stay as its seed has them

    def weight(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.randn(columns, rows, generator=numbers) / rows**0.5
        return drawn.to(getattr(torch, dtype)).requires_grad_()

    query, out = weight(HIDDEN, HIDDEN), weight(HIDDEN, HIDDEN)
    key, value = weight(HIDDEN, KEYS), weight(HIDDEN, KEYS)
    gate, up, down = weight(HIDDEN, INNER), weight(HIDDEN, INNER), weight(INNER, HIDDEN)
    given = torch.randn(1, TOKENS, HIDDEN, generator=numbers).to(query.dtype)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(1, TOKENS, -1, 64).transpose(1, 2)

    def step() -> None:
        x = rms_norm(given, (HIDDEN,))
        parts = heads(x @ query.T), heads(x @ key.T), heads(x @ value.T)
        mixed = scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        x = rms_norm(given + mixed.transpose(1, 2).reshape(given.shape) @ out.T, (HIDDEN,))
        ((silu(x @ gate.T) * (x @ up.T)) @ down.T).float().square().mean().backward()

    best = float("inf")
    try:
        step()
        end = time.perf_counter() + PROBE_SECONDS
        while time.perf_counter() < end:
            start = time.perf_counter()
            step()
            best = min(best, time.perf_counter() - start)
    except RuntimeError as error:
        logger.warning("training in %s does not work here: %s", dtype, error)
        return 0.0
    return round(TOKENS / best, 1)
