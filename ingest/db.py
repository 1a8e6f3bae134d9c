"""The one database: SQLite by default, PostgreSQL by URL. Tables are declared by their owners; migrations build them."""

import zlib
from datetime import UTC, datetime
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import DateTime, Engine, LargeBinary, MetaData, TypeDecorator, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from ingest.errors import SettingsError

metadata = MetaData()


class Compressed(TypeDecorator[str]):
    """Text kept as zlib-compressed UTF-8."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> bytes | None:
        return None if value is None else zlib.compress(value.encode("utf-8", "surrogatepass"), 3)

    def process_result_value(self, value: bytes | None, dialect: Any) -> str | None:
        return None if value is None else zlib.decompress(value).decode("utf-8", "surrogatepass")


class Utc(TypeDecorator[datetime]):
    """A moment in UTC; SQLite would forget the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


def connect(url: str) -> Engine:
    """-> an engine for `url`. SQLite gets a write-ahead log and waits up to 30 s for another writer.

    What is committed outlives a killed process; a power cut may take SQLite's last moments, but nothing half-written. To
    wait for the disk at each commit would add that wait to every answer.

    Raises SettingsError when the URL or its driver is unusable.
    """
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() != "sqlite":
            return create_engine(parsed, pool_pre_ping=True)
        engine = create_engine(parsed, connect_args={"timeout": 30})
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise SettingsError(f"the database URL cannot be used: {error}; see INGEST_DATABASE_URL") from error

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    return engine


def migrate(engine: Engine) -> None:
    """Brings the schema to the newest revision; does nothing when it is there."""
    config = Config()
    config.set_main_option("script_location", "ingest:migrations")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
