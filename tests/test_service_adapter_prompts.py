"""An adapter answers with the prompt that it was trained with, within the tokens that it was trained on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service_fixtures import IMPELLER, Service, WireEngine, count_tokens, write_lora

from service.prompt import CLOSED, CURRENT
from service.template import Template

SHORT = """
passages = 5
tokens = {tokens}

[all]
user = '''
{{% for note in passages %}}{{{{ note.text }}}}
{{% endfor %}}{{{{ question }}}}'''
"""


@pytest.fixture
def register(service: Service, tmp_path: Path) -> Iterator[Any]:
    """-> registers an adapter with a manifest; it is gone afterwards."""
    names = []

    def registered(seed: int, **manifest: Any) -> str:
        folder = write_lora(service.root / f"loras/{tmp_path.name}-{seed}", abs(hash((tmp_path, seed))))
        (folder / "manifest.json").write_text(json.dumps(manifest))
        reply = service.http.post("/adapters", json={"path": str(folder), "label": "own-prompt"})
        assert reply.status_code == 201, reply.text
        names.append(reply.json()["name"])
        return str(names[-1])

    yield registered
    service.http.put("/collections/default", json={"prompt": "auto"})
    for name in names:
        assert service.http.delete(f"/adapters/{name}").status_code == 204


def version(service: Service, **fields: Any) -> tuple[str, list[str]]:
    """-> the version that a question was asked with, and the notes on prompts."""
    answer = service.answer(**fields)
    notes = [note for note in answer["notes"] if "prompt" in note]
    return service.interaction(answer["interaction_id"])["prompt_version"], notes


def test_the_prompt_is_the_adapters_own_and_the_collections_goes_before_it(service: Service, register: Any) -> None:
    name = register(1, prompt_version="brief-1")
    assert version(service, adapter=name) == ("brief-1", [])
    assert version(service, adapter=None) == (CURRENT["cited"], [])
    assert version(service, adapter=register(2, prompt_version=None)) == (CURRENT["cited"], [])
    assert version(service, adapter=register(3, prompt_version=["brief-1"])) == (CURRENT["cited"], [])
    assert version(service, adapter=name, source="eval", without_passages=True) == (CLOSED, [])
    service.http.put("/collections/default", json={"prompt": "cited-1"})
    assert version(service, adapter=name) == ("cited-1", [])


@pytest.mark.parametrize("languages", [5, "en", [1], {"en": 1}])
def test_languages_that_are_none_are_not_there(service: Service, register: Any, languages: Any) -> None:
    answer = service.answer(adapter=register(1, languages=languages))
    assert answer["finish_reason"] == "stop"


def test_what_is_sent_is_that_prompt(service: Service, wire: WireEngine, register: Any) -> None:
    service.answer(adapter=register(1, prompt_version="brief-1"))
    assert "How often is filter F-2 changed?" in wire.last().body["messages"][0]["content"]


def test_a_prompt_that_is_not_here_is_told(service: Service, register: Any) -> None:
    name = register(1, prompt_version="mine-7")
    used, notes = version(service, adapter=name)
    assert used == CURRENT["cited"]
    (note,) = notes
    assert name in note
    assert "'mine-7'" in note
    assert repr(used) in note


def test_a_prompt_of_the_users_may_be_it(service: Service, register: Any) -> None:
    made = service.http.put("/prompts/trained", json={"template": SHORT.format(tokens=2000)}).json()["version"]
    assert version(service, adapter=register(1, prompt_version=made)) == (made, [])


def test_a_prompts_own_tokens_leave_passages_out_but_not_the_last(service: Service, wire: WireEngine) -> None:
    shown = {}
    for tokens in (4000, 100, 64):
        made = service.http.put("/prompts/short", json={"template": SHORT.format(tokens=tokens)}).json()["version"]
        service.http.put("/collections/default", json={"prompt": made})
        answer = service.answer(IMPELLER if tokens > 64 else IMPELLER + " word" * 64)
        shown[tokens] = service.interaction(answer["interaction_id"])["passages"]
        size = count_tokens(wire.last().body["messages"])
        assert size <= tokens or shown[tokens] == 1
    service.http.put("/collections/default", json={"prompt": "auto"})
    assert shown[4000] > shown[100] >= 1
    assert shown[64] == 1
    assert size > 64  # the passage stands, though no room is left for it


def test_a_template_without_tokens_is_written_as_before() -> None:
    without = Template.of(SHORT.format(tokens=64).replace("tokens = 64\n", ""))
    assert "tokens" not in json.loads(without.model_dump_json())
    assert json.loads(Template.of(SHORT.format(tokens=64)).model_dump_json())["tokens"] == 64
