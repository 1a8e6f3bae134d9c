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
    max_upload_mb: int = Field(1024, ge=1)  # all files of one request
    max_text_chars: int = Field(20_000_000, ge=1)
    parse_seconds: float = Field(120, gt=0)
    parse_memory_mb: int = Field(4096, ge=256)
    passwords: SecretStr | None = None  # tried on encrypted files, separated by line breaks
    ocr: Literal["auto", "off"] = "auto"  # auto: where tesseract is installed
    ocr_languages: str = "eng+chi_sim"  # those that are installed are used
    archive_depth: int = Field(3, ge=0)  # archives in archives; 0: none is opened
    archive_files: int = Field(10_000, ge=1)
    archive_mb: int = Field(2048, ge=1)  # of all files in one archive, unpacked
    archive_ratio: int = Field(200, ge=1)  # unpacked / packed
    job_seconds: float = Field(86_400, gt=0)
    stall_seconds: float = Field(900, gt=0)  # without a sign of life from the ingest child
    watch_reconcile_seconds: float = Field(3600, gt=0)

    @field_validator("home", "models", mode="after")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @property
    def scratch(self) -> Path:
        """For what a job unpacks or fetches; emptied at the start and after each job."""
        return self.home / "scratch"

    def sqlalchemy_url(self) -> str:
        if self.database_url:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.home / 'graft.db'}"
