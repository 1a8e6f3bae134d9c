"""Who asks. A bearer key out of the keys file when there is one; else the local user, who may do all."""

import hashlib
import hmac
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from ingest.errors import ForbiddenError, SettingsError
from ingest.schemas import Frozen

ADMIN = "admin"


class Principal(Frozen):
    """`groups` None: sees and may do everything (the local user)."""

    id: str
    groups: frozenset[str] | None

    def manages(self) -> frozenset[str] | None:
        """The groups whose documents it may list and delete; None: all. What they say is for `groups` alone."""
        return None if self.groups is None or ADMIN in self.groups else self.groups

    def require_admin(self) -> None:
        """Raises ForbiddenError."""
        if self.groups is not None and ADMIN not in self.groups:
            raise ForbiddenError(f"{self.id!r} may not do this; it needs a key of the group {ADMIN!r}")


LOCAL = Principal(id="local", groups=None)


class _Key(Frozen):
    id: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    groups: frozenset[str] = frozenset()


class Keys:
    """The known keys, by the sha256 of their text; the keys themselves are kept nowhere."""

    def __init__(self, file: Path) -> None:
        """Raises SettingsError."""
        try:
            self._keys = TypeAdapter(tuple[_Key, ...]).validate_json(file.read_text())
        except OSError as error:
            raise SettingsError(f"SERVICE_API_KEYS_FILE {str(file)!r} cannot be read: {error.strerror}") from error
        except (ValidationError, UnicodeDecodeError) as error:
            raise SettingsError(
                f'SERVICE_API_KEYS_FILE {str(file)!r} is not a JSON list of {{"id", "sha256", "groups"}}: {error}'
            ) from error
        if not self._keys:
            raise SettingsError(f"SERVICE_API_KEYS_FILE {str(file)!r} holds no key; add one, or unset it")
        ids = [key.id for key in self._keys]
        if len(set(ids)) != len(ids):
            raise SettingsError(f"SERVICE_API_KEYS_FILE {str(file)!r} names an id twice")

    def principal(self, authorization: str | None) -> Principal | None:
        """-> who the `Authorization` header stands for; None: nobody known."""
        scheme, _, token = (authorization or "").partition(" ")
        digest = hashlib.sha256(token.strip().encode()).hexdigest()
        found = None
        for key in self._keys:  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(key.sha256, digest) and scheme.lower() == "bearer":
                found = Principal(id=key.id, groups=key.groups)
        return found
