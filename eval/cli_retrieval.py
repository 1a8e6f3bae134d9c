"""To be written."""


def retrieval() -> None:
    raise NotImplementedError


def compare() -> None:
    raise NotImplementedError
