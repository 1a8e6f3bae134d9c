"""Settings: read from the environment, and every one of them documented."""

import re
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from eval.settings import EvalSettings
from finetune.settings import FinetuneSettings
from ingest.settings import CHECKOUT, IngestSettings
from service.settings import ServiceSettings


def environment_names(settings: type[BaseSettings]) -> list[str]:
    prefix = settings.model_config["env_prefix"]
    fields = settings.model_fields.items()
    return [str(field.validation_alias or f"{prefix}{name}".upper()) for name, field in fields]


EVERY = (IngestSettings, ServiceSettings, EvalSettings, FinetuneSettings)
ALL = [name for settings in EVERY for name in environment_names(settings)]


@pytest.mark.parametrize("name", ALL)
def test_every_setting_is_documented(name: str) -> None:
    documented = (CHECKOUT / "docs/settings.md").read_text()
    assert re.search(rf"\b{name}\b", documented), f"{name} is not in docs/settings.md"


def test_every_documented_setting_exists() -> None:
    documented = set(
        re.findall(r"\b(?:INGEST|SERVICE|EVAL|FINETUNE)_[A-Z0-9_]+\b", (CHECKOUT / "docs/settings.md").read_text())
    )
    assert documented <= set(ALL)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INGEST_MAX_FILE_MB", "7")
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path))
    assert IngestSettings().max_file_mb == 7
    assert IngestSettings().sqlalchemy_url() == f"sqlite:///{tmp_path}/graft.db"


def test_a_relative_home_does_not_follow_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFT_HOME", "kept")
    settings = IngestSettings()
    monkeypatch.chdir("/")
    assert settings.home == tmp_path / "kept"


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGEST_DATABASE_URL", "postgresql://graft:hunter2@db/graft")
    monkeypatch.setenv("INGEST_EMBEDDER_API_KEY", "hunter2")
    monkeypatch.setenv("INGEST_QDRANT_API_KEY", "hunter2")
    settings = IngestSettings()
    assert "hunter2" not in repr(settings)
    assert settings.sqlalchemy_url() == "postgresql://graft:hunter2@db/graft"
