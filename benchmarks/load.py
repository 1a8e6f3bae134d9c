"""An open-loop load over HTTP: requests leave on a clock, whether or not the earlier ones are answered.

A request's time counts from when it was due, so a stall is felt by all that were due in it.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx

LIMITS = httpx.Limits(max_connections=200, max_keepalive_connections=200)


class Reply(NamedTuple):
    """`body` None: it failed, `status` says how (0: no answer at all)."""

    milliseconds: float
    status: int
    body: dict[str, Any] | None


def open_loop(url: str, bodies: Sequence[dict[str, Any]], rate: float, seconds: float) -> list[Reply]:
    """POSTs the bodies, from the first on again when they run out, `rate` a second."""
    return asyncio.run(_open_loop(url, bodies, rate, seconds))


async def _open_loop(url: str, bodies: Sequence[dict[str, Any]], rate: float, seconds: float) -> list[Reply]:
    async with httpx.AsyncClient(timeout=60, limits=LIMITS, trust_env=False) as client:
        start = time.perf_counter() + 0.1
        tasks = []
        for n in range(int(rate * seconds)):
            due = start + n / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(_send(client, url, bodies[n % len(bodies)], due)))
        return await asyncio.gather(*tasks)


async def _send(client: httpx.AsyncClient, url: str, body: dict[str, Any], due: float) -> Reply:
    try:
        reply = await client.post(url, json=body)
    except httpx.HTTPError:
        return Reply((time.perf_counter() - due) * 1000, 0, None)
    milliseconds = (time.perf_counter() - due) * 1000
    return Reply(milliseconds, reply.status_code, reply.json() if reply.is_success else None)
