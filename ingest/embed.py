"""Texts -> unit vectors, by the same code for documents and questions. Three ways: a fast CPU runtime over an ONNX file,
sentence-transformers (a GPU, or weights without an ONNX file), and any OpenAI-compatible `/v1/embeddings` server.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol
from urllib.parse import urldefrag

import httpx
import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from tokenizers import Encoding, Tokenizer

from ingest.errors import SettingsError, UnavailableError
from ingest.schemas import Frozen
from ingest.settings import IngestSettings

logger = logging.getLogger(__name__)
Vectors = NDArray[np.float32]  # (texts, dimension), rows of length 1
Runtime = Literal["onnxruntime", "openvino"]
RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")
Run = Callable[[dict[str, NDArray[np.int64]]], NDArray[np.float32]]  # input ids, mask, types -> first output
BATCH_TOKENS = 4096  # a batch is at most this many tokens, padding counted, ...
BATCH_TEXTS = 16  # ... and this many texts: larger ones are slower on a CPU
ONNX_FILES = ("model.onnx", "onnx/model.onnx", "openvino/openvino_model.xml", "openvino_model.xml")


class ModelCard(Frozen):
    """`graft-model.json` of a model folder: what its files do not say themselves."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    pooling: Literal["cls", "mean"] = "mean"
    normalize: bool = True
    query_prefix: str = ""
    document_prefix: str = ""
    languages: tuple[str, ...] = ("*",)
    max_tokens: int = 512


class Embedder(Protocol):
    """`fingerprint` stands for everything that changes its vectors but rounding."""

    name: str
    fingerprint: str
    languages: tuple[str, ...]
    max_tokens: int  # without the special tokens
    runtime: str

    @property
    def dimension(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> Vectors: ...

    def embed_query(self, text: str) -> NDArray[np.float32]: ...


class TokenCounter(NamedTuple):
    """Counts in an embedder's own tokens, without loading the embedder. `max_tokens`: without the special ones."""

    ids: Callable[[str], list[int]]
    max_tokens: int


def load_counter(name: str, settings: IngestSettings) -> TokenCounter:
    """For a server, whose tokenizer is not at hand, the bundled one counts. Raises SettingsError."""
    if name.startswith(("http://", "https://")):
        folder = find_model(IngestSettings.model_fields["embedder"].default, settings)
        return TokenCounter(_ids_by(read_tokenizer(folder)), HttpEmbedder.max_tokens)
    folder = find_model(name, settings)
    tokenizer = read_tokenizer(folder)
    special = tokenizer.num_special_tokens_to_add(False)
    return TokenCounter(_ids_by(tokenizer), read_card(name, folder).max_tokens - special)


def load_embedder(name: str, settings: IngestSettings, runtime: str | None = None) -> Embedder:
    """`name`: a folder below `settings.models`, a local path, a hub name, or `http(s)://host/v1#model`.

    Raises SettingsError, with the remedy, when it cannot be had.
    """
    if name.startswith(("http://", "https://")):
        return HttpEmbedder(name, settings)
    folder = find_model(name, settings)
    chosen = runtime or settings.embedder_runtime
    file = next((folder / one for one in ONNX_FILES if (folder / one).is_file()), None)
    if chosen == "torch" or file is None:
        return TorchEmbedder(name, folder)
    if chosen == "auto":
        chosen = choose_runtime(file, settings)
    return OnnxEmbedder(name, folder, file, "openvino" if chosen == "openvino" else "onnxruntime", settings.threads)


def find_model(name: str, settings: IngestSettings) -> Path:
    """-> the local folder of a model; a hub name is fetched. Raises SettingsError."""
    for folder in (settings.models / name, Path(name).expanduser()):
        if folder.is_dir():
            return folder
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "onnx/model.onnx", "model.onnx", "1_Pooling/*", "*.txt", "*.model"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises OSError, ValueError and its own kinds
        raise SettingsError(
            f"model {name!r} is neither a folder in {settings.models} nor a path, and the hub did not give it: {error}; "
            "`make models` fetches the bundled ones"
        ) from error


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


class OnnxEmbedder:
    """An encoder in ONNX or OpenVINO format with a `tokenizer.json` beside it."""

    def __init__(self, name: str, folder: Path, file: Path, runtime: Runtime, threads: int) -> None:
        self.name = name
        self.runtime: str = runtime
        self.card = read_card(name, folder)
        self.languages = self.card.languages
        self._tokenizer = read_tokenizer(folder)
        self._tokenizer.enable_truncation(self.card.max_tokens)
        self.max_tokens = self.card.max_tokens - self._tokenizer.num_special_tokens_to_add(False)
        self._run = session(file, runtime, threads)
        digest = hashlib.sha256(self.card.model_dump_json().encode())
        with file.open("rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
        self.fingerprint = digest.hexdigest()

    @cached_property
    def dimension(self) -> int:
        return int(self.embed_query("dimension").shape[0])

    def embed(self, texts: Sequence[str]) -> Vectors:
        return self._embed([self.card.document_prefix + text for text in texts])

    def embed_query(self, text: str) -> NDArray[np.float32]:
        return np.asarray(self._embed([self.card.query_prefix + text])[0], dtype=np.float32)

    def _embed(self, texts: Sequence[str]) -> Vectors:
        """Batches are of similar lengths and bounded in tokens; rows come back in the order of `texts`."""
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        encodings = self._tokenizer.encode_batch(list(texts))
        vectors: Vectors | None = None
        for batch in token_batches([len(encoding.ids) for encoding in encodings]):
            rows = self._pool([encodings[place] for place in batch])
            if vectors is None:
                vectors = np.empty((len(texts), rows.shape[1]), dtype=np.float32)
            vectors[batch] = rows
        assert vectors is not None
        return vectors

    def _pool(self, encodings: Sequence[Encoding]) -> Vectors:
        inputs = model_inputs(encodings)
        hidden = self._run(inputs)
        if hidden.ndim == 2:  # the export pools by itself
            pooled = hidden
        elif self.card.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = inputs["attention_mask"][:, :, None].astype(np.float32)
            pooled = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
        return unit(pooled) if self.card.normalize else pooled


class TorchEmbedder:
    """sentence-transformers: on a GPU, or for weights without an ONNX file. Needs the extra `graft[torch]`."""

    runtime = "torch"

    def __init__(self, name: str, folder: Path) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise SettingsError(
                f"embedder {name!r} has no ONNX file, so it needs sentence-transformers: "
                "pip install 'graft[torch]', or name a folder with model.onnx"
            ) from error
        self.name = name
        self.card = read_card(name, folder)
        self.languages = self.card.languages
        self._model = SentenceTransformer(str(folder))
        self.max_tokens = self.card.max_tokens - read_tokenizer(folder).num_special_tokens_to_add(False)
        weights = sorted(folder.rglob("*.safetensors")) + sorted(folder.rglob("*.bin"))
        digest = hashlib.sha256(self.card.model_dump_json().encode())
        for file in weights:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        self.fingerprint = digest.hexdigest()

    @cached_property
    def dimension(self) -> int:
        return int(self.embed_query("dimension").shape[0])

    def embed(self, texts: Sequence[str]) -> Vectors:
        prefixed = [self.card.document_prefix + text for text in texts]
        return np.asarray(self._model.encode(prefixed, normalize_embeddings=True), dtype=np.float32)

    def embed_query(self, text: str) -> NDArray[np.float32]:
        rows = self._model.encode([self.card.query_prefix + text], normalize_embeddings=True)
        return np.asarray(rows[0], dtype=np.float32)


class HttpEmbedder:
    """An OpenAI-compatible server, named `http(s)://host/v1#model`."""

    runtime = "http"
    languages: tuple[str, ...] = ("*",)
    max_tokens = 510

    def __init__(self, url: str, settings: IngestSettings) -> None:
        base, model = urldefrag(url)
        if not model:
            raise SettingsError(f"embedder {url!r} names no model; write http://host/v1#model")
        self.name = url
        self.fingerprint = hashlib.sha256(f"http:{url}".encode()).hexdigest()
        self._model = model
        key = settings.embedder_api_key
        headers = {"authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        transport = httpx.HTTPTransport(retries=3)
        self._client = httpx.Client(base_url=base.rstrip("/") + "/", headers=headers, timeout=60, transport=transport)

    @cached_property
    def dimension(self) -> int:
        return int(self.embed_query("dimension").shape[0])

    def embed(self, texts: Sequence[str]) -> Vectors:
        rows: list[Any] = []
        for start in range(0, len(texts), 32):
            rows += self._post(texts[start : start + 32])
        return unit(np.asarray(rows, dtype=np.float32).reshape(len(texts), -1))

    def embed_query(self, text: str) -> NDArray[np.float32]:
        return np.asarray(self.embed([text])[0], dtype=np.float32)

    def _post(self, texts: Sequence[str]) -> list[Any]:
        for attempt in range(4):
            try:
                reply = self._client.post("embeddings", json={"model": self._model, "input": list(texts)})
                reply.raise_for_status()
                ordered = sorted(reply.json()["data"], key=lambda row: row["index"])
                return [row["embedding"] for row in ordered]
            except (httpx.HTTPError, KeyError, ValueError) as error:
                refused = isinstance(error, httpx.HTTPStatusError) and error.response.status_code in {
                    400,
                    401,
                    403,
                    404,
                }
                if refused or attempt == 3:
                    raise UnavailableError(f"the embedding server {self.name!r} did not answer: {error}") from error
                time.sleep(0.5 * 2**attempt)
        raise AssertionError


def read_tokenizer(folder: Path) -> Tokenizer:
    """Neither pads nor truncates. Raises SettingsError."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the Rust library raises plain Exception
        raise SettingsError(f"model folder {str(folder)!r} has no usable tokenizer.json: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _ids_by(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def read_card(name: str, folder: Path) -> ModelCard:
    """From `graft-model.json`, else from the folder's sentence-transformers files. Raises SettingsError."""
    own = folder / "graft-model.json"
    try:
        if own.is_file():
            return ModelCard.model_validate_json(own.read_text())
        pooling: dict[str, Any] = {}
        if (folder / "1_Pooling/config.json").is_file():
            pooling = json.loads((folder / "1_Pooling/config.json").read_text())
        limit = 512
        if (folder / "sentence_bert_config.json").is_file():
            limit = json.loads((folder / "sentence_bert_config.json").read_text()).get("max_seq_length") or limit
        prompts: dict[str, str] = {}
        if (folder / "config_sentence_transformers.json").is_file():
            prompts = json.loads((folder / "config_sentence_transformers.json").read_text()).get("prompts") or {}
    except ValueError as error:
        raise SettingsError(f"model folder {str(folder)!r} has a broken configuration: {error}") from error
    return ModelCard(
        name=name,
        pooling="cls" if pooling.get("pooling_mode_cls_token") else "mean",
        query_prefix=prompts.get("query", ""),
        document_prefix=prompts.get("document", prompts.get("passage", "")),
        max_tokens=limit,
    )


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


def token_batches(lengths: Sequence[int]) -> list[list[int]]:
    """-> places of `lengths`, longest first, in batches of at most BATCH_TEXTS and BATCH_TOKENS with padding."""
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        widest = lengths[batches[-1][0]] if batches else 0
        if batches and len(batches[-1]) < BATCH_TEXTS and (len(batches[-1]) + 1) * widest <= BATCH_TOKENS:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def unit(vectors: NDArray[np.float32]) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)


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
