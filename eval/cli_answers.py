"""To be written."""


def answers() -> None:
    raise NotImplementedError


def report() -> None:
    raise NotImplementedError
