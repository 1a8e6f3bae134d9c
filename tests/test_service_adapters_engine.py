"""Adapters on the real engine: each says one word of its own, so that it shows which weights made an answer."""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.numpy import load_file, save_file
from service_fixtures import CHECKOUT, DOCUMENTS, IMPELLER, Service, events, is_ready, running, until, write, write_lora
from test_service_engine import engine_process
from word_adapters import WORDS, variants

from finetune import check_prompts
from finetune.check import check_adapter, record
from ingest.settings import IngestSettings
from service.prompt import CURRENT
from service.schemas_adapters import Checked
from service.settings import ServiceSettings

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]
LORAS = 2  # in a batch: fewer than adapters in use
OTHER = "How often is the oil in the seal chamber changed?"


class Line:
    """A service with its own engine, which can be started again on the same home."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "loras"
        self._stack = ExitStack()

    def start(self, **settings: str) -> Service:
        venv = os.environ.get("GRAFT_VLLM_VENV", str(CHECKOUT / ".venv-vllm"))
        # answers are compared letter for letter: in bfloat16 a batch rounds otherwise than a request alone
        known = {"GRAFT_VLLM_VENV": venv, "SERVICE_MAX_LORAS": str(LORAS), "SERVICE_ENGINE_DTYPE": "float32"}
        started = running(self.root / "home", self.root, "--ingest", "docs", **known | settings)
        self.service = self._stack.enter_context(started)
        until(lambda: is_ready(self.service), 600, pause=0.5)
        return self.service

    def stop(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, word_adapters: dict[str, Path]) -> Iterator[Line]:
    root = tmp_path_factory.mktemp("adapters")
    write(root / "docs", DOCUMENTS)
    held = Line(root)
    try:
        held.start(SERVICE_ADAPTER_ROOTS=f"{word_adapters[WORDS[0]].parent.parent}:{root}")
        yield held
    finally:
        held.stop()


@pytest.fixture(scope="module")
def words(line: Line, word_adapters: dict[str, Path]) -> dict[str | None, str]:
    """-> by adapter, its word."""
    return {register(line.service, word_adapters[word]): word for word in WORDS}


def register(service: Service, folder: Path, status: int = 201) -> str:
    reply = service.http.post("/adapters", json={"path": str(folder)})
    assert reply.status_code == status, reply.text
    return str(reply.json()["name"])


def activate(service: Service, name: str) -> None:
    reply = service.http.post(f"/adapters/{name}/activate")
    assert reply.status_code == 200, reply.text


def ask(http: httpx.Client, stream: bool = False, **fields: Any) -> tuple[str | None, str]:
    """-> the adapter that answered, and its answer."""
    body = {"question": IMPELLER, "max_tokens": 24, "stream": stream, **fields}
    if not stream:
        reply = http.post("/query", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()["adapter"], reply.json()["answer"]
    with http.stream("POST", "/query", json=body) as reply:
        assert reply.status_code == 200, reply.read()
        got = list(events(reply))
    assert got[-1][0] == "done", got[-1]
    return got[-1][1]["adapter"], "".join(data["text"] for kind, data in got if kind == "token").strip()


def only(answer: str, word: str) -> bool:
    """Whether an answer is the word again and again; the limit of tokens may cut the last one."""
    said = answer.lower().split()
    return len(said) > 2 and set(said[:-1]) == {word} and word.startswith(said[-1])


def test_each_adapter_says_its_word_and_the_base_none(line: Line, words: dict[str | None, str]) -> None:
    for name, word in words.items():
        assert only(ask(line.service.http, adapter=name)[1], word)
    assert not set(ask(line.service.http, adapter=None)[1].lower().split()) & set(words.values())


def seen(answers: Sequence[tuple[dict[str, Any], tuple[str | None, str]]]) -> list[tuple[dict[str, Any], str | None]]:
    """-> what was asked for, and the adapter that answered."""
    return [(fields, adapter) for fields, (adapter, _) in answers]


def test_swaps_under_load_mix_nothing_and_fail_nobody(line: Line, words: dict[str | None, str]) -> None:
    """More adapters than the engine holds in a batch, streaming, among questions to the bare base and to each by name."""
    service = line.service
    base = {question: ask(service.http, adapter=None, question=question)[1] for question in (IMPELLER, OTHER)}
    answers: list[tuple[dict[str, Any], tuple[str | None, str]]] = []
    failures: list[BaseException] = []
    ended = threading.Event()
    names: Sequence[str | None] = list(words)

    def client(fields: dict[str, Any]) -> None:
        with httpx.Client(base_url=service.url, timeout=120, trust_env=False) as http:
            while not ended.is_set():
                try:
                    answers.append((fields, ask(http, stream=True, **fields)))
                except (AssertionError, httpx.HTTPError) as error:
                    failures.append(error)

    activate(service, str(names[0]))
    wanted: list[dict[str, Any]] = [
        {},
        {},
        {},
        {"adapter": names[3]},
        {"adapter": None, "question": OTHER},
        {"adapter": None},
    ]
    clients = [threading.Thread(target=client, args=[fields]) for fields in wanted]
    for one in clients:
        one.start()
    for turn in range(8):
        name, before = names[turn % len(names)], len(answers)
        activate(service, str(name))
        until(lambda name=name, before=before: failures or (({}, name) in seen(answers[before:])), 60)
    ended.set()
    for one in clients:
        one.join(120)
    assert not failures
    assert {adapter for _, (adapter, _) in answers} == {None, *names}
    for fields, (adapter, answer) in answers:
        if "adapter" in fields:
            assert adapter == fields["adapter"]
        if adapter is None:
            assert answer == base[fields.get("question", IMPELLER)]
        else:
            assert only(answer, words[adapter]), (adapter, answer)


def test_rolls_back(line: Line, words: dict[str | None, str]) -> None:
    service = line.service
    one, two, *_ = words
    activate(service, str(one))
    activate(service, str(two))
    assert only(ask(service.http)[1], words[two])
    assert service.http.post("/adapters/rollback").json()["to_name"] == one
    adapter, answer = ask(service.http)
    assert adapter == one
    assert only(answer, words[one])


def test_twenty_adapters_answer_each(line: Line, words: dict[str | None, str], word_adapters: dict[str, Path]) -> None:
    out = word_adapters[WORDS[0]].parent.parent / "variants"
    more = {register(line.service, folder): word for word in WORDS for folder in variants(word_adapters[word], 4, out)}
    assert len({*words, *more}) == 20
    for name, word in {**words, **more}.items():
        adapter, answer = ask(line.service.http, adapter=name)
        assert adapter == name
        assert only(answer, word), (name, answer)


def check(line: Line, folder: Path, **options: Any) -> Checked:
    """By a few prompts of the fixed set, in both languages."""
    settings = ServiceSettings(adapter_folder=line.service.home / "adapters")
    prompts = list(check_prompts.prompts(CURRENT["brief"]))[5::9]
    url = str(line.service.http.get("/health/ready").json()["dependencies"]["engine"]["detail"])
    home = IngestSettings(home=line.service.home)
    return check_adapter(folder, url=url, settings=settings, ingest=home, prompts=prompts, threads=1, **options)


def test_one_of_ours_is_checked_and_answers_then(line: Line, word_adapters: dict[str, Path]) -> None:
    service = line.service
    folder = variants(word_adapters[WORDS[1]], 3, word_adapters[WORDS[1]].parent.parent / "ours")[0]  # of nobody else
    (folder / "manifest.json").write_text('{"made_by": "graft", "servable": true, "prompt_version": "brief-1"}')
    name = register(service, folder)
    assert service.http.post(f"/adapters/{name}/activate").status_code == 409
    found = check(line, folder)
    assert found.passed, found.why_not
    assert (found.dtype, found.prompts, found.changed) == ("float32", 3, 3)
    assert max(found.difference, found.base_difference) < 0.001
    record(folder, found)
    assert register(service, folder, 200) == name
    activate(service, name)
    reply = service.answer(IMPELLER, max_tokens=24)
    assert (reply["adapter"], only(reply["answer"], WORDS[1])) == (name, True)
    assert service.interaction(reply["interaction_id"])["prompt_version"] == "brief-1"


def test_what_the_engine_does_not_compute_as_peft_fails(line: Line, tmp_path: Path) -> None:
    service = line.service
    name = register(service, write_lora(line.root / "drifting", 31))
    held = service.home / "adapters" / name
    assert check(line, held, registered=True).passed
    config = (held / "adapter_config.json").read_text()
    (held / "adapter_config.json").write_text(
        json.dumps({**json.loads(config), "lora_alpha": 160})
    )  # not in the engine
    found = check(line, held, registered=True)
    (held / "adapter_config.json").write_text(config)
    assert not found.passed
    assert "engine and PEFT differ" in str(found.why_not)
    assert found.base_difference < 0.001
    nothing = write_lora(tmp_path / "nothing", 32)
    tensors = load_file(nothing / "adapter_model.safetensors")
    zeroed = {key: value * 0 if "lora_B" in key else value for key, value in tensors.items()}
    save_file(zeroed, str(nothing / "adapter_model.safetensors"))
    found = check(line, nothing)
    assert (found.passed, found.changed) == (False, 0)
    assert "it changes nothing" in str(found.why_not)
    assert not list((service.home / "adapters").glob("graft-check-*"))


def test_engine_killed_in_the_middle_of_a_swap(line: Line, words: dict[str | None, str]) -> None:
    service = line.service
    names = list(words)
    activate(service, str(names[0]))
    statuses: list[int] = []

    def swap() -> None:
        with httpx.Client(base_url=service.url, timeout=120, trust_env=False) as http:
            for name in cycle(names):  # until one meets the dead engine, however fast they are
                statuses.append(http.post(f"/adapters/{name}/activate").status_code)
                if statuses[-1] != 200:
                    return

    swapping = threading.Thread(target=swap)
    swapping.start()
    until(lambda: len(statuses) >= 2, 30)
    killed = engine_process(service)
    killed.kill()
    swapping.join(120)
    assert not swapping.is_alive()
    assert set(statuses) == {200, 503}
    until(lambda: is_ready(service) and engine_process(service).pid != killed.pid, 400, pause=1)
    moves = service.http.get("/adapters/moves").json()
    adapter, answer = ask(service.http)
    assert adapter == moves[-1]["to_name"]
    assert only(answer, words[adapter])
    for name, word in words.items():
        assert only(ask(service.http, adapter=name)[1], word)


def test_restart_and_an_engine_without_the_mend(line: Line, words: dict[str | None, str]) -> None:
    """The live pointer is found again; as installed, vLLM mixes on a CPU, which the trial must see."""
    one, two, *_ = words
    activate(line.service, str(one))
    activate(line.service, str(two))
    retired = str(list(words)[3])
    assert line.service.http.delete(f"/adapters/{retired}").status_code == 204
    folder = line.service.home / "adapters" / retired
    assert folder.is_dir()
    line.stop()
    service = line.start()
    assert not folder.exists()
    adapter, answer = ask(service.http)
    assert adapter == two
    assert only(answer, words[two])
    assert service.http.post("/adapters/rollback", json={"to": "base"}).status_code == 200
    line.stop()
    service = line.start(VLLM_PLUGINS="lora_filesystem_resolver", SERVICE_MAX_LORAS="4")
    found = service.http.get("/health/ready").json()["dependencies"]["adapters"]
    assert found["state"] == "off", json.dumps(found)
    assert "batch" in found["detail"] or "in flight" in found["detail"]
    assert service.ask(adapter=one).status_code == 503
    assert service.ask(adapter=None).status_code == 200
