"""The engine's protocol: what is streamed on, what is thinking, and which error each failure becomes."""

import asyncio
from collections.abc import Iterator

import pytest
from pydantic import SecretStr
from service_fixtures import MAX_MODEL_LEN, ROOT_MODEL, Reply, WireEngine, until

from ingest.errors import InvalidError, UnavailableError
from service.generate import AdapterLostError, Generator, Piece, Sampling, ThinkingFilter, strip_thinking
from service.prompt import Message

QUESTION: list[Message] = [{"role": "user", "content": "two words"}]


@pytest.fixture
def engine() -> Iterator[WireEngine]:
    wire = WireEngine()
    yield wire
    wire.stop()


def generate(url: str, adapter: str | None = None, key: str | None = None, wait: float = 20) -> list[Piece]:
    async def collected() -> list[Piece]:
        generator = Generator(url, SecretStr(key) if key else None, wait)
        try:
            return [piece async for piece in generator.stream(QUESTION, adapter, Sampling(7, 0.5))]
        finally:
            await generator.close()

    return asyncio.run(collected())


def filtered(*pieces: str) -> str:
    thinking = ThinkingFilter()
    return "".join(thinking(piece) for piece in pieces) + thinking.rest()


THOUGHT = "<think>a</think>b"


@pytest.mark.parametrize("cut", range(len(THOUGHT) + 1))
def test_thinking_is_dropped_wherever_it_is_cut_in_two(cut: int) -> None:
    assert filtered(THOUGHT[:cut], THOUGHT[cut:]) == "b"


@pytest.mark.parametrize(
    ("pieces", "answer"),
    [
        (tuple(THOUGHT), "b"),
        (("\n<think>\n", "a\n</think>\n\n", "b", " c"), "b c"),
        (("no", " tags"), "no tags"),
        (("<thin",), "<thin"),
        (("<thin", "g>"), "<thing>"),
        (("<", "p> is a tag"), "<p> is a tag"),
        (("<think>never ended",), ""),
        (("a <think>b</think>",), "a <think>b</think>"),  # later in the answer it is text
        ((), ""),
    ],
)
def test_thinking_in_pieces(pieces: tuple[str, ...], answer: str) -> None:
    assert filtered(*pieces) == answer


def test_thinking_that_the_template_opened_is_stripped_from_the_record() -> None:
    assert strip_thinking("I wonder.</think>\n\nIt holds 3.2 litres.") == "It holds 3.2 litres."
    assert strip_thinking("It holds 3.2 litres.") == "It holds 3.2 litres."


def test_text_finish_reason_and_usage(engine: WireEngine) -> None:
    engine.say("It", " holds", " 3.2 litres.", finish="length")
    pieces = generate(engine.url)
    assert [piece.text for piece in pieces] == ["It", " holds", " 3.2 litres.", ""]
    assert pieces[-1].finish_reason == "length"
    assert pieces[-1].usage == {"prompt_tokens": 2, "completion_tokens": 3}


def test_what_the_engine_is_asked(engine: WireEngine) -> None:
    engine.adapters.add("tuned")
    generate(engine.url)
    generate(engine.url, "tuned")
    body = engine.asked[0].body
    assert (body["model"], body["messages"], body["max_tokens"], body["temperature"]) == ("wire-1b", QUESTION, 7, 0.5)
    assert body["stream"] is True
    assert engine.asked[1].body["model"] == "tuned"


def test_reasoning_content_is_ignored(engine: WireEngine) -> None:
    engine.say("b", reasoning="a thought")
    assert "".join(piece.text for piece in generate(engine.url)) == "b"


def test_model_is_told_from_its_adapters(engine: WireEngine) -> None:
    async def asked() -> tuple[object, int]:
        generator = Generator(engine.url, None, 20)
        try:
            engine.adapters.add("tuned")
            return await generator.model(), await generator.count_tokens(QUESTION)
        finally:
            await generator.close()

    model, tokens = asyncio.run(asked())
    assert model == ("wire-1b", ROOT_MODEL, MAX_MODEL_LEN)
    assert tokens == 2


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=500, error="out of memory"),
        Reply(status=503, error="loading"),
        Reply(tokens=("It",), error="the engine core died"),
        Reply(tokens=("It",), cut=True),
        Reply(tokens=(), cut=True),
    ],
    ids=["500", "503", "error in the stream", "cut in the stream", "cut at once"],
)
def test_broken_engine_is_unavailable(engine: WireEngine, reply: Reply) -> None:
    engine.reply = reply
    with pytest.raises(UnavailableError) as raised:
        generate(engine.url)
    assert raised.value.retry_after > 0
    assert "engine" in str(raised.value)
    if reply.error:
        assert reply.error in str(raised.value)


def test_refused_connection_is_unavailable(engine: WireEngine) -> None:
    engine.stop()
    with pytest.raises(UnavailableError, match="does not answer") as raised:
        generate(engine.url)
    assert raised.value.retry_after > 0


def test_silent_engine_is_unavailable(engine: WireEngine) -> None:
    engine.say("late", first_delay=30)
    with pytest.raises(UnavailableError):
        generate(engine.url, wait=0.3)
    until(engine.last().gone.is_set, 5)


def test_unknown_adapter_is_lost(engine: WireEngine) -> None:
    with pytest.raises(AdapterLostError, match="'nobody'"):
        generate(engine.url, "nobody")


def test_refused_prompt_is_invalid(engine: WireEngine) -> None:
    engine.reply = Reply(status=400, error="maximum context length is 4096 tokens")
    with pytest.raises(InvalidError, match="maximum context length"):
        generate(engine.url)


def test_closing_the_stream_ends_the_engines_work(engine: WireEngine) -> None:
    engine.say(*["word "] * 1000, delay=0.02)

    async def first_only() -> None:
        generator = Generator(engine.url, None, 20)
        stream = generator.stream(QUESTION, None, Sampling(7, 0.0))
        await anext(stream)
        await stream.aclose()
        await asyncio.to_thread(until, engine.last().gone.is_set, 3)
        await generator.close()

    asyncio.run(first_only())
    assert engine.last().sent < 1000
