"""`graft tune sft-lora` beside a plain TRL script with the same settings, rows and model: tokens a second and memory.

Each run is a process of its own; the two take turns. Tokens are those that are not padding, seconds the trainer's own, from the
first step to the last; memory is the process' largest, as the system counts it, with libraries and model. The plain script
also learns the newline that the chat template puts behind the end of a turn, which is easy: its losses are lower for that.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import tune_rows
from benchmarks.report import Options, Row, at_least, at_most, median, say, settings, shown, skipped, spread
from benchmarks.tune_methods import graft, measured, why_not
from finetune.base_folder import BUNDLED
from finetune.recipe import read_recipe
from finetune.runs import read_manifest
from ingest.settings import CHECKOUT

STEPS, ROWS_A_STEP, RUNS = 10, 8, 5
SAME = ("learning_rate", "lr_scheduler_type", "warmup_steps", "max_length", "packing", "seed")
MORE = 1.1  # times the plain script's memory, at most


class Trained(NamedTuple):
    """`rate`: tokens a second; `memory`: bytes; `losses`: of each step."""

    rate: float
    memory: int
    losses: list[float]


def run(options: Options) -> list[Row]:
    if lacking := why_not():
        return [skipped("graft tune / plain TRL", lacking)]
    model = settings().models / BUNDLED
    work = options.scratch / "tune-speed"
    rows = tune_rows.write(work / "rows", "sft").learn
    steps, runs = (2, 1) if options.quick else (STEPS, RUNS)
    given = {"max_steps": steps, "per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS_A_STEP}
    if options.quick:
        given["gradient_accumulation_steps"] = 1
    ours: list[Trained] = []
    theirs: list[Trained] = []
    dtype = ""
    for n in range(runs):
        trained, dtype = tuned(rows, work, given)
        ours.append(trained)
        theirs.append(plain(model, rows, work, given, dtype))
        say(f"{n + 1} of {runs}: ours {ours[-1].rate:.0f} tokens/s, plain TRL {theirs[-1].rate:.0f}")
    return _rows(ours, theirs, dtype)


def tuned(rows: Path, work: Path, given: dict[str, Any]) -> tuple[Trained, str]:
    """-> what `graft tune` did, and the data type that it chose."""
    out = work / "graft"
    arguments = ["tune", "sft-lora", "--data", str(rows), "--out", str(out), "--restart"]
    arguments += ["--set", "held_out=0", "--set", "save_strategy=no"]
    for key, value in given.items():
        arguments += ["--set", f"{key}={value}"]
    memory = graft(arguments, work)
    manifest = read_manifest(out)
    log = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    rate = manifest.metrics["tokens"] / manifest.metrics["train_runtime"]
    return Trained(rate, memory, [one["loss"] for one in log if "loss" in one]), str(manifest.hardware["dtype"])


def plain(model: Path, rows: Path, work: Path, given: dict[str, Any], dtype: str) -> Trained:
    recipe = read_recipe("sft-lora")
    arguments = {key: recipe.training[key] for key in SAME} | {"data_seed": recipe.seed} | given  # in the same order
    asked = json.dumps({"dtype": dtype, "arguments": arguments})
    command = [sys.executable, str(CHECKOUT / "benchmarks/tune_plain.py"), str(model), str(rows), str(work / "plain")]
    log = work / "plain.log"
    memory = measured([*command, asked], os.environ | {"HF_HUB_OFFLINE": "1"}, log)
    found = json.loads(log.read_text().splitlines()[-1])
    return Trained(found["tokens"] / found["seconds"], memory, found["losses"])


def _rows(ours: list[Trained], theirs: list[Trained], dtype: str) -> list[Row]:
    ratios = [one.rate / other.rate for one, other in zip(ours, theirs, strict=True)]
    memory = median([one.memory for one in ours]) / median([one.memory for one in theirs])
    loss = f"last loss {ours[-1].losses[-1]:.3f}, plain TRL {theirs[-1].losses[-1]:.3f}"
    rows = [
        at_least(
            "graft tune sft-lora / plain TRL, tokens/s", median(ratios), "times", 1.0, f"each pair: {spread(ratios, 2)}"
        ),
        at_most("the same, memory", memory, "times", MORE),
    ]
    for name, found in (("graft tune sft-lora", ours), ("plain TRL script", theirs)):
        rates = [one.rate for one in found]
        peak = median([one.memory for one in found]) / 2**30
        note = f"{dtype}; at most {peak:.2f} GiB; runs: {spread(rates, 0)}; {loss}"
        rows.append(shown(name, median(rates), "tokens/s", note))
    return rows
