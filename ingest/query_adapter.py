"""A query adapter: a linear map that moves a question's vector to where its passages lie. Theirs stay as they are.

One is a folder below `query-adapters` of GRAFT_HOME. Its file says which embedder's vectors it is for.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ingest.embed import Embedder, unit
from ingest.errors import InvalidError, NotFoundError
from ingest.settings import IngestSettings

FOLDER, FILE = "query-adapters", "query_adapter.safetensors"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")


class QueryAdapter(NamedTuple):
    """`matrix`: (dimension, dimension). `fingerprint`: of the embedder whose vectors it takes."""

    matrix: NDArray[np.float32]
    embedder: str
    fingerprint: str

    def apply(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """(dimension,) or (questions, dimension) -> the same, of length 1."""
        moved = unit(np.atleast_2d(vectors) @ self.matrix.T)
        return moved.reshape(vectors.shape)


def write_query_adapter(folder: Path, adapter: QueryAdapter) -> None:
    """Raises OSError."""
    from safetensors.numpy import save_file

    facts = {"embedder": adapter.embedder, "fingerprint": adapter.fingerprint}
    unfinished = folder / f".{FILE}"
    save_file({"matrix": np.ascontiguousarray(adapter.matrix, np.float32)}, str(unfinished), facts)
    unfinished.replace(folder / FILE)  # a service may be reading


def read_query_adapter(folder: Path) -> QueryAdapter:
    """Raises NotFoundError, InvalidError."""
    from safetensors import SafetensorError, safe_open

    file = folder / FILE
    if not file.is_file():
        raise NotFoundError(
            f"{str(folder)!r} is no query adapter: it has no {FILE}; `graft tune query-adapter` makes one"
        )
    try:
        with safe_open(str(file), framework="numpy") as opened:
            facts, matrix = opened.metadata() or {}, opened.get_tensor("matrix")
        adapter = QueryAdapter(np.asarray(matrix, np.float32), facts["embedder"], facts["fingerprint"])
    except (SafetensorError, OSError, KeyError) as error:
        raise InvalidError(f"{str(file)!r} is not what `graft tune query-adapter` writes: {error}") from error
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not np.isfinite(matrix).all():
        raise InvalidError(f"{str(file)!r} holds no square matrix of numbers; tune it anew")
    return adapter


def load_query_adapter(name: str, settings: IngestSettings) -> QueryAdapter:
    """The one of this name in GRAFT_HOME. Raises NotFoundError, InvalidError."""
    changed_at(name, settings)  # it is there
    return read_query_adapter(_folder(name, settings))


def changed_at(name: str, settings: IngestSettings) -> int:
    """-> ns of its file. Raises NotFoundError."""
    try:
        return (_folder(name, settings) / FILE).stat().st_mtime_ns
    except OSError as error:
        raise NotFoundError(_missing(name, settings)) from error


def _folder(name: str, settings: IngestSettings) -> Path:
    if not NAME.fullmatch(name):
        raise NotFoundError(_missing(name, settings))
    return settings.home / FOLDER / name


def _missing(name: str, settings: IngestSettings) -> str:
    return (
        f"there is no query adapter {name!r} in {str(settings.home / FOLDER)!r}; `graft tune query-adapter` makes one"
    )


def check_fits(name: str, adapter: QueryAdapter, embedder: Embedder) -> None:
    """Raises InvalidError."""
    if adapter.fingerprint != embedder.fingerprint:
        raise InvalidError(
            f"query adapter {name!r} is for vectors of {adapter.embedder!r} ({adapter.fingerprint[:12]}), not of "
            f"{embedder.name!r} ({embedder.fingerprint[:12]}): tune one for that embedder"
        )
    if len(adapter.matrix) != embedder.dimension:
        raise InvalidError(
            f"query adapter {name!r} is for vectors of {len(adapter.matrix)} numbers, and {embedder.name!r} gives "
            f"{embedder.dimension}: tune it anew"
        )
