"""How far training is: the trainer's events as ours, its log as JSONL, and the way to end it early. Imports transformers."""

import json
import math
import time
from collections import deque
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from finetune.hooks import Hooks
from ingest.errors import InvalidError
from service.tuning import TuneProgress

WINDOW = 20  # steps that speed is taken over


class ProgressCallback(TrainerCallback):  # type: ignore[misc]  # mypy does not read transformers
    """`stopped`: whether the run was ended by `stop` or by the caller; a checkpoint is then kept of its last step. `started`: of
    time.perf_counter(), earlier by what the run took before it was ended; the log says seconds since then.
    """

    def __init__(self, hooks: Hooks, log: Path, started: float) -> None:
        self.hooks = hooks
        self.log = log
        self.started = started
        self.stopped = False
        self._asked = False
        self._evaluating = False
        self._told: dict[str, float] = {}  # fields of TuneProgress, as they were last seen
        self._steps: deque[tuple[float, int, int]] = deque(maxlen=WINDOW + 1)  # (seconds, step, tokens)

    def stop(self) -> None:
        """Ends the run after the step that is under way. May be called from a signal handler."""
        self._asked = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._mark(state)
        self._tell(state, "training")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._mark(state)
        self._evaluating = False
        # A run that has just finished is not thrown away.
        if state.global_step < state.max_steps and (self._asked or self.hooks.cancelled()):
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self._evaluating:
            self._evaluating = True
            self._tell(state, "evaluating")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._steps.clear()  # the time that it took is no training
        self._mark(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Raises InvalidError for a loss that is no number."""
        if not state.is_world_process_zero or (self.stopped and "train_loss" in logs):  # a summary of a half
            return
        numbers = {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        lost = [key for key in ("loss", "eval_loss") if key in numbers and not math.isfinite(numbers[key])]
        if lost:
            raise InvalidError(
                f"the {lost[0]} is {numbers[lost[0]]} at step {state.global_step}: lower learning_rate (it is "
                f"{args.learning_rate:g}), or set model.dtype to float32"
            )
        with self.log.open("a", encoding="utf-8") as file:
            seconds = round(time.perf_counter() - self.started, 1)
            file.write(json.dumps({"step": state.global_step, "seconds": seconds, **numbers}) + "\n")
        self._told |= {key: numbers[key] for key in ("loss", "eval_loss", "reward", "learning_rate") if key in numbers}
        self._tell(state, "training")

    def _mark(self, state: Any) -> None:
        self._steps.append((time.monotonic(), state.global_step, state.num_input_tokens_seen))

    def _tell(self, state: Any, stage: Any) -> None:
        if not state.is_world_process_zero:
            return
        (since, first, before), (now, last, after) = self._steps[0], self._steps[-1]
        spent, done = now - since, last - first
        if done and spent > 0:
            self._told["tokens_per_second"] = round((after - before) / spent, 1)
            self._told["seconds_left"] = round(spent / done * (state.max_steps - last), 1)
        self.hooks.progress(
            TuneProgress(
                stage=stage,
                step=state.global_step,
                steps=state.max_steps,
                epoch=round(state.epoch or 0.0, 3),
                **self._told,
            )
        )
