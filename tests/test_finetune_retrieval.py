"""What `graft tune` makes of a collection's questions, through the service: a query adapter that is taken and taken back, an
embedder whose index is flipped to or left. The embedder is a tiny BERT with random weights, so that it learns in seconds.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from service_fixtures import Service, run_graft, running, until

from eval.cases import read_dataset
from eval.flip import FEWEST, adopt_if_better, flip_if_better
from ingest.embed import load_embedder, unit
from ingest.errors import InvalidError, NotFoundError
from ingest.query_adapter import FOLDER, QueryAdapter, write_query_adapter
from ingest.schemas import Retrieval
from ingest.settings import IngestSettings
from service.client import Client
from service.schemas import CollectionSettings, ReindexRequest, SearchRequest

pytestmark = pytest.mark.slow
COUNT = 40
TOPICS = ("pump", "oven", "lathe", "crane", "fridge", "drone", "boiler", "mixer")
FACTS = (
    "the seal chamber holds oil",
    "the bearings take grease",
    "the guard is yellow",
    "the fuse is slow",
    "the filter is paper",
)


def document(at: int) -> str:
    return (
        f"# {TOPICS[at % 8]} model {TOPICS[at // 8]}\n\nOf the {TOPICS[at % 8]} {TOPICS[at // 8]}: {FACTS[at // 8]}.\n"
    )


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of this module's own, with a collection `shop` searched by vectors alone; `root`/questions.jsonl asks of it."""
    root = tmp_path_factory.mktemp("shop")
    folder = root / "docs"
    folder.mkdir()
    for at in range(COUNT):
        (folder / f"d{at}.md").write_text(document(at))
    lines = [
        {"question": f"{TOPICS[at // 8]} {TOPICS[at % 8]}?", "relevant": [f"docs/d{at}.md"], "id": f"q{at}"}
        for at in range(COUNT)
    ]
    (root / "questions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with running(root / "home", root, "--no-engine") as service, Client(service.url) as client:
        client.put_collection("shop", CollectionSettings(retrieval=Retrieval(dense_weight=1)))
        assert service.ingest(folder, collection="shop")["state"] == "succeeded"
        yield service


@pytest.fixture
def client(shop: Service) -> Iterator[Client]:
    with Client(shop.url) as opened:
        yield opened


def found(client: Client, question: str, **fields: Any) -> list[str]:
    request = SearchRequest(question=question, collection="shop", top_k=5, **fields)
    return [hit.path for hit in client.retrieve(request).hits]


def put_adapter(shop: Service, name: str, matrix: np.ndarray[Any, Any], fingerprint: str | None = None) -> None:
    settings = IngestSettings(home=shop.home, embedder_runtime="onnxruntime")
    embedder = load_embedder("bge-small-en-v1.5", settings)
    folder = shop.home / FOLDER / name
    folder.mkdir(parents=True)
    write_query_adapter(
        folder, QueryAdapter(matrix.astype(np.float32), embedder.name, fingerprint or embedder.fingerprint)
    )


def test_a_query_adapter_moves_questions_alone_and_is_taken_back(shop: Service, client: Client) -> None:
    before, view = found(client, "pump pump?"), client.collection("shop")
    put_adapter(shop, "turned", -np.eye(384))
    how = Retrieval(dense_weight=1, query_adapter="turned")
    assert found(client, "pump pump?", retrieval=how) != before
    client.put_collection("shop", CollectionSettings(retrieval=how))
    assert found(client, "pump pump?") == found(client, "pump pump?", retrieval=how) != before
    assert client.collection("shop").fingerprint == view.fingerprint  # nothing was embedded anew
    assert len(client.indexes("shop")) == 1
    done = run_graft(shop.home, "collections", "query-adapter", "shop", "none", cwd=shop.root)
    assert done.returncode == 0, done.stderr
    assert found(client, "pump pump?") == before
    assert client.collection("shop").retrieval == view.retrieval


def test_one_of_another_embedder_and_one_that_is_not_there_are_refused(shop: Service, client: Client) -> None:
    put_adapter(shop, "foreign", np.eye(384), "0" * 64)
    for name, error, said in (
        ("foreign", InvalidError, "is for vectors of"),
        ("nowhere", NotFoundError, "no query adapter 'nowhere'"),
    ):
        how = Retrieval(dense_weight=1, query_adapter=name)
        with pytest.raises(error, match=said):
            client.put_collection("shop", CollectionSettings(retrieval=how))
        with pytest.raises(error, match=said):
            found(client, "pump?", retrieval=how)


def test_what_finds_worse_is_not_taken(shop: Service, client: Client) -> None:
    dataset = read_dataset(shop.root / "questions.jsonl")
    put_adapter(shop, "worse", -np.eye(384))
    verdict = adopt_if_better(client, "shop", "worse", dataset)
    assert not verdict.made
    assert "finds no better" in verdict.why
    assert client.collection("shop").retrieval.query_adapter is None
    few = dataset.model_copy(update={"cases": dataset.cases[: FEWEST - 1]})
    with pytest.raises(InvalidError, match="too few to decide by"):
        adopt_if_better(client, "shop", "worse", few)


def test_what_finds_better_is_taken(shop: Service, client: Client) -> None:
    """The collection has a map that finds nothing, and one that undoes it."""
    dataset = read_dataset(shop.root / "questions.jsonl")
    put_adapter(shop, "lost", -np.eye(384))
    put_adapter(shop, "kept", np.eye(384))
    client.put_collection("shop", CollectionSettings(retrieval=Retrieval(dense_weight=1, query_adapter="lost")))
    verdict = adopt_if_better(client, "shop", "kept", dataset)
    assert verdict.made
    assert verdict.difference.p < 0.05
    assert client.collection("shop").retrieval.query_adapter == "kept"
    client.put_collection("shop", CollectionSettings(retrieval=Retrieval(dense_weight=1)))


def tiny_bert(folder: Path, models: Path, is_deaf: bool = False) -> Path:
    """`is_deaf`: every word has the same vector, so that it finds nothing."""
    import shutil

    import torch
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True)
    source = models / "bge-small-en-v1.5"
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(source / name, folder / name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = BertConfig(
            vocab_size=30522, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
        )
        model = BertModel(config, add_pooling_layer=False)
    if is_deaf:
        torch.nn.init.zeros_(model.embeddings.word_embeddings.weight)
    model.save_pretrained(folder)
    card = {"name": "tiny", "pooling": "mean", "languages": ["en"], "max_tokens": 256}
    (folder / "graft-model.json").write_text(json.dumps(card))
    from finetune.encoder_onnx import write_encoder
    from finetune.encoder_weights import load_encoder

    write_encoder(load_encoder(folder), folder / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def tuned(shop: Service, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT tuned on the shop's questions, by the command."""
    base, out = tiny_bert(tmp_path_factory.mktemp("tiny") / "base", models), shop.root / "tuned"
    given = ("learning_rate=1e-2", "num_train_epochs=8", "eval_steps=4", "stop=0.1", "held_out=0.5", "patience=0")
    sets = [part for one in given for part in ("--set", one)]
    command = [
        "tune",
        "embedder",
        "--data",
        "questions.jsonl",
        "-c",
        "shop",
        "--base",
        str(base),
        "--out",
        str(out),
        *sets,
    ]
    done = run_graft(shop.home, *command, cwd=shop.root, FINETUNE_THREADS="1")
    assert done.returncode == 0, done.stderr
    return out


def test_an_embedder_is_tuned_exported_and_loaded(tuned: Path, settings: IngestSettings) -> None:
    from finetune.retrieval_run import read_retrieval_manifest

    manifest = read_retrieval_manifest(tuned)
    log = [json.loads(line) for line in (tuned / "log.jsonl").read_text().splitlines()]
    losses = [one["loss"] for one in log if "loss" in one]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert manifest.exported is not None
    assert manifest.exported.most_difference < 1e-5
    assert manifest.questions + manifest.stopping + len(manifest.held_out) == COUNT
    assert set(manifest.scores) == {"fused", "dense"}
    assert not (tuned / "checkpoints").exists()
    assert not (tuned / "start").exists()
    embedder = load_embedder(str(tuned), settings)
    from sentence_transformers import SentenceTransformer

    texts = [document(at) for at in range(5)]
    same = SentenceTransformer(str(tuned)).encode(texts, normalize_embeddings=True)
    assert np.allclose(embedder.embed(texts), unit(np.asarray(same)), atol=1e-5)


def test_an_index_that_finds_worse_is_left_and_one_that_finds_better_is_flipped_to(
    shop: Service, client: Client, models: Path, tmp_path: Path
) -> None:
    deaf = tiny_bert(tmp_path / "deaf", models, is_deaf=True)
    dataset = read_dataset(shop.root / "questions.jsonl")
    bundled = client.collection("shop").fingerprint
    job = client.wait(client.reindex("shop", ReindexRequest(embedder=str(deaf), flip=False)).job_id)
    assert job.state == "succeeded", job
    (ready,) = [one for one in client.indexes("shop") if one.embedder == str(deaf)]
    assert found(client, "pump pump?", index=ready.fingerprint[:12]) != found(client, "pump pump?")
    verdict = flip_if_better(client, "shop", ready.fingerprint[:12], dataset)
    assert not verdict.made
    assert client.collection("shop").fingerprint == bundled
    until(lambda: client.wait(client.activate_index("shop", ready.fingerprint).job_id).state == "succeeded", 30)
    done = run_graft(shop.home, "eval", "flip", "shop", bundled[:12], "questions.jsonl", cwd=shop.root)
    assert done.returncode == 0, done.stderr
    assert "made" in done.stdout
    assert client.collection("shop").fingerprint == bundled
    with pytest.raises(InvalidError, match="is live already"):
        flip_if_better(client, "shop", bundled[:12], dataset)
