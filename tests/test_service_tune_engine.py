"""From a request to train to answers by the new adapter, on the real engine with the real model."""

import pytest
from service_fixtures import Service
from tune_worker import rows, worker


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_from_a_request_to_answers_with_the_new_adapter(line: Service) -> None:
    (line.home / "datasets").mkdir(exist_ok=True)
    (line.home / "datasets" / "pumps.jsonl").write_text(rows(8))
    body = {
        "recipe": "sft-lora",
        "data": "pumps",
        "settings": ["max_steps=2", "held_out=0", "r=4", "learning_rate=1e-3", "logging_steps=1"],
        "label": "pumps",
        "activate": True,
    }
    identity = line.http.post("/tune", json=body).json()["job_id"]
    with worker(line, "--once"):
        done = line.wait(identity, 900)
    assert done["state"] == "succeeded", done["error"]
    name = done["result"]["adapter"]
    try:
        assert done["result"]["live"]
        assert done["result"]["manifest"]["checked"]["passed"]
        shown = line.http.get(f"/adapters/{name}").json()
        assert (shown["live"], shown["checked"]) == (True, "passed")
        answer = line.answer()
        assert answer["adapter"] == name
        assert answer["answer"]
    finally:
        line.http.post("/adapters/rollback", json={"to": "base"})
