"""The mend of vLLM's CPU path for adapters (deploy/vllm/lora_cpu), on vLLM's own classes in the engine's environment."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PYTHON = Path(os.environ.get("GRAFT_VLLM_VENV") or CHECKOUT / ".venv-vllm") / "bin" / "python"
EXACT = 1e-4  # of numbers around 10, in float32

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def outcome(how: str) -> dict[str, Any]:
    """What lora_cpu_script.py prints, with the plugin taken from the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT / "deploy/vllm/lora_cpu"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(PYTHON), str(Path(__file__).with_name("lora_cpu_script.py")), how]
    ran = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def test_every_row_gets_its_own_adapter_or_none() -> None:
    found = outcome("mended")
    far = {
        (batch, method): difference
        for batch, methods in found["batches"].items()
        for method, difference in methods.items()
        if not difference < EXACT
    }
    assert far == {}
    assert found["said"] == ["INFO graft: LoRA rows are grouped by adapter on the CPU"]
    assert not found["untouched"]


def test_vllm_itself_mixes_them_up() -> None:
    """When this fails, vLLM has mended it, and the plugin can go."""
    found = outcome("installed")
    for batch in ("together", "interleaved", "base"):
        assert found["batches"][batch]["logits"] > 0.1
    assert found["batches"]["together"]["linear"] > 0.1
    assert found["batches"]["one"]["linear"] < EXACT
    assert found["untouched"]


def test_it_steps_aside_where_vllm_differs() -> None:
    found = outcome("changed")
    assert found["untouched"]
    (said,) = found["said"]
    assert said.startswith("WARNING graft: this vLLM's vllm.lora.ops.torch_ops:bgmv_shrink is not")
    assert found["batches"]["together"]["linear"] > 0.1  # vLLM's own code ran
