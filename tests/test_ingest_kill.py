"""Ingestion killed with SIGKILL at random moments and started again gives the index of an unbroken run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import qdrant_edge as edge
from sqlalchemy import select

from ingest.catalog import Catalog, Document, texts
from ingest.db import connect

KILLS = 5
FILES = 40
NAME = "default." + "f" * 12

SCRIPT = """
import sys
from pathlib import Path
from ingest.catalog import Catalog, Collection, now
from ingest.db import connect, migrate
from ingest.index_edge import EdgeIndex
from ingest.pipeline import IngestJob, Options
from ingest.schemas import Chunking
from ingest.settings import IngestSettings
from ingest.sync import Folder, Labelling
from ingest.writer import Target

settings, folder = IngestSettings(), Path(sys.argv[1])
engine = connect(settings.sqlalchemy_url())
migrate(engine)
collection = Collection(
    name="default", embedder=settings.embedder, chunking=Chunking(), fingerprint="f" * 64, prompt="auto", created_at=now()
)
catalog = Catalog(engine)
catalog.put_collection(collection)
index = EdgeIndex(settings.home / "index")
job = IngestJob(
    catalog, Target(index, collection.index, 384, "e" * 64), settings, collection, Folder(folder, folder),
    Options(Labelling(["staff"])), runtime="onnxruntime",
    report_progress=lambda progress: print(progress.model_dump_json(), flush=True),
)
print(job.run().model_dump_json(), flush=True)
index.close()
"""


def start(home: Path, folder: Path, models: Path) -> subprocess.Popen[str]:
    home.mkdir(exist_ok=True)
    own = {"GRAFT_HOME": str(home), "GRAFT_MODELS": str(models), "INGEST_THREADS": "2"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], env={**os.environ, **own}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def finish(home: Path, folder: Path, models: Path) -> dict[str, Any]:
    """-> the report."""
    process = start(home, folder, models)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out[-2000:]
    report: dict[str, Any] = json.loads(out.splitlines()[-1])
    return report


def kill_at(home: Path, folder: Path, models: Path, chunks: int, seconds: float) -> bool:
    """Kills it `seconds` after it has told of `chunks` chunks; whether it was still at work then."""
    process = start(home, folder, models)
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("chunks", 0) >= chunks if "files_total" in line else True:
            break
    time.sleep(seconds)
    at_work = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return at_work


def of_home(home: Path) -> list[psutil.Process]:
    """All processes that were started for this home, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("GRAFT_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def documents(home: Path) -> dict[str, Document]:
    rows = Catalog(connect(f"sqlite:///{home}/graft.db")).documents("default")
    return {row.path: row.model_copy(update={"indexed_at": None}) for row in rows}


def kept_texts(home: Path) -> dict[str, str]:
    with connect(f"sqlite:///{home}/graft.db").connect() as connection:
        return {row.hash: row.parsed for row in connection.execute(select(texts))}


def points(home: Path) -> dict[str, edge.Record]:
    shard = edge.EdgeShard.load(str(home / "index" / NAME))
    records, _ = shard.scroll(edge.ScrollRequest(limit=100_000, with_payload=True, with_vector=True))
    found = {str(record.id): record for record in records}
    shard.close()
    return found


def words(sparse: edge.SparseVector) -> dict[int, float]:
    return dict(zip(sparse.indices, sparse.values, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_ingest_killed_at_random_moments_ends_as_an_unbroken_one(models: Path, tmp_path: Path) -> None:
    dice = random.Random(4)
    folder = tmp_path / "docs"
    folder.mkdir()
    for n in range(FILES):
        sections = [
            f"## Part {part}\n\nPart {part} of station {n} weighs {dice.randrange(9999)} kg. "
            + "It is checked. " * (part * 4)
            for part in range(10)
        ]
        (folder / f"station-{n:02}.md").write_text(f"# Station {n}\n\n" + "\n\n".join(sections))

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    report = finish(whole, folder, models)
    assert report["files"]["done"] == FILES
    total = report["chunks"]["added"]
    assert total == 10 * FILES

    killed = 0
    for kill in range(KILLS):
        # from before the first chunk on: while it embeds, and while it writes; each run begins with what the last one left,
        # and counts from there
        chunks = 0 if kill == 0 else dice.randrange(1, total // 6)
        killed += kill_at(broken, folder, models, chunks, seconds=dice.uniform(0, 0.2))
        deadline = time.monotonic() + 30
        while of_home(broken) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert of_home(broken) == []
    assert killed >= 3
    report = finish(broken, folder, models)
    assert report["files"]["done"] + report["files"]["unchanged"] == FILES
    assert report["chunks"]["added"] < total

    expected, found = points(whole), points(broken)
    assert found.keys() == expected.keys()
    for key, record in expected.items():
        one: Any = found[key].vector
        other: Any = record.vector
        assert found[key].payload == record.payload
        assert float(np.dot(one["dense"], other["dense"])) >= 0.99
        assert words(one["bm25"]) == words(other["bm25"])
    assert documents(broken) == documents(whole)
    assert {document.state for document in documents(broken).values()} == {"done"}
    assert kept_texts(broken) == kept_texts(whole)
    assert of_home(broken) == of_home(whole) == []
