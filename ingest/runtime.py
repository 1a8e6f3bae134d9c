"""The CPU runtimes that run a model file, and which of them is the faster one on this processor."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from ingest.settings import IngestSettings

logger = logging.getLogger(__name__)
Runtime = Literal["onnxruntime", "openvino"]
RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")
Run = Callable[[dict[str, NDArray[np.int64]]], NDArray[np.float32]]  # input ids, mask, types -> first output


def choose_runtime(file: Path, settings: IngestSettings) -> Runtime:
    """The faster of the two runtimes on this processor, by a short probe that is kept in `GRAFT_HOME`."""
    if file.suffix == ".xml":
        return "openvino"
    kept = settings.home / "embedder-probe.json"
    key = hashlib.sha256(f"{file}:{file.stat().st_size}:{processor()}:{settings.threads}".encode()).hexdigest()[:16]
    try:
        probes = json.loads(kept.read_text())
    except (OSError, ValueError):
        probes = {}
    if key not in probes:
        rates = {runtime: _rate(file, runtime, settings.threads) for runtime in RUNTIMES}
        probes[key] = {"model": str(file), "processor": processor(), "tokens_per_s": rates}
        settings.home.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(probes, indent=1))
    rates = probes[key]["tokens_per_s"]
    return "openvino" if rates["openvino"] > rates["onnxruntime"] else "onnxruntime"


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None and Path("/dev/nvidiactl").exists()


def processor() -> str:
    """-> the processor's name and its widest vector unit."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    by_name = {key.strip(): value.strip() for key, value in fields.items()}
    flags = by_name.get("flags", "").split()
    unit = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags), "no avx2")
    return f"{by_name.get('model name', 'unknown')} ({unit})"


def session(file: Path, runtime: Runtime, threads: int) -> Run:
    """Opens a model file in a runtime. Threads sleep while there is nothing to do, so an idle service costs nothing."""
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        opened = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        names = {one.name for one in opened.get_inputs()}

        def run(inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
            return np.asarray(opened.run(None, {key: inputs[key] for key in names})[0], dtype=np.float32)

        return run
    import openvino

    core = openvino.Core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = "bf16" if "BF16" in capabilities else "f32"
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    compiled = core.compile_model(core.read_model(str(file)), "CPU", hints)
    names = {one.any_name for one in compiled.inputs}

    def run_openvino(inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        request = compiled.create_infer_request()  # one each: the service asks from several threads
        return np.array(request.infer({key: inputs[key] for key in names})[0], dtype=np.float32)

    return run_openvino


def model_inputs(encodings: Sequence[Encoding]) -> dict[str, NDArray[np.int64]]:
    """-> input_ids, attention_mask, token_type_ids, each (texts, longest), padded with 0."""
    longest = max(len(encoding.ids) for encoding in encodings)
    shape = (len(encodings), longest)
    ids, mask, types = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    for row, encoding in enumerate(encodings):
        width = len(encoding.ids)
        ids[row, :width] = encoding.ids
        mask[row, :width] = 1
        types[row, :width] = encoding.type_ids
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def _rate(file: Path, runtime: Runtime, threads: int) -> float:
    """-> tokens a second over batches of 8 texts of 128 tokens: the best of three, after one to warm up; 0: cannot."""
    ids = np.random.default_rng(0).integers(1000, 20000, (8, 128))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    times = []
    try:
        run = session(file, runtime, threads)
        for _ in range(4):
            start = time.perf_counter()
            run(inputs)
            times.append(time.perf_counter() - start)
    except Exception as error:  # each runtime has errors of its own; one that cannot run a model is the slower one
        logger.warning("%s cannot run %s: %s", runtime, file, error)
        return 0.0
    return round(ids.size / min(times[1:]), 1)
