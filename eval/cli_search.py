"""To be written."""


def sweep() -> None:
    raise NotImplementedError


def probe() -> None:
    raise NotImplementedError


def calibrate() -> None:
    raise NotImplementedError


def weights() -> None:
    raise NotImplementedError
