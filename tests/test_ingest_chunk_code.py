"""The strategy `code`: cuts along the syntax, and the signatures around a part as its context."""

from itertools import pairwise
from pathlib import Path

import pytest

from ingest.chunk import split
from ingest.chunk_code import GRAMMARS
from ingest.embed import TokenCounter, load_counter
from ingest.schemas import Chunk, Chunking, ParsedText
from ingest.settings import IngestSettings

METHODS = {  # language -> a method, and what stands around methods
    "bash": ("start_{n}() {{\n  echo {n}; {work}\n}}\n", "run() {{\n{methods}}}\n"),
    "c": ("int start_{n}(int speed) {{\n  {work}\n  return {n};\n}}\n", "{methods}"),
    "cpp": ("  int start_{n}(int speed) {{\n    {work}\n    return {n};\n  }}\n", "class Pump : Base {{\n{methods}}};\n"),
    "csharp": ("  int Start{n}(int speed) {{\n    {work}\n    return {n};\n  }}\n", "class Pump : Base {{\n{methods}}}\n"),
    "go": ("func (p *Pump) Start{n}(speed int) int {{\n\t{work}\n\treturn {n}\n}}\n", "package p\n{methods}"),
    "java": ("  int start{n}(int speed) {{\n    {work}\n    return {n};\n  }}\n", "class Pump {{\n{methods}}}\n"),
    "javascript": ("  start{n}(speed) {{\n    {work}\n    return {n};\n  }}\n", "export class Pump {{\n{methods}}}\n"),
    "php": ("  function start{n}($speed) {{\n    {work}\n    return {n};\n  }}\n", "<?php\nclass Pump {{\n{methods}}}\n"),
    "python": ("    def start_{n}(self, speed):\n        {work}\n        return {n}\n\n", "class Pump(Base):\n{methods}"),
    "ruby": ("  def start_{n}(speed)\n    {work}\n    {n}\n  end\n", "class Pump < Base\n{methods}end\n"),
    "rust": ("  fn start_{n}(&self) -> i32 {{\n    {work}\n    {n}\n  }}\n", "impl Pump for Heron {{\n{methods}}}\n"),
    "tsx": ("  start{n}(speed: number) {{\n    {work}\n    return {n};\n  }}\n", "export class Pump {{\n{methods}}}\n"),
    "typescript": ("  go{n}(a: number) {{\n    {work}\n    return {n};\n  }}\n", "namespace N {{ class P {{\n{methods}}} }}\n"),
}  # fmt: skip


@pytest.fixture(scope="module")
def counter(models: Path) -> TokenCounter:
    return load_counter("bge-small-en-v1.5", IngestSettings(models=models))


def chunks_of(text: str, counter: TokenCounter, language: str = "python", tokens: int = 64) -> list[Chunk]:
    parsed = ParsedText(text=text, mime=f"text/x-{language}")
    return split("d", parsed, Chunking(strategy="code", tokens=tokens), counter)


@pytest.mark.parametrize("language", sorted(GRAMMARS))
def test_methods_stay_whole_in_every_language(counter: TokenCounter, language: str) -> None:
    method, around = METHODS[language]
    methods = [method.format(n=n, work="stop(1); " * 6) for n in range(12)]
    chunks = chunks_of(around.format(methods="".join(methods)), counter, language)
    assert len(chunks) > 4
    for method in methods:
        assert sum(method.strip() in chunk.text for chunk in chunks) == 1


def test_parts_of_a_long_function_carry_the_signatures_around_them(counter: TokenCounter) -> None:
    body = "".join(f"        self.step_{n} = open_valve({n}, 'north') + {n}\n" for n in range(30))
    start = f"    @cached\n    def start(self, speed: int) -> None:\n{body}\n"
    text = f"import os\n\n\nclass Pump(Base):\n    size = 3\n\n{start}    def stop(self):\n        pass\n"
    chunks = chunks_of(text, counter)
    assert chunks[0].text == "import os"
    assert (chunks[1].text, chunks[1].context) == ("class Pump(Base):\n    size = 3", None)
    assert chunks[2].text.startswith("@cached\n    def start(self, speed: int) -> None:\n        self.step_0")
    assert chunks[2].context == "class Pump(Base)"
    middle = [chunk for chunk in chunks[3:] if "step" in chunk.text]
    assert len(middle) > 5
    assert {chunk.context for chunk in middle} == {"class Pump(Base)\ndef start(self, speed: int) -> None"}
    assert all(chunk.text.startswith("self.step_") for chunk in middle)
    assert (chunks[-1].text, chunks[-1].context) == ("def stop(self):\n        pass", "class Pump(Base)")


def test_small_neighbours_share_a_chunk(counter: TokenCounter) -> None:
    text = "".join(f"def f{n}(x):\n    return x + {n}\n\n\n" for n in range(20))
    chunks = chunks_of(text, counter)
    assert 3 < len(chunks) < 10
    assert all(chunk.text.startswith("def f") for chunk in chunks)


def test_closing_brackets_do_not_stand_alone(counter: TokenCounter) -> None:
    for lines in range(20, 60):
        body = "".join(f"    speed += {n};\n" for n in range(lines))
        chunks = chunks_of(f"int start(int speed) {{\n{body}}}\n", counter, "c")
        assert all(any(map(str.isalnum, chunk.text)) for chunk in chunks)


def test_offsets_count_code_points_beyond_ascii(counter: TokenCounter) -> None:
    text = "".join(f"def f{n}():\n    return '水泵 😀 {n}'\n\n" for n in range(30))
    chunks = chunks_of(text, counter)
    assert all(chunk.text.startswith("def f") for chunk in chunks)
    assert all(text[chunk.start : chunk.end] == chunk.text for chunk in chunks)
    assert all(not text[before.end : after.start].strip() for before, after in pairwise(chunks))


@pytest.mark.parametrize("text", ["x = " + "(" * 5000, "x = " + "1 + " * 5000 + "1", "def f(:\n" * 500, "\x00\x01"])
def test_what_does_not_parse_is_cut_all_the_same(counter: TokenCounter, text: str) -> None:
    chunks = chunks_of(text, counter)
    assert "".join("".join(chunk.text.split()) for chunk in chunks) == "".join(text.split())


def test_other_files_are_cut_by_sentence(counter: TokenCounter) -> None:
    parsed = ParsedText(text="The pump stops. " * 60, mime="text/plain")
    by_code, by_sentence = (
        split("d", parsed, Chunking(strategy=strategy, tokens=64), counter) for strategy in ("code", "sentence")
    )
    assert by_code == by_sentence
