"""What `graft tune` makes of a collection's questions, through the service: a query adapter that is taken and taken back, an
embedder whose index is flipped to or left. The embedder is a tiny BERT with random weights, so that it learns in seconds.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from service_fixtures import Service, environment, hit, run_graft, running, until

from eval.cases import read_dataset
from eval.flip import FEWEST, adopt_if_better, flip_if_better
from finetune import runs
from finetune.cli_retrieval import tune_retrieval
from finetune.embedder import tune_embedder
from finetune.encoder_onnx import write_encoder
from finetune.encoder_weights import load_encoder
from finetune.frozen_layers import kept
from finetune.hooks import SILENT, Hooks, StoppedError
from finetune.reranker import tune_reranker
from finetune.retrieval_recipe import read_retrieval_recipe
from finetune.retrieval_rows import read_asked
from finetune.retrieval_run import Ready, read_retrieval_manifest, ready
from finetune.settings import FinetuneSettings
from ingest.embed import load_embedder
from ingest.errors import InvalidError, NotFoundError
from ingest.query_adapter import FOLDER, QueryAdapter, write_query_adapter
from ingest.schemas import Chunking, Retrieval
from ingest.settings import IngestSettings
from service.client import Client
from service.rerank import Reranker
from service.schemas import CollectionSettings, SearchRequest
from service.schemas_jobs import ReindexRequest

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


def tune(shop: Service, recipe: str, *settings: str, **options: Any) -> None:
    """`graft tune`, in this process, which has loaded torch already."""
    given: dict[str, Any] = dict.fromkeys(("split", "collection", "to_folder", "base", "to"))
    given |= {"apply": False, "restart": False, "data": shop.root / "questions.jsonl", **options}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(shop.home).items():
            patch.setenv(name, value)
        tune_retrieval(recipe, settings=settings, finetune=FinetuneSettings(threads=1), **given)


def test_a_query_adapter_is_learned_and_decided_on_by_one_command(shop: Service, client: Client) -> None:
    given = ("held_out=0.5", "steps=5", "penalties=[1.0]")
    command = ("tune", "query-adapter", "--data", "questions.jsonl", "-c", "shop", "--apply", "--json", "verdict.json")
    done = run_graft(shop.home, *command, *(part for one in given for part in ("--set", one)), cwd=shop.root)
    assert done.returncode == 0, done.stderr
    verdict = json.loads((shop.root / "verdict.json").read_text())
    assert verdict["difference"]["cases"] == COUNT / 2
    (folder,) = (shop.home / FOLDER).glob("query-adapter-*")
    assert verdict["change"] == f"query adapter {folder.name}"
    assert (client.collection("shop").retrieval.query_adapter == folder.name) == verdict["made"]
    client.put_collection("shop", CollectionSettings(retrieval=Retrieval(dense_weight=1)))
    made = (folder / "manifest.json").stat().st_mtime_ns
    again = shop.root / "again.json"
    tune(shop, "query-adapter", *given, collection="shop", apply=True, to=str(again))
    assert json.loads(again.read_text())["change"] == verdict["change"]
    assert (folder / "manifest.json").stat().st_mtime_ns == made  # a finished run is not done again
    client.put_collection("shop", CollectionSettings(retrieval=Retrieval(dense_weight=1)))


def test_what_cannot_be_is_refused_before_anything_is_learned(shop: Service) -> None:
    held, here = set(shop.root.iterdir()), {"collection": "shop", "apply": True}
    for recipe, settings, options, said in (
        ("embedder", "learning_rat=1e-3", {}, r"'learning_rat': did you mean learning_rate"),
        ("embedder", "output_dir=x", {}, r"'output_dir' cannot be set: give --out DIR"),
        ("reranker", "negatives=0", {}, r"mining\.negatives must be at least 1"),
        ("query-adapter", "negatives=2", {}, r"has no \[mining\]"),
        ("query-adapter", "learning_rate=1", {}, r"has no 'learning_rate'"),
        ("query-adapter", "held_out=0.8", {}, r"leave no question to learn from"),
        ("query-adapter", "stop=0.1", {}, r"name the collection that they are about"),
        ("query-adapter", "stop=0.1", {"apply": True}, r"--collection NAME"),
        ("reranker", "stop=0.1", here, r"a reranker is the service's"),
        ("query-adapter", "held_out=0.2", here, r"8 of 40 are held out"),
        (
            "query-adapter",
            "held_out=0.5",
            here | {"to_folder": shop.root / "No Name"},
            r"is no name of a query adapter",
        ),
        ("query-adapter", "stop=0.1", {"to": str(shop.root / "no/file.json")}, r"cannot be written"),
    ):
        with pytest.raises(InvalidError, match=said):
            tune(shop, recipe, settings, **options)
    assert set(shop.root.iterdir()) == held


def tiny_bert(folder: Path, models: Path, is_deaf: bool = False, is_cross: bool = False) -> Path:
    """Two layers. `is_deaf`: each word has the same vector, so that it finds nothing. `is_cross`: with a head, without ONNX."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    folder.mkdir(parents=True)
    source = models / "bge-small-en-v1.5"
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(source / name, folder / name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        config = BertConfig(vocab_size=30522, num_labels=1, **sizes)
        model = BertForSequenceClassification(config) if is_cross else BertModel(config, add_pooling_layer=False)
    if is_deaf:
        torch.nn.init.zeros_(model.embeddings.word_embeddings.weight)
    model.save_pretrained(folder)
    card = {"name": "tiny", "pooling": "mean", "languages": ["en"], "max_tokens": 256, "query_prefix": "find: "}
    (folder / "graft-model.json").write_text(json.dumps(card))
    if not is_cross:
        write_encoder(load_encoder(folder), folder / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def base(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("tiny") / "base", models)


@pytest.fixture(scope="module")
def tuned(shop: Service, base: Path) -> Path:
    """A tiny BERT tuned on the shop's questions, its lower layer as it was."""
    out = shop.root / "tuned"
    given = ("learning_rate=1e-2", "num_train_epochs=8", "eval_steps=4", "stop=0.1", "held_out=0.5", "patience=0")
    tune(shop, "embedder", *given, "frozen_layers=1", "max_tokens=32", collection="shop", base=str(base), to_folder=out)
    return out


def test_an_embedder_is_tuned_exported_and_loaded(tuned: Path, base: Path, settings: IngestSettings) -> None:
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
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("encoder.layer.1.") for name in changed)
    embedder = load_embedder(str(tuned), settings)
    texts = [document(at) for at in range(5)]
    from sentence_transformers import SentenceTransformer

    same = SentenceTransformer(str(tuned))
    assert np.allclose(embedder.embed(texts), same.encode(texts), atol=1e-5)  # of length 1, in full length
    assert np.allclose(embedder.embed_query(texts[0]), same.encode_query(texts[0]), atol=1e-5)  # with the prefix


def test_kept_states_of_frozen_layers_are_what_the_model_gives(base: Path) -> None:
    import torch

    encoder = load_encoder(base).eval()
    ids = torch.tensor([[101, 2054, 102, 0, 0], [101, 2054, 2003, 1996, 102]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        given = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        with kept(encoder, 1):
            made = [encoder(input_ids=ids, attention_mask=mask).last_hidden_state for _ in range(2)]
        for one in made:  # computed, and from float16
            assert torch.allclose(one[mask.bool()], given[mask.bool()], atol=5e-3)
        assert torch.equal(encoder(input_ids=ids, attention_mask=mask).last_hidden_state, given)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    lines = [
        {
            "question": f"{TOPICS[at // 8]} {TOPICS[at % 8]}?",
            "positive": document(at),
            "negative": document((at + 8) % COUNT),
        }
        for at in range(COUNT)
    ]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


def prepared(
    name: str, pairs: Path, base: Path, out: Path, settings: IngestSettings, *given: str, hooks: Hooks = SILENT
) -> Ready:
    recipe = read_retrieval_recipe(name, ("learning_rate=1e-2", "held_out=0.5", "patience=0", *given))
    asked = read_asked(pairs)
    return ready(recipe, asked, str(base), Chunking(), out, settings, FinetuneSettings(threads=1), hooks)


def test_a_run_that_was_ended_goes_on(pairs: Path, base: Path, settings: IngestSettings, tmp_path: Path) -> None:
    out, looks = tmp_path / "out", iter(range(100))
    out.mkdir()
    stopped = Hooks(cancelled=lambda: next(looks) >= 2)
    given = ("num_train_epochs=2", "per_device_train_batch_size=4", "eval_steps=4", "stop=0.1")
    assert runs.begin_as(out, {"run": 1}) is None
    with pytest.raises(StoppedError, match="step 3"):
        tune_embedder(prepared("embedder", pairs, base, out, settings, *given, hooks=stopped), False)
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 99}\n{"st')  # what a kill leaves
    assert runs.begin_as(out, {"run": 1}) is not None
    manifest = tune_embedder(prepared("embedder", pairs, base, out, settings, *given), True)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [one["step"] for one in log if "loss" in one] == list(range(1, int(manifest.metrics["steps"]) + 1))
    assert all(one.get("loss") != 99 for one in log)


def test_a_reranker_is_tuned_exported_and_read(
    pairs: Path, base: Path, models: Path, settings: IngestSettings, tmp_path: Path
) -> None:
    cross, out = tiny_bert(tmp_path / "cross", models, is_cross=True), tmp_path / "out"
    out.mkdir()
    run = prepared("reranker", pairs, base, out, settings, "num_train_epochs=6", "frozen_layers=0", "negatives=2")
    manifest = tune_reranker(run, str(cross), False)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [one["loss"] for one in log if "loss" in one]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert manifest.exported is not None
    assert manifest.exported.measure == "probability"
    assert manifest.exported.most_difference < 1e-5
    assert manifest.scores["reranked"].cases == len(manifest.held_out)
    hits = [hit(document(at), at) for at in range(6)]
    read = Reranker(str(out), settings, 60).rerank("pump oven?", hits)
    from sentence_transformers import CrossEncoder

    given = CrossEncoder(str(out)).predict([("pump oven?", one.text) for one in read])
    assert [one.rerank_score for one in read] == pytest.approx(list(given), abs=1e-5)
    with pytest.raises(InvalidError, match=r"frozen_layers = 2: the model has 2 layers"):
        tune_reranker(prepared("reranker", pairs, base, out, settings, "frozen_layers=2"), str(cross), False)


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
