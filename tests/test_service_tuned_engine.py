"""What `graft tune` and `graft export` make, on the real engine, with a tiny model: each is computed there as PEFT does."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from service_fixtures import CHECKOUT, DOCUMENTS, Service, is_ready, running, until, write
from test_finetune_export import train
from tiny_model import tiny_model
from tuning import recipe, tune, write_rows

from finetune import check_prompts
from finetune.check import check_adapter
from finetune.export import Asked, export
from ingest.settings import IngestSettings
from service.prompt import CURRENT
from service.settings import ServiceSettings

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]
FEW = ("max_steps=4", "held_out=0", "learning_rate=1e-2", "lr_scheduler_type=constant", "warmup_steps=0")
PPO = ("max_steps=2", "batch_size=8", "mini_batch_size=4", "max_new_tokens=8", "max_kl=none", "learning_rate=1e-3")
SMALL = (*FEW, "per_device_train_batch_size=4", "gradient_accumulation_steps=1", "r=4")
EXACT = 64  # the rank of the tiny model's matrices


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tuned") / "base", heads=2)


@pytest.fixture(scope="module")
def line(base: Path) -> Iterator[Service]:
    """`graft up` with an engine of its own that serves the tiny model."""
    root = base.parent
    write(root / "docs", DOCUMENTS)
    settings = {
        "GRAFT_VLLM_VENV": os.environ.get("GRAFT_VLLM_VENV", str(CHECKOUT / ".venv-vllm")),
        "SERVICE_MODEL": str(base),
        "SERVICE_LLM_MODEL_FOLDER": str(base),
        "SERVICE_ENGINE_DTYPE": "float32",
        "SERVICE_MAX_MODEL_LEN": "2048",
    }
    with running(root / "home", root, "--ingest", "docs", **settings) as service:
        until(lambda: is_ready(service), 600, pause=0.5)
        yield service


def made(way: str, base: Path, folder: Path) -> Path:
    """-> what training by `way` left, as it may be served."""
    if way in {"sft-lora", "sft-qlora", "dpo-lora"}:
        rows = write_rows(folder / "rows.jsonl", way.partition("-")[0])
        tune(recipe(way, rows, base, *SMALL), folder / "out")
        return folder / "out"
    if way == "ppo":
        return rlhf(base, folder)
    trained = train(base, way, folder / "trained")
    exported = export(trained, folder / "out", base, Asked(kind="lora", rank=EXACT))
    assert exported.kept == pytest.approx(1, abs=1e-4)
    return folder / "out"


def rlhf(base: Path, folder: Path) -> Path:
    """-> what is left at the end of the line: a supervised run, a reward model from pairs, and answers that it rewards."""
    first, judge, last = (folder / name for name in ("sft", "reward", "out"))
    answers, pairs = (write_rows(folder / f"{method}.jsonl", method) for method in ("sft", "reward"))
    tune(recipe("sft-lora", answers, base, *SMALL), first)
    tune(recipe("reward", pairs, base, *SMALL), judge)
    rewarded = ("rewards={reward_model=1.0}", f'reward_model="{judge}"', f'parent="{first}"', "held_out=0")
    tune(recipe("ppo", answers, base, *PPO, *rewarded), last)
    return last


@pytest.mark.parametrize("way", ["sft-lora", "sft-qlora", "dpo-lora", "ppo", "ia3", "full"])
def test_the_engine_computes_what_was_trained_as_peft_does(way: str, line: Service, base: Path, tmp_path: Path) -> None:
    folder = made(way, base, tmp_path)
    url = str(line.http.get("/health/ready").json()["dependencies"]["engine"]["detail"])
    prompts = list(check_prompts.prompts(CURRENT["brief"]))[5::9]
    settings, home = ServiceSettings(adapter_folder=line.home / "adapters"), IngestSettings(home=line.home)
    found = check_adapter(folder, url=url, settings=settings, ingest=home, prompts=prompts, threads=1)
    assert found.passed, found.why_not
    assert found.dtype == "float32"
    assert found.changed == found.prompts == 3
    assert max(found.difference, found.base_difference) < 0.001
