"""What is known of a model before it is served."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from ingest.errors import SettingsError
from ingest.settings import IngestSettings
from service.base_model import window
from service.engine import LocalEngine
from service.settings import ServiceSettings


@pytest.mark.parametrize(
    ("config", "most"),
    [
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "default"}}, 2048),
        ({"text_config": {"max_position_embeddings": 4096}}, 4096),
        ({"max_position_embeddings": 8192, "model_max_length": 131072}, 131072),  # as the engine reads it
        ({"max_position_embeddings": 2048, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, None),
        ({}, None),
    ],
)
def test_the_window_is_what_the_configuration_says(tmp_path: Path, config: dict[str, Any], most: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert window(tmp_path) == most


def test_a_shorter_window_is_refused_by_name_before_the_engine_is_started(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 2048}')

    def started(tokens: int) -> str:
        given = {"model": str(tmp_path), "max_model_len": tokens, "engine_dtype": "float32"}
        settings = ServiceSettings.model_validate({**given, "GRAFT_VLLM_VENV": tmp_path / "none"})
        with pytest.raises(SettingsError) as refused:
            asyncio.run(LocalEngine(settings, IngestSettings(home=tmp_path / "home")).start())
        return str(refused.value)

    assert "takes 2048 tokens" in started(4096)
    assert "SERVICE_MAX_MODEL_LEN=2048" in started(4096)
    assert "no engine is installed" in started(2048)
