"""The members of an archive as files of a source: their URIs, paths, stamps and sidecars. Pure but for reading sidecars."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import NamedTuple
from urllib.parse import quote, unquote

from sqlalchemy import RowMapping

from ingest import sync
from ingest.archive import Expanded
from ingest.errors import DocumentError
from ingest.schemas import Labels
from ingest.sync import SIDECAR, File

MIME = "application/x-archive"
MARK = "!/"  # between an archive's URI and a member's name


class Members(NamedTuple):
    """`failures`: (name, reason) of members that could not be unpacked, or whose sidecar could not be understood."""

    files: list[File]
    failures: list[tuple[str, str]]


def rows_by_archive(stamps: Mapping[str, RowMapping]) -> dict[str, dict[str, RowMapping]]:
    """-> by the archive's URI, the rows of its members by theirs."""
    rows: defaultdict[str, dict[str, RowMapping]] = defaultdict(dict)
    for uri, row in stamps.items():
        archive, mark, _ = uri.partition(MARK)
        if mark:
            rows[archive][uri] = row
    return rows


def uri_of(archive: File, name: str) -> str:
    return archive.uri + MARK + quote(name)


def from_row(archive: File, uri: str, row: RowMapping) -> File:
    """A member of an archive that was not opened, as it is known."""
    sidecar = None if row["sidecar"] is None else Labels.model_validate(row["sidecar"])
    return File(
        uri, "", f"{archive.path}/{unquote(uri[len(archive.uri + MARK) :])}", row["size"], row["stamp"], sidecar
    )


def from_unpacked(archive: File, expanded: Expanded, root: Path) -> Members:
    """Unpacked below `root`. A member's own sidecar counts before the archive's."""
    failures = list(expanded.failures)
    sidecars: dict[str, Labels] = {}
    for member in expanded.members:
        if member.name.endswith(SIDECAR):
            try:
                sidecars[member.name] = sync.read_sidecar(member.place, str(root), PurePath(member.name).name)
            except DocumentError as error:
                failures.append((member.name.removesuffix(SIDECAR), error.reason))
    failed = {name for name, _ in failures}
    files = [
        File(
            uri_of(archive, member.name),
            member.place,
            f"{archive.path}/{member.name}",
            member.size,
            int(member.digest[:15], 16),
            sidecars.get(member.name + SIDECAR, archive.sidecar),
        )
        for member in expanded.members
        if not member.name.endswith(SIDECAR) and member.name not in failed
    ]
    return Members(files, failures)
