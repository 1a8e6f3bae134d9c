"""A run on the terminal: one line that moves, or lines that follow each other where nobody watches; and what is left of it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from finetune.recipe import BY_REWARD
from finetune.schemas import Manifest
from service.show import clock, err, escape, out, said_of_training
from service.tuning import TuneProgress

EVERY = 15.0  # seconds between two lines, where they follow each other


@contextmanager
def shown() -> Iterator[Callable[[TuneProgress], None]]:
    """-> what shows a run's progress, on standard error."""
    if not err.is_terminal:
        yield _Lines()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24),
               TextColumn("{task.fields[said]}"), TimeElapsedColumn())  # fmt: skip
    with ProgressBar(*columns, console=err, transient=True) as bar:
        task = bar.add_task("loading", total=None, said="")

        def show(at: TuneProgress) -> None:
            bar.update(task, description=at.stage, total=at.steps or None, completed=at.step, said=said_of_training(at))

        yield show


class _Lines:
    """The first, the last, each change of the stage but to evaluate and back, and else one in a while."""

    def __init__(self) -> None:
        self._stage, self._line = "", ""
        self._told = 0.0

    def __call__(self, at: TuneProgress) -> None:
        stage = "training" if at.stage == "evaluating" else at.stage
        line = f"{stage} {said_of_training(at)}".rstrip()
        due = stage != self._stage or at.step == at.steps > 0 or time.monotonic() - self._told > EVERY
        if due and line != self._line:
            self._stage, self._line, self._told = stage, line, time.monotonic()
            err.print(line, markup=False)


def print_summary(manifest: Manifest, folder: Path) -> None:
    """What was trained, and the commands that follow."""
    held = manifest.metrics
    losses = [f"loss {held['train_loss']:.4g} on average"] if "train_loss" in held else []
    if "reward" in held:  # whose loss says nothing
        losses = [f"reward {held['reward']:.4g} at the end"]
    if "eval_reward" in held:
        losses.append(
            f"{held['eval_reward']:.4g} on {manifest.held_out_rows} held-out prompts at step {held['best_step']:.0f}"
        )
    elif "eval_loss" in held:
        losses.append(
            f"{held['eval_loss']:.4g} on {manifest.held_out_rows} held-out rows at step {held['best_step']:.0f}"
        )
    if manifest.method == "ppo":
        losses.append(f"{held['kl']:.3g} nats an answer from where it began")
    if "held_out_reward" in held:
        losses.append(f"{held['held_out_reward']:.4g} on {manifest.held_out_rows} held-out prompts")
    out.print(f"trained {manifest.trainable_parameters:,} of {manifest.all_parameters:,} parameters of "
              f"{escape(manifest.base)} on {manifest.rows} rows in {clock(manifest.seconds)}: {', '.join(losses)}")  # fmt: skip
    if "accuracy_low" in held:
        out.print(
            f"  prefers the chosen answer in {held['accuracy']:.3f} [{held['accuracy_low']:.3f}, {held['accuracy_high']:.3f}] of "
            f"{held['pairs']:.0f} held-out pairs; calibration error {held['calibration_error']:.3f} (calibration.png)"
        )
    peak = manifest.peak_memory_bytes / 2**30
    if left_out := held.get("rows_left_out"):
        limit = "max_prompt_length" if manifest.method in BY_REWARD else "max_length"
        out.print(f"  [yellow]note:[/] {left_out:.0f} rows are longer than {limit} and were left out")
    for note in manifest.notes:
        out.print(f"  [yellow]note:[/] {escape(note)}")
    out.print(f"  in {escape(str(folder))}, with manifest.json and curve.png; {peak:.1f} GiB at most")
    if manifest.weights in {"full", "layers"}:
        out.print(f"  next: graft up --model {escape(str(folder))}", soft_wrap=True)
    elif manifest.servable:
        out.print(
            f"  next: graft check {escape(str(folder))}, then graft adapters add {escape(str(folder))}", soft_wrap=True
        )
    else:
        out.print(f"  {escape(manifest.why_not or '')}")
