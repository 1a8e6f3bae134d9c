"""What tests of several packages share: the bundled models, settings with a home of their own, an embedder, an index."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingest.embed import Embedder, load_embedder
from ingest.index_edge import EdgeIndex
from ingest.settings import IngestSettings

pytest_plugins = ["service_fixtures", "word_adapters"]
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is first imported, which is later


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of the bundled models (GRAFT_MODELS)."""
    folder = IngestSettings().models
    if not (folder / "bge-small-en-v1.5/model.onnx").is_file():
        pytest.fail(f"the bundled models are not in {folder}: run `make models`", pytrace=False)
    return folder


@pytest.fixture
def settings(models: Path, tmp_path: Path) -> IngestSettings:
    """A fresh home; the runtime is fixed, so that no probe is run."""
    return IngestSettings(home=tmp_path / "home", models=models, embedder_runtime="onnxruntime", threads=2)


@pytest.fixture(scope="session")
def embedder(models: Path) -> Embedder:
    settings = IngestSettings(models=models, embedder_runtime="onnxruntime", threads=2)
    return load_embedder("bge-small-en-v1.5", settings)


@pytest.fixture
def index(settings: IngestSettings) -> Iterator[EdgeIndex]:
    opened = EdgeIndex(settings.home / "index")
    yield opened
    opened.close()
