"""Every recipe with a loss on answers, on the same small rows and the bundled model, for the same number of steps.

Each is `graft tune` in a process of its own, with its held-out loss before the first step and after the last. What is shown is
what a method costs and whether it learns, not how good it can become: learning rates are the recipes' own, and steps are few.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import tune_rows
from benchmarks.report import Options, Row, say, settings, shown, skipped
from finetune.base_folder import BUNDLED
from finetune.memory import estimate
from finetune.recipe import Recipe, read_recipe, recipe_of, recipes
from finetune.rows import read_rows
from finetune.runs import read_manifest
from finetune.schemas import Manifest
from finetune.train import require_stack
from ingest.errors import GraftError
from ingest.settings import CHECKOUT

STEPS, ROWS_A_STEP = 20, 4
QUICK_STEPS, QUICK_ROWS = 2, 8
BY_LOSS = ("sft", "dpo", "kto")  # the others are measured by what they learn for: tune_rlhf


class Tuned(NamedTuple):
    """`before`, `after`: held-out loss; `rate`: tokens a second while it trained; `estimated`: bytes of memory; `size`: bytes
    of the weights that it left.
    """

    manifest: Manifest
    before: float
    after: float
    rate: float
    estimated: int
    size: int


def run(options: Options) -> list[Row]:
    if lacking := why_not():
        return [skipped("recipes", lacking)]
    work = options.scratch / "tune-methods"
    rows = []
    for name in recipes():
        recipe = read_recipe(name)
        if recipe.method not in BY_LOSS:
            continue
        files = tune_rows.write(work / "rows", recipe.method)
        tuned = tune(recipe, files, work / name, options.quick)
        say(f"{name}: held-out loss {tuned.before:.3f} -> {tuned.after:.3f}, {tuned.rate:.0f} tokens/s")
        rows.append(row_of(name, tuned))
    return rows


def why_not() -> str | None:
    """What is missing to train here."""
    try:
        require_stack()
    except GraftError as error:
        return str(error)
    here = (settings().models / BUNDLED / "config.json").is_file()
    return None if here else f"{BUNDLED} is not in {settings().models} (make models)"


def row_of(name: str, tuned: Tuned) -> Row:
    manifest = tuned.manifest
    served = "served as it is" if manifest.servable else manifest.why_not or ""
    share = manifest.trainable_parameters / manifest.all_parameters
    memory = f"{manifest.peak_memory_bytes / 2**30:.2f} GiB (estimated {tuned.estimated / 2**30:.2f})"
    note = (
        f"trains {manifest.trainable_parameters:,} ({share:.2%}); {tuned.rate:,.0f} tokens/s; at most {memory}; leaves "
        f"{tuned.size / 1e6:,.1f} MB; {manifest.seconds:.0f} s; {served}"
    )
    row = shown(f"{name}, held-out loss", tuned.after, "", note)
    return row._replace(bar=f"< {tuned.before:.3g}", holds=tuned.after < tuned.before)


def tune(recipe: Recipe, files: tune_rows.Files, out: Path, quick: bool) -> Tuned:
    """Raises GraftError with what the command said."""
    batch = int(recipe.training["per_device_train_batch_size"])
    steps = QUICK_STEPS if quick else STEPS
    given = [f"max_steps={steps}", f"eval_steps={steps}", f"save_steps={steps}", "eval_on_start=true"]
    given += [f"gradient_accumulation_steps={ROWS_A_STEP // batch}", "patience=0", "save_only_model=true"]
    learn, held_out = (_first(file, QUICK_ROWS) for file in files) if quick else files
    command = ["tune", recipe.name, "--data", str(learn), "--eval-data", str(held_out), "--out", str(out), "--restart"]
    graft([*command, *(part for one in given for part in ("--set", one))], out.parent)
    manifest = read_manifest(out)
    log = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    held = [one for one in log if "eval_loss" in one]
    seconds = manifest.metrics["train_runtime"] - sum(one["eval_runtime"] for one in held)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    rate = manifest.metrics["tokens"] / seconds
    expected = estimate(recipe_of(manifest.recipe), settings().models / BUNDLED, read_rows(learn, recipe.method)).bytes
    return Tuned(manifest, held[0]["eval_loss"], held[-1]["eval_loss"], rate, expected, size)


def graft(arguments: Sequence[str], home: Path) -> int:
    """The command as a user gives it, with a home of the benchmark's. -> its largest resident memory in bytes, by the system.

    Raises GraftError.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FINETUNE_", "SERVICE_", "GRAFT_"))}
    environment = kept | {"GRAFT_HOME": str(home / "home"), "GRAFT_MODELS": str(settings().models)}
    command = [sys.executable, "-c", "from service.cli import main; main()", *arguments]
    return measured(command, environment | {"FINETUNE_TRACKERS": "[]"}, home / "graft.log")


def measured(command: Sequence[str], environment: dict[str, str], log: Path) -> int:
    """-> the process' largest resident memory in bytes. Raises GraftError."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as said:
        started = subprocess.Popen(
            command, cwd=CHECKOUT, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
        _, status, used = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)
    if started.returncode:
        raise GraftError(f"{command[1:4]} failed: {log.read_text()[-400:]}")
    return used.ru_maxrss * 1024


def _first(file: Path, rows: int) -> Path:
    part = file.with_name(f"quick-{file.name}")
    part.write_text("".join(file.read_text().splitlines(keepends=True)[:rows]))
    return part
