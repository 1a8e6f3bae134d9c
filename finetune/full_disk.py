"""A full disk, whichever library meets it, ends with what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ingest.errors import NoRoomError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_CLOSED = frozenset({errno.EROFS, errno.EACCES})
# torch and safetensors write by themselves and raise no OSError: the system's words are in theirs, or a word of the writer
_SAID = ("No space left on device", "Disk quota exceeded", "File too large", "PytorchStreamWriter failed writing")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raises NoRoomError where `out` cannot be written to."""
    try:
        yield
    except Exception as error:
        reason = _reason(error, out)
        if reason is None:
            raise
        raise NoRoomError(
            f"{str(out)!r} cannot be written to ({reason}): make room there and give the same command again, which goes on where "
            "it was ended"
        ) from error


def _reason(error: BaseException | None, out: Path) -> str | None:
    while error is not None and not isinstance(error, NoRoomError):
        if isinstance(error, OSError):
            if error.errno in _FULL or (error.errno in _CLOSED and str(error.filename).startswith(str(out))):
                return error.strerror
        elif said := next((one for one in _SAID if one in str(error)), None):
            return said
        error = error.__cause__ or error.__context__
    return None
