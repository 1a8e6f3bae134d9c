"""Uploaded files: kept below the home, from where they are taken in like those of any folder."""

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from starlette.datastructures import UploadFile

from ingest.errors import InvalidError, UnavailableError
from ingest.schemas import Labels
from ingest.sync import SIDECAR, read_sidecar
from service.schemas_jobs import UploadFields

MAX_FILES = 1000  # of one request
MAX_NAME = 255 - len(SIDECAR)  # bytes of a part of a path


class Upload(NamedTuple):
    path: PurePosixPath
    file: UploadFile


def files_of(values: Sequence[Any], max_bytes: int) -> list[Upload]:
    """The form's files, each with the path that it is kept under. Raises InvalidError."""
    files = [value for value in values if isinstance(value, UploadFile)]
    if not files or len(files) != len(values):
        raise InvalidError("files: send at least one file, as multipart/form-data under the name `files`")
    uploads = []
    for file in files:
        if file.size is not None and file.size > max_bytes:
            limit = max_bytes // 2**20
            raise InvalidError(
                f"files: {file.filename!r} has {file.size:,} bytes, over INGEST_MAX_FILE_MB ({limit} MiB)"
            )
        uploads.append(Upload(_path(file.filename or ""), file))
    paths = [one.path for one in uploads]
    if len(set(paths)) != len(paths):
        raise InvalidError("files: two of them have the same name")
    return uploads


def keep(uploads: Sequence[Upload], folder: Path, fields: UploadFields) -> tuple[str, ...]:
    """-> where they are now. Each is written whole or not at all, after its sidecar. Raises UnavailableError."""
    places = []
    try:
        for path, file in uploads:
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if fields.acl is not None or fields.metadata is not None:
                sidecar = Path(f"{place}{SIDECAR}")
                _replace(sidecar, _labels(sidecar, folder, fields).model_dump_json().encode())
            _replace(place, file)
            places.append(str(place))
    except OSError as error:
        raise UnavailableError(f"the upload could not be kept: {error.strerror} ({error.filename!r})") from error
    return tuple(places)


def _labels(sidecar: Path, folder: Path, fields: UploadFields) -> Labels:
    """What the form leaves out stays as an earlier version's."""
    held = read_sidecar(str(sidecar), str(folder), sidecar.name) if sidecar.exists() else Labels()
    acl = held.acl if fields.acl is None else tuple(fields.acl)
    return Labels(acl=acl, metadata=held.metadata if fields.metadata is None else fields.metadata)


def _path(name: str) -> PurePosixPath:
    """A relative path of plain names. Raises InvalidError."""
    path = PurePosixPath(name.replace("\\", "/"))
    plain = all(
        part not in {"", ".", ".."}
        and not part.startswith(".")
        and part.isprintable()
        and len(part.encode()) <= MAX_NAME
        for part in path.parts
    )
    if not path.parts or path.is_absolute() or not plain or name.endswith(SIDECAR) or len(name) > 1024:
        raise InvalidError(
            f"files: {name!r} is no name for a document: a relative path of visible names, not ending in {SIDECAR}"
        )
    return path


def _replace(place: Path, content: bytes | UploadFile) -> None:
    incoming = place.with_name(f".{uuid.uuid4().hex}")
    try:
        with incoming.open("wb") as written:
            if isinstance(content, bytes):
                written.write(content)
            else:
                shutil.copyfileobj(content.file, written, 2**20)
            written.flush()
            os.fsync(written.fileno())
        incoming.replace(place)
    except BaseException:
        incoming.unlink(missing_ok=True)
        raise
