"""Settings of the service, read from the environment once, at the entry point."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ingest.remote import prefixes_of
from ingest.settings import CHECKOUT


class ServiceSettings(BaseSettings):
    """`SERVICE_*`."""

    model_config = SettingsConfigDict(env_prefix="SERVICE_", frozen=True, populate_by_name=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)  # 0: any free one
    api_keys_file: Path | None = None  # JSON: [{"id", "sha256", "groups"}]
    ingest_roots: Annotated[tuple[Path, ...], NoDecode] = ()  # separated by ":"; none: the working folder at the start
    ingest_urls: Annotated[tuple[str, ...], NoDecode] = ()  # URL prefixes, separated by white space or commas
    ingest_readers: Annotated[tuple[str, ...], NoDecode] = ()  # MODULE:CLASS or MODULE.*, separated likewise
    adapter_roots: Annotated[tuple[Path, ...], NoDecode] = ()  # folders, as ingest_roots, for adapters

    llm_url: str | None = None  # a vLLM that somebody else runs, as http://host:port/v1
    llm_api_key: SecretStr | None = None
    llm_model_folder: Path | None = (
        None  # the model that a vLLM elsewhere serves, where its own path is not of this machine
    )
    model: str = "smollm2-135m-instruct"  # for our own engine: a folder below GRAFT_MODELS, a path, or a hub name
    engine_venv: Path = Field(CHECKOUT / ".venv-vllm", validation_alias="GRAFT_VLLM_VENV")
    engine_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    engine_kv_cache_gb: int = Field(2, ge=1)  # of memory, on a CPU
    max_model_len: int = Field(4096, ge=512)  # tokens of prompt and answer together
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 64  # what vLLM takes
    max_loras: int = Field(4, ge=1)  # adapters in one batch
    max_cpu_loras: int = Field(64, ge=1)  # adapters registered
    adapter_folder: Path | None = (
        None  # None: below GRAFT_HOME; a vLLM elsewhere reads it as VLLM_LORA_RESOLVER_CACHE_DIR
    )
    max_adapter_mb: int = Field(2048, ge=1)
    bundled_adapters: Path | None = (
        CHECKOUT / "deploy" / "adapters"
    )  # "": none; `graft up` makes that of its model answer
    engine_start_seconds: float = Field(600, gt=0)

    max_tokens: int = Field(256, ge=1)  # of an answer, when the query does not say
    prompt_tokens: int = Field(2048, ge=256)  # passages are left out from the last one on to stay below
    temperature: float = Field(0.0, ge=0)
    first_token_seconds: float = Field(120, gt=0)
    unsupported: Literal["mark", "drop", "refuse"] = "mark"  # sentences that the passages do not support
    rewrite: Literal["auto", "rules", "engine", "off"] = "auto"  # how a follow-up question is made to stand alone
    rewrite_seconds: float = Field(5, gt=0)  # for the engine's way; then the rules' is taken
    reranker: str = "ms-marco-minilm-l-12-v2"
    rerank_ms: float = Field(1000, gt=0)  # that reranking may take of a question
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("max_lora_rank", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        return int(value) if isinstance(value, str) and value.isdigit() else value

    @field_validator("max_cpu_loras", mode="after")
    @classmethod
    def _enough(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("max_loras", 1):
            raise ValueError("must be at least SERVICE_MAX_LORAS")
        return value

    @field_validator("bundled_adapters", mode="before")
    @classmethod
    def _none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("ingest_urls", mode="before")
    @classmethod
    def _prefixes(cls, value: object) -> object:
        return prefixes_of(value) if isinstance(value, str) else value

    @field_validator("ingest_readers", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value

    @field_validator("ingest_roots", "adapter_roots", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part for part in value.split(":") if part) if isinstance(value, str) else value
