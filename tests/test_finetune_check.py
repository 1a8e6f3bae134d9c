"""An adapter compared in an engine with PEFT: what passes, each way to fail, what is left behind, and the command.

The engine here is one that computes at the wire (`torch_engine`); vLLM itself is asked in test_service_adapters_engine.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from service_fixtures import is_ready, run_graft, running, until, write_lora_folder
from tiny_model import tiny_model
from torch_engine import TorchEngine

from finetune import check_prompts
from finetune.check import check_adapter, record
from ingest.errors import InvalidError, UnavailableError
from ingest.settings import IngestSettings
from service.base_model import read_base
from service.preflight import AdapterRefusedError, digest_of
from service.prompt import CURRENT
from service.schemas_adapters import Checked
from service.settings import ServiceSettings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def computing(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchEngine]:
    engine = TorchEngine(base, tmp_path_factory.mktemp("home") / "adapters")
    yield engine
    engine.close()


@pytest.fixture
def engine(computing: TorchEngine) -> TorchEngine:
    computing.reset()
    computing.asked.clear()
    return computing


def lora(folder: Path, strength: float = 1.0, **manifest: Any) -> Path:
    """A LoRA for the tiny model, as `graft tune` leaves one; `strength`: of its second matrices."""
    random = np.random.default_rng(3)
    tensors = {}
    for layer in (0, 1):
        for name, out in (("q_proj", 64), ("v_proj", 32)):
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{module}.lora_A.weight"] = random.standard_normal((4, 64), np.float32)
            tensors[f"{module}.lora_B.weight"] = random.standard_normal((out, 4), np.float32) * np.float32(strength)
    write_lora_folder(folder, tensors, r=4)
    (folder / "manifest.json").write_text(json.dumps({"made_by": "graft", "servable": True} | manifest))
    return folder


def checked(engine: TorchEngine, folder: Path, **options: Any) -> Checked:
    settings = ServiceSettings(adapter_folder=engine.folder)
    prompts = list(check_prompts.prompts(CURRENT["brief"]))[::6]
    known: dict[str, Any] = {"prompts": prompts, "threads": 1} | options
    return check_adapter(folder, url=engine.url, settings=settings, ingest=IngestSettings(), **known)


def test_the_fixed_set_asks_in_both_languages() -> None:
    asked = list(check_prompts.prompts(CURRENT["brief"]))
    assert len(asked) == 24
    chinese = [one for one in asked if any("一" <= letter <= "鿿" for letter in one[-1]["content"])]
    assert 8 <= len(chinese) <= 16
    assert all(one[-1]["role"] == "user" for one in asked)


def test_one_that_is_served_as_it_was_trained_passes(engine: TorchEngine, tmp_path: Path) -> None:
    said: list[str] = []
    engine.hangs_up = True
    folder = lora(tmp_path / "lora")
    found = checked(engine, folder, tell=said.append)
    assert found.passed
    assert found.why_not is None
    assert (found.dtype, found.bound, found.tokens_equal) == ("float32", 0.02, True)
    assert found.prompts == found.changed == 4
    assert max(found.difference, found.base_difference) < 1e-4
    assert found.engine == f"vLLM 0.0, {engine.root}"
    assert found.digest == digest_of(folder, read_base(str(engine.root), None))
    assert len(said) == 2
    assert any(name.startswith(f"graft-check-{found.digest[:8]}-") for name in engine.asked)
    assert not engine.names
    assert not list(engine.folder.iterdir())


@pytest.mark.parametrize(
    ("wrong", "strength", "said"),
    [
        ({"weight": 1.5}, 1.0, "engine and PEFT differ"),
        ({"weight": 0.0}, 1.0, "the engine answers the same with and without the adapter"),
        ({}, 0.0, "the engine answers the same with and without the adapter"),
        ({"base_noise": 1.0}, 1.0, "different bases"),
        ({"lays_out": " {}"}, 1.0, "other tokens"),
    ],
    ids=["weighed otherwise", "not applied", "changes nothing", "other base", "other tokens"],
)
def test_what_is_served_otherwise_fails(
    engine: TorchEngine, tmp_path: Path, wrong: dict[str, Any], strength: float, said: str
) -> None:
    for option, value in wrong.items():
        setattr(engine, option, value)
    found = checked(engine, lora(tmp_path / "lora", strength))
    assert not found.passed
    assert said in str(found.why_not)
    assert (found.changed == 0) == ("same" in said)
    assert found.tokens_equal == ("tokens" not in said)


def test_a_registered_one_is_asked_by_its_name_and_stays(engine: TorchEngine, tmp_path: Path) -> None:
    folder = lora(engine.folder / "mine-0123abcd")
    found = checked(engine, folder, registered=True)
    assert found.passed
    assert engine.asked == {"tiny", folder.name}
    assert engine.names == {folder.name}
    assert folder.is_dir()


def test_nothing_that_cannot_be_served_reaches_the_engine(engine: TorchEngine, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefusedError, match="merge it"):
        checked(engine, lora(tmp_path / "dora", servable=False, why_not="DoRA: merge it"))
    with pytest.raises(InvalidError, match="'somebody/else'"):
        checked(engine, lora(tmp_path / "other", base="somebody/else"))
    with pytest.raises(UnavailableError):
        checked(engine, tmp_path / "gone", registered=True)
    assert engine.asked <= {"tiny"}
    assert not [one for one in engine.folder.iterdir() if one.name.startswith((".staging", "graft-check"))]


def test_the_manifest_keeps_the_check(tmp_path: Path) -> None:
    folder = lora(tmp_path / "lora", rows=7)
    found = Checked(
        at="2026-11-26T00:00:00Z", passed=True, digest="0" * 64, dtype="float32", difference=0, bound=0.02,
        base_difference=0, tokens_equal=True, prompts=4, changed=4, engine="vLLM",
    )  # fmt: skip
    assert record(folder, found)
    held = json.loads((folder / "manifest.json").read_text())
    assert (held["rows"], Checked.model_validate(held["checked"])) == (7, found)
    (folder / "manifest.json").unlink()
    assert not record(folder, found)  # another tool's folder stays as it is
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_command(engine: TorchEngine, tmp_path: Path) -> None:
    """What it finds stands in the folder and in the registry, and one that has failed is not activated any more."""
    settings = {"SERVICE_LLM_URL": engine.url, "SERVICE_MAX_LORAS": "1", "OMP_NUM_THREADS": "1"}
    settings |= {"SERVICE_ADAPTER_FOLDER": str(engine.folder), "SERVICE_ADAPTER_ROOTS": str(tmp_path)}
    folder = lora(tmp_path / "lora")
    with running(tmp_path / "home", tmp_path, "--no-engine", **settings) as service:
        until(lambda: is_ready(service), 120)
        name = service.http.post("/adapters", json={"path": str(folder)}).json()["name"]
        assert service.http.post(f"/adapters/{name}/activate").status_code == 409
        done = run_graft(service.home, "check", "lora", "--json", "-", cwd=tmp_path, **settings)
        assert done.returncode == 0, done.stderr
        found = Checked.model_validate_json(done.stdout)
        assert (found.passed, found.prompts) == (True, 24)
        assert json.loads((folder / "manifest.json").read_text())["checked"]["passed"]
        assert service.http.get(f"/adapters/{name}").json()["checked"] == "passed"
        assert service.http.post(f"/adapters/{name}/activate").status_code == 200
        engine.weight = 1.5
        again = run_graft(service.home, "check", name, cwd=tmp_path, **settings)
        assert again.returncode == 1, again.stderr
        assert "failed" in again.stdout
        assert "engine and PEFT differ" in again.stdout
        assert "failed its check" in service.http.post(f"/adapters/{name}/activate").json()["detail"]
        unknown = run_graft(service.home, "check", "nobody", cwd=tmp_path, **settings)
        assert (unknown.returncode, "'nobody'" in unknown.stderr) == (1, True)
        (tmp_path / "empty").mkdir()
        empty = run_graft(service.home, "check", "./empty", cwd=tmp_path, **settings)
        assert (empty.returncode, "adapter_config.json" in empty.stderr) == (1, True)
