"""What can go wrong, in one tree. A message names the value and says what to do next; routes map each class to a status.

GraftError
├── NotFoundError          there is no such collection, document, job, ...
├── ConflictError          the request contradicts what is stored
├── InvalidError           the request cannot be carried out as it stands
├── ForbiddenError         the principal may not do this
├── UnavailableError       a part this needs does not answer now; trying again can help
├── LockedError            another process owns the folder
├── SettingsError          a setting, a model folder or an installed package does not fit
│   └── NoRoomError            a folder cannot be written to: the disk or a quota is full
└── DocumentError          one file could not be taken in; the others are not concerned
    └── UnreadableTypeError    no text is read from files of its kind: skipped, not failed
        └── OcrMissingError        its text is in images, and there is nothing to read them with
"""


class GraftError(Exception):
    """Base of every error this product raises on purpose."""


class NotFoundError(GraftError):
    pass


class ConflictError(GraftError):
    pass


class InvalidError(GraftError):
    pass


class ForbiddenError(GraftError):
    pass


class UnavailableError(GraftError):
    def __init__(self, message: str, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds


class LockedError(GraftError):
    pass


class SettingsError(GraftError):
    pass


class NoRoomError(SettingsError):
    pass


class DocumentError(GraftError):
    """`stage` is where the file stopped: read, parse, chunk, embed or write."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage
        self.reason = reason

    def __reduce__(self) -> tuple[type["DocumentError"], tuple[str, str]]:
        return type(self), (self.stage, self.reason)


class UnreadableTypeError(DocumentError):
    pass


class OcrMissingError(UnreadableTypeError):
    pass
