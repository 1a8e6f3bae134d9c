"""Streams an answer from the engine, over its OpenAI protocol. Knows nothing of retrieval, citations or records.

aiohttp, not httpx as elsewhere: this is the busy path, and it takes a third of the processor time for a stream.
"""

import json
import re
from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple

import aiohttp
from pydantic import SecretStr

from ingest.errors import InvalidError, UnavailableError
from service.prompt import Message

DOWN = (aiohttp.ClientError, TimeoutError, OSError)
RETRY_AFTER = 10  # seconds a client should wait for an engine that is coming up


class Sampling(NamedTuple):
    max_tokens: int
    temperature: float


class Piece(NamedTuple):
    """Some text of the answer; the last piece carries the finish reason and the token counts."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, int] | None = None


class Model(NamedTuple):
    """What the engine serves: `base` under the name that requests use, `root` as it was loaded."""

    base: str
    root: str
    max_model_len: int | None


class AdapterLostError(UnavailableError):
    """The engine does not have an adapter that it was asked for."""


class Generator:
    """A client of one engine address, `url` ending in /v1. `url` may be set later, once a local engine is up."""

    def __init__(self, url: str, api_key: SecretStr | None, first_token_seconds: float) -> None:
        self.url = url.rstrip("/")
        self._headers = {"authorization": f"Bearer {api_key.get_secret_value()}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=first_token_seconds)
        self._opened: aiohttp.ClientSession | None = None
        self._model: Model | None = None

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()

    def _client(self) -> aiohttp.ClientSession:
        """Opened at its first use, since it belongs to the event loop that it is used in."""
        if self._opened is None:
            connector = aiohttp.TCPConnector(limit=0)
            self._opened = aiohttp.ClientSession(
                connector=connector, headers=self._headers, timeout=self._timeout, read_bufsize=2**20
            )
        return self._opened

    async def model(self, fresh: bool = False) -> Model:
        """Raises UnavailableError."""
        if self._model is None or fresh:
            cards = (await self._json("GET", f"{self.url}/models"))["data"]
            base = next((card for card in cards if not card.get("parent")), None)
            if base is None:
                raise UnavailableError(f"the engine at {self.url!r} serves no model", RETRY_AFTER)
            self._model = Model(base["id"], base.get("root") or base["id"], base.get("max_model_len"))
        return self._model

    def forget_model(self) -> None:
        """The engine was started anew, perhaps with another model."""
        self._model = None

    async def healthy(self) -> bool:
        try:
            limit = aiohttp.ClientTimeout(total=3)
            async with self._client().get(self.url.removesuffix("/v1") + "/health", timeout=limit) as reply:
                return reply.ok
        except DOWN:
            return False

    async def count_tokens(self, messages: Sequence[Message]) -> int:
        """-> tokens of the prompt as the engine's chat template lays it out."""
        model = await self.model()
        body = {"model": model.base, "messages": list(messages), "add_generation_prompt": True}
        reply = await self._json("POST", self.url.removesuffix("/v1") + "/tokenize", body)
        return int(reply["count"])

    async def complete(self, model: str, prompt: str, tokens: int) -> str:
        """-> exactly so many tokens that greedily follow a bare prompt. Raises AdapterLostError, UnavailableError."""
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        reply = await self._json("POST", f"{self.url}/completions", body, model)
        return str(reply["choices"][0]["text"])

    async def loaded_adapters(self) -> frozenset[str]:
        """The names that the engine serves besides its base. Raises UnavailableError."""
        cards = (await self._json("GET", f"{self.url}/models"))["data"]
        return frozenset(card["id"] for card in cards if card.get("parent"))

    async def load_adapter(self, name: str, folder: str) -> None:
        """For an engine whose resolver did not find it. Raises UnavailableError."""
        body = {"lora_name": name, "lora_path": folder}
        await self._json("POST", f"{self.url}/load_lora_adapter", body, name)

    async def unload_adapter(self, name: str) -> None:
        """The engine forgets the name; the next request that names it loads it anew. Raises UnavailableError."""
        await self._json("POST", f"{self.url}/unload_lora_adapter", {"lora_name": name}, name)

    async def stream(
        self, messages: Sequence[Message], adapter: str | None, sampling: Sampling
    ) -> AsyncGenerator[Piece]:
        """Closing the iterator ends the engine's work. Raises UnavailableError, AdapterLostError, InvalidError."""
        model = await self.model()
        body: dict[str, Any] = {
            "model": adapter or model.base,
            "messages": list(messages),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            "chat_template_kwargs": {"enable_thinking": False},  # templates that know no such switch ignore it
        }
        finish: str | None = None
        usage: dict[str, int] | None = None
        without_thinking = ThinkingFilter()
        try:
            async with self._client().post(f"{self.url}/chat/completions", json=body) as reply:
                if not reply.ok:
                    self.forget_model()  # it may be another engine by now
                    raise _refusal(reply.status, await reply.text(), adapter)
                async for line in reply.content:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        break
                    event = json.loads(data)
                    if "error" in event:
                        raise UnavailableError(f"the engine broke off: {event['error']}", RETRY_AFTER)
                    if event.get("usage"):
                        counted = event["usage"]
                        usage = {key: counted[key] for key in ("prompt_tokens", "completion_tokens") if key in counted}
                    for choice in event.get("choices", ()):
                        finish = choice.get("finish_reason") or finish
                        text = without_thinking(choice.get("delta", {}).get("content") or "")
                        if text:
                            yield Piece(text)
        except (*DOWN, json.JSONDecodeError) as error:
            raise self._down(error) from error
        if finish is None:
            raise UnavailableError("the engine broke off before the end of the answer", RETRY_AFTER)
        yield Piece(without_thinking.rest(), finish, usage or {})

    async def _json(self, method: str, url: str, body: object = None, adapter: str | None = None) -> Any:
        try:
            async with self._client().request(method, url, json=body) as reply:
                if not reply.ok:
                    raise _refusal(reply.status, await reply.text(), adapter)
                text = await reply.text()
                return json.loads(text) if text.startswith(("{", "[")) else text
        except (*DOWN, json.JSONDecodeError) as error:
            raise self._down(error) from error

    def _down(self, error: Exception) -> UnavailableError:
        said = str(error) or type(error).__name__
        return UnavailableError(f"the engine at {self.url!r} does not answer ({said}); try again", RETRY_AFTER)


class ThinkingFilter:
    """Drops a reasoning model's `<think>...</think>` from a stream of pieces, also when its tags are cut apart."""

    def __init__(self) -> None:
        self._held = ""
        self._state = "start"  # then "thinking" or "answer"

    def __call__(self, piece: str) -> str:
        if self._state == "answer":
            return piece
        self._held += piece
        if self._state == "start":
            seen = self._held.lstrip()
            if seen.startswith("<think>"):
                self._state = "thinking"
            elif not "<think>".startswith(seen):
                self._state, answer, self._held = "answer", self._held, ""
                return answer
        if self._state == "thinking" and "</think>" in self._held:
            answer = self._held.partition("</think>")[2].lstrip()
            if answer:
                self._state, self._held = "answer", ""
                return answer
        return ""

    def rest(self) -> str:
        """What is still held at the end: an answer so short that it could have become a tag."""
        return self._held if self._state == "start" else ""


def strip_thinking(text: str) -> str:
    """For an engine whose template opens the thinking itself, so that only its end is seen."""
    return re.sub(r"\A.*</think>\s*", "", text, flags=re.DOTALL)


def _refusal(status: int, text: str, adapter: str | None) -> Exception:
    try:
        body = json.loads(text)
        said = body.get("error", body).get("message", text)
    except (ValueError, AttributeError):
        said = text
    said = str(said)[:300]
    if adapter and (status == 404 or "could not be loaded" in said):
        return AdapterLostError(f"the engine does not find adapter {adapter!r}: {said}", RETRY_AFTER)
    if status in {400, 422}:
        return InvalidError(f"the engine refused the prompt: {said}")
    return UnavailableError(f"the engine answered {status}: {said}", RETRY_AFTER)
