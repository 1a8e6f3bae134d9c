"""Settings of training, read from the environment once, at the entry point."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class FinetuneSettings(BaseSettings):
    """`FINETUNE_*`. W&B and MLflow are used when `trackers` names them; their own variables say where they are."""

    model_config = SettingsConfigDict(env_prefix="FINETUNE_", frozen=True)

    folder: Path | None = None  # of runs; None: below GRAFT_HOME
    threads: int | None = Field(default=None, ge=1)  # None: all cores
    trackers: Annotated[tuple[str, ...], NoDecode] = ("tensorboard",)  # separated by white space or commas
    memory_share: float = Field(default=0.9, gt=0, le=1)  # of what is free, that a run may be estimated to take

    @field_validator("trackers", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        return tuple(re.findall(r"[^][\s,'\"]+", value)) if isinstance(value, str) else value  # a JSON list does too
