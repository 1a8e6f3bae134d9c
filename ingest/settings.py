"""Settings of the index and of ingestion, read from the environment once, at the entry point."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

CHECKOUT = Path(__file__).resolve().parent.parent


class IngestSettings(BaseSettings):
    """`INGEST_*`, and the two folders that every part shares, `GRAFT_HOME` and `GRAFT_MODELS`."""

    model_config = SettingsConfigDict(env_prefix="INGEST_", frozen=True, populate_by_name=True)

    home: Path = Field(CHECKOUT / ".graft", validation_alias="GRAFT_HOME")
    models: Path = Field(CHECKOUT / ".models", validation_alias="GRAFT_MODELS")
    database_url: SecretStr | None = None  # None: SQLite below `home`
    qdrant_url: str | None = None  # None: Qdrant Edge below `home`
    qdrant_api_key: SecretStr | None = None
    embedder: str = "bge-small-en-v1.5"  # a folder below `models`, a path, a hub name, or http(s)://host/v1#model
    embedder_api_key: SecretStr | None = None
    embedder_runtime: Literal["auto", "onnxruntime", "openvino", "torch"] = "auto"
    threads: int = Field(os.cpu_count() or 1, ge=1)
    max_file_mb: int = Field(200, ge=1)
    max_text_chars: int = Field(20_000_000, ge=1)
    parse_seconds: float = Field(120, gt=0)
    parse_memory_mb: int = Field(4096, ge=256)

    @field_validator("home", "models", mode="after")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    def sqlalchemy_url(self) -> str:
        if self.database_url:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.home / 'graft.db'}"
