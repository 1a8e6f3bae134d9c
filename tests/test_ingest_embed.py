"""Texts -> vectors: the bundled model on both runtimes, and an OpenAI-compatible server."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.embed import (
    BATCH_TEXTS,
    BATCH_TOKENS,
    Embedder,
    HttpEmbedder,
    load_counter,
    load_embedder,
    token_batches,
)
from ingest.errors import SettingsError, UnavailableError
from ingest.runtime import RUNTIMES, processor
from ingest.settings import IngestSettings

TEXTS = [
    "The impeller of the H75 is made of high-chromium white iron. " * 12,
    "Grease the bearings.",
    "水泵每年需要维护两次。",
    "The seal chamber holds three litres of oil. " * 4,
    "",
    "Valve",
]


class Server(ThreadingHTTPServer):
    """Speaks `/v1/embeddings`: a text's vector tells its length; rows come back in reverse order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endpoint)
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.statuses: list[int] = []  # answered first, one a request

    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1#some-model"


class Endpoint(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        self.server.authorizations.append(self.headers["authorization"])
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        rows = [{"index": n, "embedding": [len(text), 10.0]} for n, text in enumerate(body["input"])]
        reply = json.dumps({"data": rows[::-1]} if self.path == "/v1/embeddings" else {}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_vectors_come_in_the_order_of_the_texts_and_do_not_depend_on_the_batch(embedder: Embedder) -> None:
    together = embedder.embed(TEXTS)
    alone = np.stack([embedder.embed([text])[0] for text in TEXTS])
    assert together.shape == (len(TEXTS), embedder.dimension) == (len(TEXTS), 384)
    assert together.dtype == np.float32
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    cosines = together @ alone.T
    assert np.diag(cosines).min() >= 0.99
    assert (cosines.argmax(axis=1) == np.arange(len(TEXTS))).all()


def test_a_question_is_nearer_to_its_answer_than_to_others(embedder: Embedder) -> None:
    answers = [
        "Annual leave is 28 days a year.",
        "The wear ring is replaced when the gap is over 1 mm.",
        "Water costs 2 euros.",
    ]
    question = embedder.embed_query("How many days of holiday does an employee have?")
    assert (embedder.embed(answers) @ question).argmax() == 0


def test_a_question_is_embedded_with_its_own_prefix(embedder: Embedder) -> None:
    text = "How many days of leave?"
    plain, asked = embedder.embed([text])[0], embedder.embed_query(text)
    prefixed = embedder.embed([f"Represent this sentence for searching relevant passages: {text}"])[0]
    assert float(asked @ prefixed) >= 0.999
    assert float(asked @ plain) < 0.99


def test_a_text_over_the_limit_is_cut_not_refused(embedder: Embedder) -> None:
    long, longer = "water pump " * 600, "water pump " * 600 + "and something else"
    first, second = embedder.embed([long, longer])
    assert float(first @ second) >= 0.999


def test_no_texts_give_no_vectors(embedder: Embedder) -> None:
    assert embedder.embed([]).shape == (0, 384)


@pytest.mark.slow
def test_both_runtimes_give_the_same_vectors(settings: IngestSettings, embedder: Embedder) -> None:
    assert embedder.runtime == "onnxruntime"
    other = load_embedder("bge-small-en-v1.5", settings, "openvino")
    assert other.runtime == "openvino"
    assert other.fingerprint == embedder.fingerprint
    assert (other.embed(TEXTS) * embedder.embed(TEXTS)).sum(axis=1).min() >= 0.99


@pytest.mark.slow
def test_the_faster_runtime_is_found_by_a_probe_that_is_kept(settings: IngestSettings) -> None:
    automatic = settings.model_copy(update={"embedder_runtime": "auto"})
    first = load_embedder("bge-small-en-v1.5", automatic)
    kept = settings.home / "embedder-probe.json"
    (probe,) = json.loads(kept.read_text()).values()
    rates = probe["tokens_per_s"]
    assert set(rates) == set(RUNTIMES)
    assert min(rates.values()) > 0
    assert first.runtime == max(rates, key=rates.__getitem__)
    assert probe["processor"] == processor()
    slower = min(rates, key=rates.__getitem__)
    kept.write_text(kept.read_text().replace(str(rates[slower]), "1e9"))
    assert load_embedder("bge-small-en-v1.5", automatic).runtime == slower  # from what was kept, not measured again


@given(lengths=st.lists(st.integers(1, 6000), max_size=80))
def test_batches_hold_every_text_once_and_are_bounded(lengths: list[int]) -> None:
    batches = token_batches(lengths)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= BATCH_TEXTS
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= BATCH_TOKENS


def test_the_counter_counts_as_the_embedder_does(settings: IngestSettings, embedder: Embedder) -> None:
    counter = load_counter("bge-small-en-v1.5", settings)
    assert counter.max_tokens == embedder.max_tokens == 510
    assert len(counter.ids("pump " * 600)) == 600


def test_a_model_that_is_nowhere_names_the_remedy(settings: IngestSettings) -> None:
    with pytest.raises(SettingsError, match=r"'no-such-model'.*make models"):
        load_embedder("no-such-model", settings)
    with pytest.raises(SettingsError, match=r"'no-such-model'.*make models"):
        load_counter("no-such-model", settings)


def test_weights_without_an_onnx_file_name_the_extra_that_runs_them(
    settings: IngestSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as where it is not installed
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.safetensors").write_bytes(b"")
    with pytest.raises(SettingsError, match=r"graft\[torch\]"):
        load_embedder(str(tmp_path / "weights"), settings)


def test_a_folder_without_a_tokenizer_or_with_a_broken_card_is_named(settings: IngestSettings, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(SettingsError, match=r"tokenizer\.json"):
        load_embedder(str(tmp_path), settings)
    (tmp_path / "graft-model.json").write_text("{")
    with pytest.raises(SettingsError, match="broken configuration"):
        load_embedder(str(tmp_path), settings)


def test_a_server_is_asked_in_the_openai_format_and_its_rows_are_put_in_order(
    server: Server, settings: IngestSettings
) -> None:
    keyed = IngestSettings(**settings.model_dump() | {"embedder_api_key": "hunter2"})
    embedder = load_embedder(server.url(), keyed)
    texts = ["x" * n for n in range(70)]
    vectors = embedder.embed(texts)
    lengths = np.array([len(text) for text in texts], dtype=np.float32)
    assert np.allclose(vectors[:, 0] / vectors[:, 1], lengths / 10, atol=1e-4)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert [len(body["input"]) for body in server.bodies] == [32, 32, 6]
    assert {body["model"] for body in server.bodies} == {"some-model"}
    assert set(server.authorizations) == {"Bearer hunter2"}
    assert embedder.dimension == 2


def test_a_refusal_by_the_server_is_told_at_once(server: Server, settings: IngestSettings) -> None:
    server.statuses = [401] * 9
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1.*401"):
        HttpEmbedder(server.url(), settings).embed(["text"])
    assert len(server.bodies) == 1


def test_a_short_failure_of_the_server_is_tried_again(server: Server, settings: IngestSettings) -> None:
    server.statuses = [503]
    assert HttpEmbedder(server.url(), settings).embed(["text"]).shape == (1, 2)
    assert len(server.bodies) == 2


def test_a_server_url_must_name_a_model(settings: IngestSettings) -> None:
    with pytest.raises(SettingsError, match="http://host/v1#model"):
        load_embedder("http://127.0.0.1:1/v1", settings)


def test_chunks_for_a_server_are_counted_by_the_bundled_tokenizer(settings: IngestSettings) -> None:
    counter = load_counter("http://127.0.0.1:1/v1#some-model", settings)
    assert len(counter.ids("pump " * 20)) == 20
