"""Prints which data type this processor multiplies fastest, as JSON: GFLOP/s by type. Runs with the engine's Python.

The shapes are those of a small model reading a prompt. bfloat16 wins with AVX-512 or AMX, float32 with AVX2 alone.
"""

import json
import time

import torch


def rate(dtype: torch.dtype) -> float:
    """-> GFLOP/s of (256 x 1024) @ (1024 x 1024): the best of several runs within half a second."""
    left, right = torch.randn(256, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    best = float("inf")
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return round(2 * 256 * 1024 * 1024 / best / 1e9, 1)


if __name__ == "__main__":
    print(json.dumps({name: rate(getattr(torch, name)) for name in ("bfloat16", "float32")}))
