"""Proximal policy optimisation: the model answers, a reward says what each answer is worth, and the better ones become likelier.

Schulman et al., 2017 (arXiv 1707.06347), for language models after Ziegler et al., 2019 (arXiv 1909.08593) and Ouyang et al.,
2022 (arXiv 2203.02155), with what Huang et al. found to matter ("The 37 implementation details of PPO", 2022; arXiv
2403.17031). TRL has no PPO any more, so the loop is ours: this file is the run, `ppo_step` a step of it, `ppo_math` the
arithmetic. What moves away from the reference costs reward at each token: the reference is the same weights with the adapter off,
or the adapter that the run goes on from; where whole weights train, a second, frozen copy of the base.

Of transformers it keeps the words: state and callbacks are theirs, and a checkpoint's folder looks as a trainer's.
"""

import logging
import math
import random
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks

from finetune import methods, runs
from finetune.ppo_settings import PpoSettings, read_settings
from finetune.ppo_step import REFERENCE, Learner, Prompt, Rollout, improve, roll_out, texts, write
from finetune.rewards import check_known, named, sample_of, scored
from finetune.run import Outcome, Run, fitting_prompts
from finetune.schemas import Rows
from ingest.errors import InvalidError

logger = logging.getLogger(__name__)
WEIGHTS, STATE = "ppo.pt", "trainer_state.json"  # of a checkpoint
KEPT = 2  # checkpoints: the last one's KL is known only after the next answers
SHOWN = 10  # places of prompts that were left out


def ppo(run: Run) -> Outcome:
    """Raises InvalidError, SettingsError."""
    settings = read_settings(run.recipe.training)
    _refuse(run)
    check_known(tuple(run.recipe.reward.rewards), run.learn)
    set_seed(settings.seed)
    prompts, left_out = prompts_of(run, run.learn, settings)
    held_out = prompts_of(run, run.held_out, settings)[0] if run.held_out.rows else []
    rewards = named(run.recipe.reward, run.base, run.dtype)
    model, reference = _models(run)
    learner = Learner(
        model,
        settings,
        rewards=rewards,
        weights={str(name): weight for name, weight in run.recipe.reward.rewards.items()},
        ends=run.chat.ends,
        decode=lambda ids: str(run.chat.tokenizer.decode(ids, skip_special_tokens=True)),
        reference=reference,
        dtype=run.dtype,
    )
    loop = Loop(run, learner, prompts, held_out)
    loop.train()
    if hasattr(model, "peft_config") and REFERENCE in model.peft_config:
        model.delete_adapter(REFERENCE)
    return Outcome(loop, len(left_out), notes=loop.notes + _said(left_out))


def _models(run: Run) -> tuple[Any, Any | None]:
    """-> what trains, and a second model where no adapter can be switched off."""
    trained, attention = run.recipe.trained, run.recipe.model.attn_implementation
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = methods.apply(methods.load_base(run.base, trained, run.dtype, attention), trained)
    for weight in model.parameters():
        if weight.requires_grad:  # most steps are too small for bfloat16
            weight.data = weight.data.float()
    if trained.parent is not None:
        model.load_adapter(str(trained.parent), REFERENCE)
    reference = None
    if not hasattr(model, "peft_config"):
        reference = methods.load_base(run.base, trained, run.dtype, attention).requires_grad_(False).to(device)
    return (model if trained.weights == "qlora" else model.to(device)), reference


class Loop:
    """`model` and `state` as a trainer of transformers has them, for what saves and describes a run. `notes`: what the manifest
    should say of it.
    """

    def __init__(self, run: Run, learner: Learner, prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
        settings = learner.settings
        self.model, self.learner, self.run, self.settings = learner.model, learner, run, settings
        self.prompts, self.held_out = prompts, held_out
        self.notes: tuple[str, ...] = ()
        self.state, self.control = TrainerState(max_steps=settings.steps), TrainerControl()
        self.args = TrainingArguments(
            output_dir=str(run.checkpoints), max_steps=settings.steps, learning_rate=settings.learning_rate,
            seed=settings.seed, use_cpu=learner.device.type == "cpu", report_to="none",
        )  # fmt: skip
        others = [
            one() for one in get_reporting_integration_callbacks([one for one in run.trackers if one != "tensorboard"])
        ]
        # A reward may rise because it is fooled, so nothing ends early by it.
        self.callbacks = [one for one in (*run.callbacks, *others) if not isinstance(one, EarlyStoppingCallback)]
        if run.resume_from is not None:
            self._go_on_from(run.resume_from)

    def train(self) -> None:
        state, size = self.state, self.settings.batch_size
        self._call("on_train_begin")
        if self.run.resume_from is None:
            self._measure()
            self._save()
        while state.global_step < state.max_steps:
            rollout = roll_out(self.learner, self._batch(state.global_step * size))
            if self._too_far(rollout):
                break
            self._call("on_step_begin")
            told = rollout.told | improve(self.learner, rollout, self._rate())
            state.global_step += 1
            state.epoch = state.global_step * size / len(self.prompts)
            state.num_input_tokens_seen += int(rollout.answers.prompt_mask.sum() + rollout.answers.mask.sum())
            self._call("on_step_end")
            self._log(told)
            if self.control.should_save or state.global_step % self.settings.steps_between_checkpoints == 0:
                self._save()
            if self.control.should_training_stop:
                break
        else:
            self._finish()
        self._call("on_train_end")

    def _finish(self) -> None:
        """What the last step made is looked at as well: these are the numbers of the weights that are kept."""
        rollout = roll_out(self.learner, self._batch(self.state.global_step * self.settings.batch_size))
        if not self._too_far(rollout):
            self._log(rollout.told)
            self._measure()

    def _rate(self) -> float:
        linear = self.settings.lr_scheduler_type == "linear"
        return 1 - self.state.global_step / self.state.max_steps if linear else 1.0

    def _batch(self, start: int) -> list[Prompt]:
        """-> those from number `start` on of all passes over the prompts, each in an order of its own."""
        found = []
        for number in range(start, start + self.settings.batch_size):
            turn, at = divmod(number, len(self.prompts))
            found.append(self.prompts[_order(self.settings.seed, turn, len(self.prompts))[at]])
        return found

    def _measure(self) -> None:
        """The reward of the likeliest answers to the held-out prompts."""
        if not self.held_out:
            return
        learner, answers = self.learner, write(self.learner, self.held_out, greedy=True)
        said, _ = texts(learner, answers)
        samples = [sample_of(prompt.row, text) for prompt, text in zip(self.held_out, said, strict=True)]
        parts = scored(learner.rewards, samples)
        means = {name: math.fsum(values) / len(values) for name, values in parts.items()}
        told = {f"held_out_rewards/{name}": mean for name, mean in means.items()}
        told["held_out_reward"] = sum(learner.weights[name] * mean for name, mean in means.items())
        self._log(told | {"held_out_length": float(answers.mask.sum(1).mean())})

    def _too_far(self, rollout: Rollout) -> bool:
        """Whether the policy has run away; then the weights of the last checkpoint before that are back."""
        most = self.settings.max_kl
        if most is None or rollout.kl <= most:
            return False
        step = self.state.global_step
        good = max((one for one in _checkpoints(self.run.checkpoints) if one < step), default=0)
        self._log(rollout.told)
        self.learner.load(_read(self.run.checkpoints / f"checkpoint-{good}"))
        self.notes = (
            f"stopped after step {step} of {self.state.max_steps}: the KL to the reference was {rollout.kl:.1f} nats an answer, "
            f"and max_kl is {most:g}; the weights are those of step {good}. Lower learning_rate, or raise init_kl_coef",
        )
        logger.warning("the policy ran away", extra={"kl": rollout.kl, "step": step, "kept_step": good})
        self._log(self._told_of(good) | {"kept_step": float(good)})
        self._measure()
        return True

    def _told_of(self, step: int) -> dict[str, float]:
        """What was logged of answers of the weights of a step: those that the next one learned from."""
        counted = ("epoch", "num_input_tokens_seen", "step")
        told: dict[str, float] = next(
            (one for one in self.state.log_history if one["step"] == step + 1 and "loss" in one), {}
        )
        return {name: value for name, value in told.items() if name not in {*counted, "loss"}}

    def _log(self, told: Mapping[str, float]) -> None:
        state = self.state
        numbers = {**told, "epoch": state.epoch, "num_input_tokens_seen": state.num_input_tokens_seen}
        state.log_history.append({**numbers, "step": state.global_step})
        self._call("on_log", logs=numbers)

    def _call(self, event: str, **given: Any) -> None:
        for one in self.callbacks:
            getattr(one, event)(
                self.args, self.state, self.control, model=self.model, processing_class=self.run.chat.tokenizer,
                optimizer=self.learner.optimizer, **given,
            )  # fmt: skip

    def _save(self) -> None:
        """The state last, as a checkpoint without it is none."""
        folder = self.run.checkpoints / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.learner.state(), folder / WEIGHTS)
        self.state.save_to_json(str(folder / STATE))
        for step in sorted(_checkpoints(self.run.checkpoints))[:-KEPT]:
            shutil.rmtree(self.run.checkpoints / f"checkpoint-{step}")
        self.control.should_save = False
        self._call("on_save")

    def _go_on_from(self, folder: Path) -> None:
        self.learner.load(_read(folder))
        self.state = TrainerState.load_from_json(str(folder / STATE))


def _checkpoints(folder: Path) -> list[int]:
    return [runs.step_of(path) for path in folder.glob("checkpoint-*")]


def _read(folder: Path) -> dict[str, Any]:
    return torch.load(folder / WEIGHTS, weights_only=True)  # type: ignore[no-any-return]


@lru_cache(2)
def _order(seed: int, turn: int, count: int) -> list[int]:
    return random.Random(f"{seed} {turn}").sample(range(count), count)


def prompts_of(run: Run, rows: Rows, settings: PpoSettings) -> tuple[list[Prompt], tuple[str, ...]]:
    """-> the prompts that leave room for an answer, and the places of the others. Raises InvalidError where none does."""
    kept, left_out = fitting_prompts(run, rows, settings.max_new_tokens)
    return [Prompt(ids, row) for row, ids in kept], left_out


def _said(left_out: Sequence[str]) -> tuple[str, ...]:
    if not left_out:
        return ()
    some = ", ".join(left_out[:SHOWN]) + (", ..." if len(left_out) > SHOWN else "")
    return (f"too long to leave room for an answer, and left out: {some}",)


def _refuse(run: Run) -> None:
    """Raises InvalidError."""
    if runs.processes() > 1:
        raise InvalidError("PPO trains in one process: start it with `graft tune`, without a launcher")
    if run.dtype == "float16":
        raise InvalidError("model.dtype = 'float16' does not train PPO: set bfloat16 or float32")
    if run.recipe.trained.lora_dropout:
        raise InvalidError(
            f"lora_dropout = {run.recipe.trained.lora_dropout}: PPO compares an answer's probability before and after a step, "
            "so that it may not be left to chance; leave it out"
        )
