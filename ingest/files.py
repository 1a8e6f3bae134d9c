"""A file that is whole or not there, for what reads it meanwhile and after a kill."""

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """A reader sees the file as it was or as it is now. Raises OSError, ValueError; what was there stays then."""
    unfinished = path.parent / f".unfinished-{secrets.token_hex(8)}"
    try:
        with unfinished.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError, ValueError):
            unfinished.unlink()
        raise
