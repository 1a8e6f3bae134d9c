"""Best value against number of trials: every sampler of `graft sweep`, five seeds each, over trainings of a tiny model.

The model is made on the spot: two layers, random weights, the bundled model's tokenizer. Every point of the space is trained
once, and searches then look the held-out losses up, so all samplers see the same ones and a thousand trials cost nothing.
Numbers are searched by their places in the lists below, so that samplers see which are near each other.
Shown is the median over seeds of how far the best loss is above the least of the table.
"""

import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from benchmarks import tune_rows
from benchmarks.report import Options, Row, median, say, settings, shown, skipped, spread
from benchmarks.tune_methods import why_not
from eval.samplers import SAMPLERS, Sampler
from eval.space import Choice, Int, Setting, Space, Value, grid, parse_space
from eval.study import Search, search
from finetune import trial
from finetune.base_folder import BUNDLED
from finetune.recipe import Recipe, read_recipe
from finetune.settings import FinetuneSettings
from finetune.sweep import recipe_at
from ingest.files import write_whole

SPACE = (
    "learning_rate=1e-4,3e-4,1e-3,3e-3,1e-2,3e-2,1e-1,3e-1",
    "r=2,8,32",
    "lr_scheduler_type=constant,cosine",
    "per_device_train_batch_size=2,8",
)
STEPS, SEEDS, AT = 30, 5, (5, 10, 20, 40)
QUICK_SPACE, QUICK_STEPS, QUICK_SEEDS, QUICK_AT = ("learning_rate=1e-3,1e-2", "r=2,8"), 2, 2, (2, 4)


def run(options: Options) -> list[Row]:
    if lacking := why_not():
        return [skipped("searches", lacking)]
    quick = options.quick
    work = options.scratch / ("tune-search-quick" if quick else "tune-search")
    work.mkdir(parents=True, exist_ok=True)
    space = parse_space(QUICK_SPACE if quick else SPACE)
    losses = table(work, space, QUICK_STEPS if quick else STEPS)
    least, middle, most = min(losses.values()), median(list(losses.values())), max(losses.values())
    rows = [
        shown("least held-out loss of the table", least, "",
              f"of {len(losses)} trainings; their median {middle:.3f}, the highest {most:.3f}")
    ]  # fmt: skip
    at = QUICK_AT if quick else AT
    for sampler in SAMPLERS:
        found = [best_at(sampler, space, losses, seed, at) for seed in range(QUICK_SEEDS if quick else SEEDS)]
        above = [median([one[place] for one in found]) - least for place in range(len(at))]
        note = "; ".join(f"after {count}: {value:.3f}" for count, value in zip(at, above, strict=True))
        rows.append(shown(f"{sampler}, above the least", above[-1], "", f"{note}; seeds at the end: "
                          f"{spread([one[-1] - least for one in found], 3)}"))  # fmt: skip
    return rows


def best_at(sampler: Sampler, space: Space, losses: Mapping[str, float], seed: int, at: tuple[int, ...]) -> list[float]:
    """-> the best loss after each of those numbers of trials; of the whole where the grid has ended."""
    study = search(
        by_place(space),
        lambda attempt: losses[key(placed(space, attempt.setting))],
        Search(max(at), sampler, seed=seed, minimize=True),
    )
    best = list(itertools.accumulate((one.value or 0.0 for one in study.trials), min))
    return [best[min(count, len(best)) - 1] for count in at]


def table(work: Path, space: Space, steps: int) -> dict[str, float]:
    """-> the held-out loss of each point; kept for the next run."""
    file = work / f"losses-{steps}.json"
    held: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    rows = tune_rows.write(work / "rows", "sft")
    base = tiny(work / "base")
    given = [f"data={json.dumps(str(rows.learn))}", f"eval_data={json.dumps(str(rows.held_out))}", "patience=0"]
    given += [f"base={json.dumps(str(base))}", "dtype=float32", f"max_steps={steps}", f"eval_steps={steps}"]
    given += [f"save_steps={steps}", "gradient_accumulation_steps=1", "warmup_steps=0"]
    recipe = read_recipe("sft-lora", given)
    points = grid(space)
    for setting in points:
        if key(setting) not in held:
            held[key(setting)] = loss(recipe, setting, work)
            write_whole(file, json.dumps(held))
            say(f"{key(setting)}: held-out loss {held[key(setting)]:.3f}")
    return {key(setting): held[key(setting)] for setting in points}


def by_place(space: Space) -> Space:
    """-> the space with numbers by their places in their lists."""
    return {
        name: Int(low=0, high=len(values) - 1) if not isinstance(values[0], str) else Choice(values=values)
        for name, values in _values(space).items()
    }


def placed(space: Space, setting: Setting) -> Setting:
    """-> the setting that those places stand for."""
    values = _values(space)
    return {name: one if isinstance(one, str) else values[name][int(one)] for name, one in setting.items()}


def loss(recipe: Recipe, setting: Setting, work: Path) -> float:
    out = work / "trial" / "run"
    shutil.rmtree(out.parent, ignore_errors=True)
    order = trial.Order(recipe_at(recipe, setting), out, FinetuneSettings(trackers=()), work, work, "eval_loss", 0)
    metrics = trial.run(order, lambda *_: False, lambda: False) or {}
    return metrics["eval_loss"]


def key(setting: Setting) -> str:
    return json.dumps(setting, sort_keys=True)


def tiny(folder: Path) -> Path:
    """-> a model's folder: 3.2 million parameters, of which most are words."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    bundled = settings().models / BUNDLED
    if not (folder / "model.safetensors").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for file in bundled.glob("*.json*"):
            shutil.copy(file, folder)
        for file in bundled.glob("*.jinja"):
            shutil.copy(file, folder)
        config = AutoConfig.from_pretrained(bundled)
        config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "num_key_value_heads": 2, "head_dim": 16})  # fmt: skip
        torch.manual_seed(17)
        AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    return folder


def _values(space: Space) -> dict[str, tuple[Value, ...]]:
    return {name: one.values for name, one in space.items() if isinstance(one, Choice)}
