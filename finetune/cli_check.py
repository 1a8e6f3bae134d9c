"""`graft check`: an adapter's answers in the engine against PEFT's."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli_options import finetune_settings
from ingest.errors import InvalidError, UnavailableError
from ingest.settings import IngestSettings
from service.cli_options import JsonOption, connected, ingest_settings, service_settings
from service.client import Client
from service.owner import find_owner
from service.preflight import CONFIG
from service.schemas_adapters import Checked
from service.settings import ServiceSettings
from service.show import err, escape, out, write_json

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def check(
    adapter: Annotated[str, typer.Argument(metavar="FOLDER|NAME", help="A PEFT folder, or a registered adapter.")],
    to: JsonOption = None,
) -> None:
    """Compares an adapter's answers in the engine with PEFT's; one that graft trained is activated only after that."""
    from finetune.check import check_adapter, record  # they load the training stack, once they compare
    from finetune.train import require_stack

    require_stack()
    settings, ingest, threads = service_settings(None), ingest_settings(), finetune_settings().threads
    folder = Path(adapter)
    registered = not (folder / CONFIG).is_file()
    if registered and not NAME.fullmatch(adapter):
        raise InvalidError(
            f"{adapter!r} is no PEFT folder, since it holds no {CONFIG}, and no name of a registered adapter"
        )
    with _with_engine(settings, ingest) as (client, url):
        if registered:
            folder = (settings.adapter_folder or ingest.home / "adapters") / client.adapter(adapter).name
        checked = check_adapter(
            folder, url=url, settings=settings, ingest=ingest, registered=registered, threads=threads, tell=_tell
        )
        if not registered:
            record(folder, checked)
        for one in client.adapters():
            if one.digest == checked.digest:
                client.record_check(one.name, checked)
    if to:
        write_json(checked, to)
    else:
        _show(adapter, checked)
    if not checked.passed:
        raise typer.Exit(1)


@contextmanager
def _with_engine(settings: ServiceSettings, ingest: IngestSettings) -> Iterator[tuple[Client, str]]:
    """-> a client of the service, and the engine's URL: of those that run, else of such as are started for the length of the
    command. Raises SettingsError, UnavailableError.
    """
    if settings.llm_url or os.environ.get("GRAFT_URL") or find_owner(ingest.home):
        with connected(needs_engine=True) as client:
            url = _tried(client, settings)
            yield client, settings.llm_url or url
        return
    from anyio.from_thread import start_blocking_portal

    from service.engine import LocalEngine
    from service.up import in_background

    engine = LocalEngine(settings, ingest, _tell)
    key = os.environ.get("GRAFT_API_KEY")
    # It runs in a loop of its own, so that the comparison is in this thread, where Ctrl-C ends it.
    with (
        in_background(settings.model_copy(update={"llm_url": engine.url}), ingest) as url,
        Client(url, key) as client,
        start_blocking_portal() as portal,
    ):
        try:
            _tell(f"starts {engine.served_name} for the length of the check")
            portal.call(engine.start)
            yield client, _tried(client, settings)
        finally:
            portal.call(engine.stop)


def _tried(client: Client, settings: ServiceSettings) -> str:
    """-> the URL of the service's engine, once that has passed its trial with adapters. Raises UnavailableError."""
    end = time.monotonic() + settings.engine_start_seconds
    while True:
        found = client.ready().dependencies
        engine, adapters = found["engine"], found["adapters"]
        if engine.state == adapters.state == "ok":
            return engine.detail
        if "starting" not in {engine.state, adapters.state} or time.monotonic() > end:
            wrong = engine if engine.state != "ok" else adapters
            raise UnavailableError(f"an adapter is checked in the engine, which is not ready for it: {wrong.detail}")
        time.sleep(0.5)


def _tell(said: str) -> None:
    err.print(f"  [dim]{escape(said)}[/]")


def _show(adapter: str, checked: Checked) -> None:
    found = "[green]passed[/]" if checked.passed else "[bold red]failed[/]"
    out.print(f"{found}  {escape(adapter)}: {checked.prompts} prompts, {checked.changed} answered otherwise with it")
    out.print(
        f"  engine and PEFT differ by {checked.difference:.5f} in mean log-probability, the bare base by "
        f"{checked.base_difference:.5f}; at most {checked.bound} in {checked.dtype}"
    )
    out.print(f"  tokens of the prompts: {'equal' if checked.tokens_equal else 'not equal'}; {escape(checked.engine)}")
    if checked.why_not:
        out.print(f"  {escape(checked.why_not)}")
