"""What a training job says of itself, without a training: its settings, its curve, its notes."""

import json
import threading
from pathlib import Path

import pytest

from finetune.cli_check import check
from finetune.cli_worker import worker
from finetune.job import Job, Order, Said, logged
from finetune.worker import _Notes
from ingest import db
from ingest.catalog import now
from ingest.errors import SettingsError
from service.records import JobRecord, Records
from service.tuning import POINTS, LossPoint, TunePayload

PAYLOAD = TunePayload(recipe="sft-lora", data="rows", run="run")


def test_a_setting_that_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path))
    monkeypatch.setenv("FINETUNE_THREADS", "many")
    order = Order(part="train", payload=PAYLOAD, out=tmp_path, holder="me")
    for command in (worker, lambda: check("adapter"), lambda: Job(order, lambda _: None, threading.Event())):
        with pytest.raises(SettingsError, match=r"FINETUNE_THREADS: .*docs/settings.md"):
            command()


def test_what_was_logged_keeps_every_held_out_loss(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 5 * POINTS)]
    lines += [{"step": step, "eval_loss": 1 / step} for step in range(100, 5 * POINTS, 100)]
    lines.sort(key=lambda line: line["step"])
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    points = logged(tmp_path)
    assert POINTS // 4 < len(points) <= POINTS
    assert [point.step for point in points if point.eval_loss is not None] == [*range(100, 5 * POINTS, 100)]


def test_a_note_that_the_database_does_not_take_goes_with_the_next_one(tmp_path: Path) -> None:
    engine = db.connect(f"sqlite:///{tmp_path}/graft.db")
    db.migrate(engine)
    records = Records(engine)
    record = JobRecord(id="j", created_at=now(), principal="p", kind="tune", payload=PAYLOAD.model_dump())
    records.add_job(record)
    notes = _Notes(records, record)

    def renamed(old: str, new: str) -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER TABLE {old} RENAME TO {new}")

    renamed("jobs", "away")
    notes.take(Said(point=LossPoint(step=1, loss=2.0)))
    notes.write()
    renamed("away", "jobs")
    assert records.job("j").curve is None
    notes.write()
    assert records.job("j").curve == (LossPoint(step=1, loss=2.0),)
    engine.dispose()
