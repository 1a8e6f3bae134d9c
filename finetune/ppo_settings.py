"""What a PPO recipe's [training] may say, by the names of the field. Light: read before the training stack is loaded."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from ingest.errors import InvalidError
from ingest.schemas import Frozen


class PpoSettings(Frozen):
    """An episode is one answer. A step writes `batch_size` of them and learns from these alone, `ppo_epochs` times."""

    total_episodes: int = Field(default=2048, ge=1)
    max_steps: int | None = Field(default=None, ge=1)  # in place of total_episodes / batch_size
    batch_size: int = Field(default=64, ge=1)
    mini_batch_size: int = Field(default=16, ge=1)  # answers an optimizer's step
    per_device_train_batch_size: int = Field(default=4, ge=1)  # answers at once, with gradients
    forward_batch_size: int = Field(default=16, ge=1)  # answers at once, without: while they are written and scored
    ppo_epochs: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=2e-5, gt=0)
    value_learning_rate: float = Field(default=1e-4, gt=0)  # of the value head
    lr_scheduler_type: Literal["linear", "constant"] = "linear"
    adam_epsilon: float = Field(default=1e-5, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    # How far the policy may move, in nats an answer.
    init_kl_coef: float = Field(default=0.1, ge=0)
    target_kl: float | None = Field(default=6.0, gt=0)  # "none": the coefficient stays as it is
    kl_horizon: int = Field(default=10_000, ge=1)  # episodes
    max_kl: float | None = Field(default=50.0, gt=0)  # "none": nothing ends the run
    # Advantages and losses.
    gamma: float = Field(default=1.0, gt=0, le=1)
    lam: float = Field(default=0.95, ge=0, le=1)
    cliprange: float = Field(default=0.2, gt=0)
    cliprange_value: float = Field(default=0.2, gt=0)
    vf_coef: float = Field(default=0.1, ge=0)
    entropy_coef: float = Field(default=0.0, ge=0)
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    missing_eos_penalty: float | None = Field(default=None, ge=0)
    # Answers.
    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    gradient_checkpointing: bool = False
    save_steps: int | None = Field(default=None, ge=1)  # else a tenth of the steps
    seed: int = 42

    @model_validator(mode="before")
    @classmethod
    def _none(cls, given: Any) -> Any:
        """TOML has no word for None."""
        return {key: None if value == "none" else value for key, value in given.items()}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.mini_batch_size > self.batch_size:
            raise ValueError(f"mini_batch_size = {self.mini_batch_size} is more than batch_size = {self.batch_size}")
        return self

    @property
    def steps(self) -> int:
        return self.max_steps or -(-self.total_episodes // self.batch_size)

    @property
    def steps_between_checkpoints(self) -> int:
        return self.save_steps or max(1, self.steps // 10)


def read_settings(training: Mapping[str, Any]) -> PpoSettings:
    """Raises InvalidError, naming the setting."""
    for name in training:
        if name not in PpoSettings.model_fields:
            near = difflib.get_close_matches(name, PpoSettings.model_fields, 3, 0.6)
            advice = f"did you mean {' or '.join(near)}?" if near else "docs/tuning/ppo.md lists those of PPO"
            raise InvalidError(f"unknown training argument {name!r}: {advice}")
    try:
        return PpoSettings.model_validate(dict(training))
    except ValidationError as error:
        one = error.errors()[0]
        if not one["loc"]:
            raise InvalidError(f"the training arguments do not fit each other: {one['msg']}") from error
        name = str(one["loc"][0])
        raise InvalidError(f"training argument {name} = {training[name]!r} does not fit: {one['msg']}") from error
