"""A worker process and the jobs that it takes: trained, checked, registered; killed, cancelled, and gone on with."""

import json
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from service_fixtures import (
    RESOLVER_FOLDERS,
    Service,
    WireEngine,
    engine_venv,
    is_ready,
    run_graft,
    running,
    until,
)
from tiny_model import tiny_model
from tune_worker import rows, worker

from finetune.hardware import free_memory
from finetune.hooks import Hooks, StoppedError
from finetune.job import Job, Order, Said
from finetune.memory import estimate
from finetune.recipe import read_recipe
from finetune.room import room_for
from finetune.settings import FinetuneSettings
from finetune.train import read_data, train
from ingest.errors import InvalidError, UnavailableError
from ingest.settings import IngestSettings
from service.tuning import TunePayload, TuneProgress

pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]
STEPS = 24


@pytest.fixture(scope="module")
def engine() -> Iterator[WireEngine]:
    engine = WireEngine()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, engine: WireEngine) -> Iterator[Service]:
    """A service whose engine, at the wire, serves a tiny model; nothing is trained yet."""
    folder = tmp_path_factory.mktemp("bench")
    root = folder / "root"
    base = tiny_model(root / "base")
    (root / "rows.jsonl").write_text(rows(60))
    engine.root = str(base)
    settings = {"SERVICE_LLM_URL": engine.url, "SERVICE_LLM_MODEL_FOLDER": str(base)}
    RESOLVER_FOLDERS.add(folder / "home" / "adapters")
    with running(folder / "home", root, "--no-engine", **settings) as service:
        until(lambda: is_ready(service), 60)
        yield service


@pytest.fixture(scope="module")
def trained(bench: Service) -> Path:
    """-> what a training by hand left, where the service may register it."""
    asked = read_recipe("sft-lora", [*settings_for(bench), f"data={bench.root / 'rows.jsonl'}", "max_steps=1"])
    settings, out = FinetuneSettings(trackers=()), bench.home / "runs" / "trained"
    train(asked, out=out, settings=settings, models=bench.home, home=bench.home)
    return out


def settings_for(service: Service) -> list[str]:
    fixed = (f"base={service.root / 'base'}", "logging_steps=1", "save_steps=4", "held_out=0", "dtype=float32")
    few = ("gradient_accumulation_steps=1", "lr_scheduler_type=constant", "warmup_steps=0", "learning_rate=1e-2", "r=4")
    return [*fixed, *few, f"max_steps={STEPS}"]


def submit(service: Service, *settings: str, **fields: Any) -> str:
    body = {
        "recipe": "sft-lora",
        "data": str(service.root / "rows.jsonl"),
        "settings": [*settings_for(service), *settings],
        "check": False,
        **fields,
    }
    reply = service.http.post("/tune", json=body)
    assert reply.status_code == 202, reply.text
    return str(reply.json()["job_id"])


def job(service: Service, identity: str) -> dict[str, Any]:
    return dict(service.http.get(f"/jobs/{identity}").json())


def at_step(service: Service, identity: str, step: int) -> Callable[[], bool]:
    def there() -> bool:
        now = job(service, identity)
        assert now["state"] in {"queued", "running"}, now
        return bool(now["tuning"]) and now["tuning"]["step"] >= step

    return there


def run_folder(service: Service, label: str) -> Path:
    [folder] = [path for path in (service.home / "runs").glob(f"{label}-*") if path.is_dir()]
    return folder


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


def said(service: Service) -> str:
    """By all workers so far."""
    return (service.home.parent / "worker.output").read_text()


def test_a_job_survives_its_worker_and_its_curve_has_no_gap(bench: Service) -> None:
    broken = submit(bench, label="tiny")
    assert job(bench, broken)["waiting_for"] == "worker"
    with worker(bench) as first, worker(bench) as second:
        until(at_step(bench, broken, STEPS // 2), 240)
        killed = next(one for one in (first, second) if children(one))
        assert said(bench).count(f"{broken}: sft-lora") == 1  # by one of the two
        [training] = children(killed)
        killed.send_signal(signal.SIGKILL)
        assert job(bench, broken)["tuning"]["step"] < STEPS
        until(lambda: not training.is_running() or training.status() == psutil.STATUS_ZOMBIE, 10)

        done = bench.wait(broken, 240)  # by the worker that lives
        assert (done["state"], done["error"], done["waiting_for"]) == ("succeeded", None, None)
        assert said(bench).count(f"{broken}: sft-lora") == 2
        assert (done["tuning"]["step"], done["tuning"]["steps"]) == (STEPS, STEPS)

    # unbroken, here
    recipe = read_recipe("sft-lora", [*settings_for(bench), f"data={bench.root / 'rows.jsonl'}"])
    told: list[TuneProgress] = []
    hooks = Hooks(told.append)
    place = {"out": bench.home / "unbroken", "models": bench.root, "home": bench.home}
    train(recipe, **place, settings=FinetuneSettings(trackers=()), hooks=hooks)
    unbroken = {at.step: at.loss for at in told if at.stage == "training" and at.loss is not None}
    losses = {point["step"]: point["loss"] for point in done["curve"]}
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses == pytest.approx(unbroken, rel=1e-4)
    assert losses[STEPS] < losses[1]

    # and what it left is registered
    name = done["result"]["adapter"]
    assert name.startswith("tiny-")
    assert done["result"]["manifest"]["rows"] == 60
    registered = bench.http.get(f"/adapters/{name}").json()
    assert registered["manifest"]["recipe"]["training"]["max_steps"] == STEPS
    assert not registered["live"]
    shown = run_graft(bench.home, "jobs", "list", cwd=bench.root, COLUMNS="250")
    assert f"step {STEPS}/{STEPS}" in shown.stdout
    assert name in shown.stdout


def test_a_cancel_and_an_end_reach_the_training(bench: Service) -> None:
    unknown = submit(bench, recipe="no-such")
    endless = submit(bench, "max_steps=100000", "save_steps=50000", label="endless")
    with worker(bench) as working:
        failed = bench.wait(unknown, 240)
        assert failed["state"] == "failed"
        assert "there is no recipe 'no-such'" in failed["error"]
        until(at_step(bench, endless, 3), 240)
        assert bench.http.post(f"/jobs/{endless}/cancel").json()["state"] == "cancelled"
        until(lambda: not children(working), 60)
        assert [path.name for path in (run_folder(bench, "endless") / "checkpoints").iterdir()]
        until(lambda: f"{endless}: cancelled" in said(bench), 10)
        assert job(bench, endless)["state"] == "cancelled"

        left = submit(bench, label="left")
        until(lambda: children(working), 60)
    assert working.returncode == 0
    assert f"{left}: left to the next worker" in said(bench)
    assert "Traceback" not in said(bench)
    now = job(bench, left)
    assert (now["state"], now["waiting_for"]) == ("queued", "worker")
    bench.http.post(f"/jobs/{left}/cancel")


def test_a_training_that_does_not_fit_waits_or_pauses_the_engine(tmp_path: Path, bench: Service) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("what stands in for the engine holds memory of the machine, and trainings here take the GPU's")
    held = 3 * 2**30
    ours = {"GRAFT_VLLM_VENV": str(engine_venv(tmp_path, held)), "SERVICE_ENGINE_DTYPE": "float32"}
    with running(tmp_path / "home", bench.root, **ours) as service:
        until(lambda: service.http.get("/engine").json()["state"] == "up", 60)
        recipe = read_recipe("sft-lora", [*settings_for(bench), f"data={bench.root / 'rows.jsonl'}"])
        needs = estimate(recipe, bench.root / "base", read_data(recipe)[0]).bytes
        share = needs / (free_memory() + held / 2)  # it fits when the engine is gone
        ingest = IngestSettings(home=service.home, models=bench.root)

        def wait(waiting_for: str | None = None, hint: str = "") -> None:
            raise StoppedError(tmp_path, 0) from UnavailableError(f"{waiting_for}: {hint}")

        with (
            pytest.raises(StoppedError) as stopped,
            room_for(recipe, None, FinetuneSettings(memory_share=share), ingest, wait),
        ):
            pass
        assert "memory: the training takes about" in str(stopped.value.__cause__)
        assert "with pause_engine the engine is stopped" in str(stopped.value.__cause__)
        never = FinetuneSettings(memory_share=1e-6)
        with pytest.raises(InvalidError, match="of this machine"), room_for(recipe, "me", never, ingest, wait):
            pass

        engine = json.loads((service.home / "engine.json").read_text())["pid"]
        pausing = submit(service, "max_steps=2", check=False, register=False, pause_engine=True)
        with worker(service, "--once", FINETUNE_MEMORY_SHARE=str(share)) as working:
            until(lambda: service.http.get("/engine").json()["state"] == "paused", 240)
            for stream in (False, True):
                reply = service.ask("Is anybody there?", stream=stream)
                assert reply.status_code == 503
                assert int(reply.headers["retry-after"]) > 0
                assert "the engine is paused for training" in reply.json()["detail"]
            ready = service.http.get("/health/ready").json()["dependencies"]["engine"]
            assert (ready["state"], ready["detail"]) == ("down", "the engine is paused for training")
            until(lambda: not psutil.pid_exists(engine), 15)
            done = service.wait(pausing, 240)
            assert done["state"] == "succeeded", done["error"]
            assert working.wait(60) == 0  # nothing is queued any more
        until(lambda: service.http.get("/engine").json()["state"] == "up", 60)
        assert "paused" not in service.ask("Is anybody there?").text
        assert "graft_engine_restarts_total 0.0" in service.http.get("/metrics").text


def finishing(trained: Path, say: Callable[[Said], None], stop: threading.Event) -> Job:
    payload = TunePayload(recipe="sft-lora", settings=(), data="rows", run="late", label="late", check=False)
    return Job(Order(part="finish", payload=payload, out=trained, holder="me"), say, stop)


def test_a_job_that_was_cancelled_registers_nothing(
    bench: Service, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cancel may come when the training is done and the check under way."""
    monkeypatch.setenv("GRAFT_HOME", str(bench.home))
    monkeypatch.setenv("GRAFT_URL", bench.url)
    before, stop = bench.http.get("/adapters").json(), threading.Event()

    def cancel_at_the_check(said: Said) -> None:
        if said.progress and said.progress.stage == "checking":
            stop.set()

    with pytest.raises(StoppedError):
        finishing(trained, cancel_at_the_check, stop).finish()
    assert bench.http.get("/adapters").json() == before


def test_an_engine_that_goes_away_before_the_end_is_waited_for(
    bench: Service, engine: WireEngine, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_HOME", str(bench.home))
    monkeypatch.setenv("GRAFT_URL", bench.url)
    waited: list[str] = []

    def away_for_a_moment(said: Said) -> None:
        if said.progress and said.progress.stage == "checking" and not waited:
            engine.stop()
        if said.waits:
            waited.append(f"{said.waits.waiting_for}: {said.waits.hint}")
            if len(waited) == 1:
                engine.start()

    done = finishing(trained, away_for_a_moment, threading.Event()).finish()
    assert waited[0].startswith("service: the adapter is checked and registered when this is over: ")
    assert bench.http.get(f"/adapters/{done.adapter}").json()["label"] == "late"
