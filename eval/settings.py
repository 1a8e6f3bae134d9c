"""Settings of evaluation, read from the environment once, at the entry point."""

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class EvalSettings(BaseSettings):
    """`EVAL_*`. The judge is any OpenAI-compatible chat endpoint; without one no score of a judge is made."""

    model_config = SettingsConfigDict(env_prefix="EVAL_", frozen=True)

    judge_url: str | None = None  # as https://host/v1
    judge_model: str | None = None
    judge_api_key: SecretStr | None = None
    judge_seconds: float = Field(default=120, gt=0)  # for one judgement
