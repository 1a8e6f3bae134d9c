"""Texts -> unit vectors, by the same code for documents and questions. Three ways: a fast CPU runtime over an ONNX file,
sentence-transformers (a GPU, or weights without an ONNX file), and any OpenAI-compatible `/v1/embeddings` server.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urldefrag

import httpx
import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from ingest.errors import InvalidError, SettingsError, UnavailableError
from ingest.model_files import find_model, onnx_file, read_card, read_tokenizer
from ingest.runtime import Runtime, choose_runtime, has_gpu, model_inputs, session
from ingest.schemas import Chunking
from ingest.settings import IngestSettings

Vectors = NDArray[np.float32]  # (texts, dimension), rows of length 1
BATCH_TOKENS = 4096  # a batch is at most this many tokens, padding counted, ...
BATCH_TEXTS = 16  # ... and this many texts: larger ones are slower on a CPU


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


def index_fingerprint(embedder: Embedder, chunking: Chunking) -> str:
    """Stands for all that decides what a collection's chunks and vectors are. Raises InvalidError when they do not fit."""
    if chunking.tokens > embedder.max_tokens or chunking.overlap >= chunking.tokens:
        raise InvalidError(
            f"chunking: tokens must be at most {embedder.max_tokens}, the limit of {embedder.name!r}, and over overlap"
        )
    later = set() if chunking.headers else {"headers"}  # a field that came later: unused, it changes no fingerprint
    described = f"{embedder.fingerprint}:{chunking.model_dump_json(exclude_none=True, exclude=later)}"
    return hashlib.sha256(described.encode()).hexdigest()


def load_counter(name: str, settings: IngestSettings) -> TokenCounter:
    """For a server, whose tokenizer is not at hand, the bundled one counts. Raises SettingsError."""
    if name.startswith(("http://", "https://")):
        folder = find_model(IngestSettings.model_fields["embedder"].default, settings)
        return TokenCounter(_ids_by(read_tokenizer(folder)), HttpEmbedder.max_tokens)
    folder = find_model(name, settings)
    tokenizer = read_tokenizer(folder)
    special = tokenizer.num_special_tokens_to_add(False)
    return TokenCounter(_ids_by(tokenizer), read_card(name, folder).max_tokens - special)


def load_embedder(
    name: str, settings: IngestSettings, runtime: str | None = None, threads: int | None = None
) -> Embedder:
    """`name`: a folder below `settings.models`, a local path, a hub name, or `http(s)://host/v1#model`.

    `threads`: of a CPU runtime, when not the setting's. Raises SettingsError, with the remedy, when it cannot be had.
    """
    if name.startswith(("http://", "https://")):
        return HttpEmbedder(name, settings)
    folder = find_model(name, settings)
    chosen = runtime or settings.embedder_runtime
    file = onnx_file(folder)
    on_gpu = chosen == "auto" and has_gpu() and find_spec("sentence_transformers") and any(folder.glob("*.safetensors"))
    if chosen == "torch" or file is None or on_gpu:
        return TorchEmbedder(name, folder)
    if chosen == "auto":
        chosen = choose_runtime(file, settings)
    return OnnxEmbedder(
        name, folder, file, "openvino" if chosen == "openvino" else "onnxruntime", threads or settings.threads
    )


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


def _ids_by(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


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
