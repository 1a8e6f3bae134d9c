"""The database: migrations against the declared tables, and the column types of our own."""

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, insert, inspect, select, text

import ingest.catalog
import service.adapters
import service.prompt_store
import service.records
import service.workers  # noqa: F401  (declares its table)
from ingest.db import Compressed, Utc, connect, metadata, migrate
from ingest.errors import SettingsError

samples = MetaData()
sample = Table(
    "sample", samples, Column("id", Integer, primary_key=True), Column("said", Compressed), Column("at", Utc)
)


@pytest.fixture(scope="module")
def memory() -> Engine:
    engine = create_engine("sqlite://")
    samples.create_all(engine)
    return engine


def test_migrations_build_exactly_the_declared_tables(tmp_path: Path) -> None:
    engine = connect(f"sqlite:///{tmp_path}/graft.db")
    migrate(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        assert set(inspect(connection).get_table_names()) == {*metadata.tables, "alembic_version"}


def test_migrating_again_changes_nothing_and_keeps_the_rows(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/graft.db"
    first = connect(url)
    migrate(first)
    with first.begin() as connection:
        connection.execute(insert(ingest.catalog.texts).values(hash="a", parsed="kept"))
    first.dispose()
    second = connect(url)
    migrate(second)
    with second.connect() as connection:
        assert connection.execute(select(ingest.catalog.texts.c.parsed)).scalar_one() == "kept"


def test_a_writer_does_not_stop_a_reader(tmp_path: Path) -> None:
    engine = connect(f"sqlite:///{tmp_path}/graft.db")
    migrate(engine)
    with engine.begin() as writing, engine.connect() as reading:
        writing.execute(insert(ingest.catalog.texts).values(hash="a", parsed="new"))
        assert reading.execute(select(ingest.catalog.texts.c.hash)).all() == []


def test_a_row_cannot_point_to_nothing(tmp_path: Path) -> None:
    engine = connect(f"sqlite:///{tmp_path}/graft.db")
    with engine.connect() as connection:
        assert connection.execute(text("PRAGMA foreign_keys")).scalar_one() == 1


@pytest.mark.parametrize("url", ["nonsense", "oracle17://host/db", "postgresql+nosuchdriver://host/db"])
def test_an_unusable_database_url_is_refused_by_name(url: str) -> None:
    with pytest.raises(SettingsError, match="INGEST_DATABASE_URL"):
        connect(url)


@given(said=st.text(st.characters(), max_size=200))
def test_kept_texts_come_back_as_they_were(memory: Engine, said: str) -> None:
    with memory.connect() as connection:
        connection.execute(insert(sample).values(id=1, said=said))
        assert connection.execute(select(sample.c.said)).scalar_one() == said


def test_texts_are_kept_compressed(memory: Engine) -> None:
    with memory.connect() as connection:
        connection.execute(insert(sample).values(id=1, said="水泵 pump " * 1000))
        assert connection.execute(text("SELECT length(said) FROM sample")).scalar_one() < 500


@given(at=st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1)), hours=st.integers(-12, 14))
def test_a_moment_keeps_its_instant_whatever_zone_it_is_given_in(memory: Engine, at: datetime, hours: int) -> None:
    moment = at.replace(tzinfo=timezone(timedelta(hours=hours)))
    with memory.connect() as connection:
        connection.execute(insert(sample).values(id=1, at=moment))
        held = connection.execute(select(sample.c.at)).scalar_one()
    assert held == moment
    assert held.tzinfo == UTC
