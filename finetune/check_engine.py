"""The engine's side of a check: how it lays out a prompt, and what it answers with what probability."""

import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from ingest.errors import GraftError, UnavailableError
from service.generate import RETRY_AFTER, Generator
from service.prompt import Message


class Answered(NamedTuple):
    """An answer's tokens, and the natural logarithm of each one's probability."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


class ScoredEngine(Generator):
    """A client of one engine, as the service has it, which also asks for token ids and probabilities."""

    async def version(self) -> str:
        with suppress(GraftError):
            reply = await self._json("GET", self.url.removesuffix("/v1") + "/version")
            if isinstance(reply, dict) and isinstance(reply.get("version"), str):
                return f"vLLM {reply['version']}"
        return "an engine that does not name its version"

    async def tokens(self, model: str, messages: Sequence[Message]) -> list[int]:
        """-> a prompt as the engine lays it out for an answer. Raises UnavailableError."""
        body: dict[str, Any] = {
            "model": model,
            "messages": list(messages),
            "add_generation_prompt": True,
            "chat_template_kwargs": {"enable_thinking": False},  # as answers are asked for
        }
        reply = await self._json("POST", self.url.removesuffix("/v1") + "/tokenize", body, model)
        return [int(token) for token in reply["tokens"]]

    async def greedy(self, model: str, prompt: Sequence[int], at_most: int) -> Answered:
        """-> what follows a prompt, up to `at_most` tokens. Nothing is taken from the engine's cache of prompts, so that the
        same question is computed in the same way each time. Raises AdapterLostError, UnavailableError.
        """
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": at_most,
            "temperature": 0,
            "logprobs": 1,
            "return_token_ids": True,
            "cache_salt": uuid.uuid4().hex,
        }
        choice = (await self._json("POST", f"{self.url}/completions", body, model))["choices"][0]
        tokens, scored = choice.get("token_ids"), choice.get("logprobs")
        if not tokens or not scored:
            raise UnavailableError(f"the engine at {self.url!r} gives no token ids with its answers", RETRY_AFTER)
        return Answered(tuple(tokens), tuple(scored["token_logprobs"]))
