"""`graft worker`."""

import signal
from typing import Annotated, Any, Literal

import typer

from service.cli_options import ingest_settings


def worker(
    queue: Annotated[Literal["tune"], typer.Option(help="Whose jobs it takes.")] = "tune",
    once: Annotated[bool, typer.Option(help="End when nothing is queued any more.")] = False,
) -> None:
    """Runs training jobs (`POST /tune`) until Ctrl-C; a job that is running then is left to the next worker."""
    from finetune.cli_options import finetune_settings
    from finetune.train import require_stack
    from finetune.worker import Worker
    from service.show import err, escape

    require_stack()
    working = Worker(ingest_settings(), finetune_settings(), lambda said: err.print(escape(said)))

    def end(*_: Any) -> None:
        working.ending.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    working.run(once)
    err.print("ended")
