"""The local vLLM: started from its own environment, waited for, started again when it dies, ended with its owner.

A vLLM that somebody else runs (`SERVICE_LLM_URL`) needs none of this; `service.generate` alone talks to either.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import httpx

from ingest.errors import SettingsError, UnavailableError
from ingest.runtime import has_gpu, processor
from ingest.settings import CHECKOUT, IngestSettings
from service.base_model import window
from service.owner import ProcessMark, end_group, end_leftover_engine, mark, remember_engine
from service.settings import ServiceSettings

logger = logging.getLogger(__name__)
DType = Literal["bfloat16", "float16", "float32"]
State = Literal["starting", "up", "down", "stopped", "paused"]
PROBE = CHECKOUT / "deploy" / "vllm" / "probe_dtype.py"
MILESTONES = ("Loading weights", "Loading safetensors", "init engine", "Application startup complete")
PROBES = 2  # of another strength, besides one for each slot, that the engine is tried with (service.lora_probe)
RESTART_PAUSES = (1, 2, 5, 10, 30)  # seconds before the next start, by how often it died in a row


class LocalEngine:
    """One engine process. `on_progress` is told, in a few words, what it is doing while it starts."""

    def __init__(
        self,
        settings: ServiceSettings,
        ingest: IngestSettings,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.settings = settings
        self.home = ingest.home
        self.model = model_argument(settings.model, ingest.models)
        self.served_name = Path(self.model).name if Path(self.model).is_dir() else self.model
        self.on_progress = on_progress
        self.on_restart: Callable[[], None] = lambda: None
        self.on_start: Callable[[], object] = lambda: None  # before each start, while no engine runs
        self.on_pause: Callable[[], None] = lambda: None
        self.adapter_folder = settings.adapter_folder or ingest.home / "adapters"
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.log = ingest.home / "logs" / "engine.log"
        self.state: State = "stopped"
        self.detail = "not started"
        self._process: subprocess.Popen[bytes] | None = None
        self._mark: ProcessMark | None = None
        self._watching: asyncio.Task[None] | None = None
        self._dtype: DType | None = None
        self._leases: dict[str, float] = {}  # of a pause: until when on the monotonic clock, by holder
        self._ending = asyncio.Lock()

    async def start(self) -> None:
        """Returns once the engine answers. Raises SettingsError (not installed, or a model that does not fit), UnavailableError
        (it did not come up).
        """
        refuse_longer(self.model, self.settings.max_model_len)
        await asyncio.to_thread(end_leftover_engine, self.home)
        self._dtype = await asyncio.to_thread(choose_dtype, self.settings, self.home)
        if not self._leases:
            self._spawn()
            await self._wait_until_up()
        self._watching = asyncio.create_task(self._watch(), name="engine watch")

    async def stop(self) -> None:
        if self._watching:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        self.state, self.detail = "stopped", "ended"
        if self._mark:
            await asyncio.to_thread(end_group, self._mark)
        (self.home / "engine.json").unlink(missing_ok=True)

    async def pause(self, seconds: float, why: str, holder: str) -> None:
        """Ends the engine process, and starts no other for so long; asked again: for so long from now. It comes back when
        every holder's time is over.
        """
        first = not self._leases
        self._leases[holder] = time.monotonic() + seconds
        self.state, self.detail = "paused", f"the engine is paused for {why}"
        if first:
            logger.info("engine paused", extra={"why": why, "holder": holder, "seconds": seconds})
            self.on_pause()
        async with self._ending:  # whoever asks again while it ends waits too
            if self._mark:
                await asyncio.to_thread(end_group, self._mark)

    def resume(self, holder: str) -> None:
        """Ends the pause of this holder, if it has one. The engine is started by the watch, once no other holder is left."""
        if holder in self._leases:
            self._leases[holder] = time.monotonic()

    def paused_seconds(self) -> float | None:
        """That are left of the pause."""
        return max(0.0, max(self._leases.values()) - time.monotonic()) if self._leases else None

    def holders(self) -> tuple[str, ...]:
        """Of the pause."""
        return tuple(sorted(holder for holder, end in self._leases.items() if end > time.monotonic()))

    def _spawn(self) -> None:
        self.state, self.detail = "starting", "starting"
        self.on_start()
        self.adapter_folder.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.log.exists() and self.log.stat().st_size > 50 * 2**20:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self._command(),
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.home,
            )
        self._mark = mark(self._process.pid)
        remember_engine(self.home, self._process.pid)
        logger.info("engine started", extra={"pid": self._process.pid, "model": self.model, "dtype": self._dtype})

    def _command(self) -> list[str]:
        settings = self.settings
        command = [
            str(engine_python(settings)),
            "-m",
            "vllm.entrypoints.openai.api_server",
        ]  # `vllm serve` fails on a CPU
        options = {
            "--model": self.model,
            "--served-model-name": self.served_name,
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--dtype": self._dtype or "auto",
            "--max-model-len": str(settings.max_model_len),
            "--max-lora-rank": str(settings.max_lora_rank),
            "--max-loras": str(settings.max_loras),
            "--max-cpu-loras": str(settings.max_cpu_loras + settings.max_loras + PROBES),
        }
        for option, value in options.items():
            command += [option, value]
        command += ["--enable-lora", "--enable-prefix-caching"]
        return command if has_gpu() else [*command, "--enforce-eager"]

    def _environment(self) -> dict[str, str]:
        environment = {
            **os.environ,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_LORA_RESOLVER_CACHE_DIR": str(self.adapter_folder),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CONFIGURE_LOGGING": "1",
            "PYTHONUNBUFFERED": "1",
        }
        if not has_gpu():
            cores = sorted(os.sched_getaffinity(0))
            environment["VLLM_CPU_KVCACHE_SPACE"] = str(self.settings.engine_kv_cache_gb)
            environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))  # the default binds to one core
            allocator = _tcmalloc()
            if allocator:
                environment["LD_PRELOAD"] = allocator
        if Path(self.model).is_dir():
            environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        return environment

    async def _wait_until_up(self) -> None:
        end = time.monotonic() + self.settings.engine_start_seconds
        async with httpx.AsyncClient(trust_env=False) as client:
            while time.monotonic() < end:
                healthy = False
                with suppress(httpx.HTTPError):
                    healthy = (await client.get(self.url.removesuffix("/v1") + "/health", timeout=2)).is_success
                if self._leases:
                    return
                if healthy:
                    self.state, self.detail = "up", f"{self.served_name} ({self._dtype})"
                    return
                if not self._alive():
                    self.state, self.detail = "down", "it ended while starting"
                    raise UnavailableError(f"the engine ended while starting; {self.log} says:\n{self._last_error()}")
                said = self._milestone()
                if said != self.detail:
                    self.detail = said
                    self.on_progress(said)
                await asyncio.sleep(0.5)
        self.state, self.detail = "down", "it did not come up in time"
        raise UnavailableError(
            f"the engine did not answer within SERVICE_ENGINE_START_SECONDS ({self.settings.engine_start_seconds:g}); "
            f"see {self.log}"
        )

    async def _watch(self) -> None:
        """Starts the engine again whenever it dies, and after a pause; the wait grows while it dies at once."""
        deaths = 0
        up_since = time.monotonic()
        while True:
            await asyncio.sleep(0.25)
            if self._leases:
                if await self._pause_is_over():
                    up_since, deaths = await self._again(up_since), 0
                continue
            if self._alive():
                continue
            deaths = 0 if time.monotonic() - up_since > 120 else deaths + 1
            died = time.monotonic()
            self.state, self.detail = "starting", "it died and is started again"
            logger.error("engine died", extra={"deaths": deaths, "log": str(self.log)})
            self.on_restart()
            if self._mark:  # the group's leader is gone, its workers may not be
                with suppress(ProcessLookupError):
                    os.killpg(self._mark.pid, signal.SIGKILL)
            await asyncio.sleep(RESTART_PAUSES[min(deaths, len(RESTART_PAUSES) - 1)])
            if not self._leases:
                up_since = await self._again(up_since)
                logger.info("engine is %s", self.state, extra={"seconds": round(time.monotonic() - died, 1)})

    async def _pause_is_over(self) -> bool:
        async with self._ending:
            if self.paused_seconds():
                return False
            self._leases.clear()
        logger.info("engine goes on after a pause")
        return True

    async def _again(self, up_since: float) -> float:
        """-> since when it has been up; as it was when it did not come up."""
        try:
            self._spawn()
            await self._wait_until_up()
            return time.monotonic()
        except UnavailableError as error:
            logger.error("engine did not come back: %s", error)
            if self._mark:
                await asyncio.to_thread(end_group, self._mark)  # one that hangs is started anew like one that died
            return up_since

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _milestone(self) -> str:
        text = self._written()
        return next((said for said in reversed(MILESTONES) if said in text), "importing vLLM")

    def _last_error(self) -> str:
        lines = [line for line in self._written().splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "error" in line]
        return "\n".join((errors or lines)[-4:])

    def _written(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")


def model_argument(model: str, models: Path) -> str:
    """-> what the engine's --model gets: the local folder where there is one, else the name as it is (of a hub)."""
    for folder in (models / model, Path(model).expanduser()):
        if (folder / "config.json").is_file():
            return str(folder.absolute())
    if model.startswith((".", "/", "~")):
        raise SettingsError(f"model folder {model!r} has no config.json")
    return model


def refuse_longer(model: str, tokens: int) -> None:
    """Raises SettingsError where a local model's window is shorter than what the engine is to be asked for."""
    most = window(Path(model)) if Path(model).is_dir() else None
    if most is not None and most < tokens:
        raise SettingsError(
            f"the model in {model!r} takes {most} tokens of prompt and answer, and SERVICE_MAX_MODEL_LEN is {tokens}: set "
            f"SERVICE_MAX_MODEL_LEN={most}, or take a model with a longer window"
        )


def engine_python(settings: ServiceSettings) -> Path:
    """Raises SettingsError when the engine's environment is not installed."""
    python = settings.engine_venv / "bin" / "python"
    if not python.exists():
        raise SettingsError(
            f"no engine is installed in {str(settings.engine_venv)!r}: run `make engine`, or set SERVICE_LLM_URL to a vLLM "
            "that runs elsewhere"
        )
    return python


def choose_dtype(settings: ServiceSettings, home: Path) -> DType:
    """The setting, else what a short probe finds fastest on this processor; the finding is kept in `home`."""
    if settings.engine_dtype != "auto":
        return settings.engine_dtype
    if has_gpu():
        return "bfloat16"
    kept = home / "engine-probe.json"
    with suppress(OSError, ValueError, KeyError):
        probe = json.loads(kept.read_text())
        if probe["processor"] == processor():
            chosen: DType = probe["dtype"]
            return chosen
    run = subprocess.run(
        [str(engine_python(settings)), str(PROBE)], capture_output=True, text=True, timeout=120, check=False
    )
    try:
        rates: dict[DType, float] = json.loads(run.stdout)
    except ValueError:
        logger.warning("the dtype probe failed: %s", run.stderr[-300:])
        return "float32"
    fastest = max(rates, key=lambda dtype: rates[dtype])
    home.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"processor": processor(), "dtype": fastest, "gflops": rates}, indent=1))
    return fastest


def _tcmalloc() -> str | None:
    """The allocator that serves vLLM's CPU path best, where the system has it (Debian: libtcmalloc-minimal4)."""
    found = sorted(Path("/usr/lib").glob("*-linux-gnu*/libtcmalloc_minimal.so.4"))
    return str(found[0]) if found else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
