"""Rows to train on, and training runs of seconds on a tiny model."""

import json
from pathlib import Path
from typing import Any

from finetune.hooks import SILENT, Hooks
from finetune.recipe import Recipe, read_recipe
from finetune.schemas import Manifest
from finetune.settings import FinetuneSettings
from finetune.train import train

QUIET = FinetuneSettings(trackers=(), threads=1)


def question(at: int) -> dict[str, str]:
    return {"role": "user", "content": f"What is the code of part {at}?"}


def answer(at: int) -> dict[str, str]:
    return {"role": "assistant", "content": f"The code is GR-{at * 7}."}


def write_rows(path: Path, method: str, rows: int = 24) -> Path:
    """For `method`, one a line."""
    wrong = {"role": "assistant", "content": "I would rather talk about turtles."}
    lines: list[dict[str, Any]] = []
    for at in range(rows):
        if method in ("dpo", "reward"):
            lines.append({"prompt": [question(at)], "chosen": [answer(at)], "rejected": [wrong]})
        elif method == "kto":
            said = answer(at) if at % 2 else wrong
            lines.append({"prompt": [question(at)], "completion": [said], "label": bool(at % 2)})
        else:
            lines.append({"messages": [question(at), answer(at)]})
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def write_other_rows(path: Path) -> Path:
    """With answers that become less likely, after a while, as those of `write_rows` are learned."""
    said = {"role": "assistant", "content": "Rivers, mountains and a green valley."}
    path.write_text("".join(f"{json.dumps({'messages': [question(at), said]})}\n" for at in range(90, 94)))
    return path


def recipe(name: str, data: Path, base: Path, *settings: str) -> Recipe:
    """In float32, so that numbers are the same on every processor."""
    where = (f"data={json.dumps(str(data))}", f"base={json.dumps(str(base))}", "dtype=float32")
    return read_recipe(name, (*where, *settings))


def tune(asked: Recipe, out: Path, hooks: Hooks = SILENT, **options: Any) -> Manifest:
    options.setdefault("settings", QUIET)
    return train(asked, out=out, models=out, home=out.parent, hooks=hooks, **options)


def curve(out: Path, name: str = "loss") -> list[float]:
    points = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    return [point[name] for point in points if name in point]
