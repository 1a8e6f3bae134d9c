"""What every `graft` command shares: its settings, the `--json` option, and the service that it talks to."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from ingest.errors import SettingsError, UnavailableError
from ingest.settings import IngestSettings
from service.client import Client
from service.owner import find_owner
from service.settings import ServiceSettings

Settings = TypeVar("Settings", bound=BaseModel)
JsonOption = Annotated[
    str | None, typer.Option("--json", metavar="FILE|-", help="Write the reply as JSON; - is standard output.")
]
CollectionOption = Annotated[str, typer.Option("--collection", "-c", help="The collection to use.")]
CollectionsOption = Annotated[
    list[str] | None,
    typer.Option("--collection", "-c", help="The collection to ask; several: repeated, or with commas between them."),
]


@contextmanager
def connected(needs_engine: bool = False) -> Iterator[Client]:
    """-> a client of the service at `GRAFT_URL`, else of the owner of `GRAFT_HOME`, else of one that is started for the
    length of the command, without an engine.
    """
    key = os.environ.get("GRAFT_API_KEY")
    ingest = ingest_settings()
    owner = find_owner(ingest.home)
    if url := os.environ.get("GRAFT_URL") or (owner.url if owner else None):
        with Client(url, key) as client:
            yield client
        return
    settings = service_settings(None)
    if needs_engine and not settings.llm_url:
        raise UnavailableError("a query needs the engine: start it with `graft up`, or set SERVICE_LLM_URL")
    from service.up import in_background

    with in_background(settings, ingest) as url, Client(url, key) as client:
        yield client


def asked_of(collections: list[str] | None) -> dict[str, Any]:
    """-> the fields of a request that name what is asked."""
    names = [name for given in collections or ["default"] for name in given.split(",")]
    return {"collection": names[0]} if len(names) == 1 else {"collections": tuple(names)}


def service_settings(roots: list[Path] | None) -> ServiceSettings:
    """With the working folder as the root where none is set. Raises SettingsError."""
    settings = _settings(ServiceSettings)
    chosen = settings.ingest_roots or (Path.cwd(),)
    ingest_roots = (*chosen, *(path.absolute() for path in roots or ()))
    adapter_roots = settings.adapter_roots or (Path.cwd(),)
    return settings.model_copy(update={"ingest_roots": ingest_roots, "adapter_roots": adapter_roots})


def ingest_settings() -> IngestSettings:
    return _settings(IngestSettings)


def _settings(kind: type[Settings]) -> Settings:
    try:
        return kind()
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise SettingsError(f"a setting does not fit: {said}; docs/settings.md lists them") from error
