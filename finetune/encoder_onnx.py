"""A tuned encoder as the CPU runtimes read it: BERT (Devlin et al., 2019) in ONNX, float32, with or without a head of one logit.

RoBERTa and XLM-R are the same but for their positions, which begin after the padding's number, and their head. What is written is
run and compared with torch before anybody uses it.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ingest.errors import InvalidError
from ingest.onnx_writer import FLOAT, INT64, Graph, Input

GELU = ("gelu",)


class _Encoder(NamedTuple):
    """`weights`: float32, by their names without the model's prefix."""

    weights: dict[str, NDArray[np.float32]]
    width: int
    layers: int
    heads: int
    epsilon: float
    first_position: int
    has_types: bool


def write_encoder(model: Any, file: Path) -> None:
    """Inputs input_ids, attention_mask, token_type_ids (texts, tokens) -> last_hidden_state (texts, tokens, width), or with a
    head logits (texts, 1). Raises InvalidError for what has no place in it.
    """
    encoder = _read(model)
    graph = Graph()
    hidden = _embeddings(graph, encoder)
    mask = graph.node("Unsqueeze", graph.node("Cast", "attention_mask", to=FLOAT), graph.constant(np.array([1, 2])))
    bias = graph.node("Mul", graph.node("Sub", graph.scalar(1), mask), graph.scalar(-1e9))
    for number in range(encoder.layers):
        hidden = _layer(graph, encoder, f"encoder.layer.{number}", hidden, bias)
    inputs = [Input(name, INT64, ("texts", "tokens")) for name in ("input_ids", "attention_mask")]
    inputs += [Input("token_type_ids", INT64, ("texts", "tokens"))] if encoder.has_types else []
    if any(name.startswith("classifier.") for name in encoder.weights):
        graph.node("Identity", _head(graph, encoder, hidden), output="logits")
        file.write_bytes(graph.serialise("reranker", inputs, [Input("logits", FLOAT, ("texts", 1))]))
        return
    graph.node("Identity", hidden, output="last_hidden_state")
    output = Input("last_hidden_state", FLOAT, ("texts", "tokens", encoder.width))
    file.write_bytes(graph.serialise("embedder", inputs, [output]))


def _read(model: Any) -> _Encoder:
    from finetune.encoder_weights import KNOWN, short_name

    config = model.config
    unfit = [
        f"{name} = {getattr(config, name)!r}"
        for name, fitting in (("model_type", KNOWN), ("hidden_act", GELU), ("position_embedding_type", ("absolute",)))
        if getattr(config, name, fitting[0]) not in fitting
    ]
    if unfit:
        raise InvalidError(f"a model with {unfit[0]} is not exported to ONNX: tune one of {', '.join(KNOWN)}")
    weights = {
        short_name(name): value.detach().cpu().float().numpy() for name, value in model.state_dict().items()
        if value.dtype.is_floating_point
    }  # fmt: skip
    is_bert = config.model_type == "bert"
    return _Encoder(
        weights=weights,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        epsilon=config.layer_norm_eps,
        first_position=0 if is_bert else config.pad_token_id + 1,
        has_types=is_bert,
    )


def _embeddings(graph: Graph, encoder: _Encoder) -> str:
    """Words, positions and types, summed and normalised: (texts, tokens, width)."""
    held = encoder.weights
    words = graph.node("Gather", graph.constant(held["embeddings.word_embeddings.weight"]), "input_ids")
    table = held["embeddings.position_embeddings.weight"][encoder.first_position :]
    types = held["embeddings.token_type_embeddings.weight"]
    if not encoder.has_types:
        table = table + types[0]
    start, tokens = graph.constant(np.array([0])), graph.node("Shape", "input_ids", start=1, end=2)
    positions = graph.node("Slice", graph.constant(table), start, tokens, start)
    summed = graph.node("Add", words, positions)
    if encoder.has_types:
        summed = graph.node("Add", summed, graph.node("Gather", graph.constant(types), "token_type_ids"))
    return _normalised(graph, encoder, "embeddings.LayerNorm", summed)


def _layer(graph: Graph, encoder: _Encoder, name: str, hidden: str, bias: str) -> str:
    context = _attention(graph, encoder, f"{name}.attention.self", hidden, bias)
    attended = graph.node("Add", hidden, _linear(graph, encoder, f"{name}.attention.output.dense", context))
    hidden = _normalised(graph, encoder, f"{name}.attention.output.LayerNorm", attended)
    inner = _gelu(graph, _linear(graph, encoder, f"{name}.intermediate.dense", hidden))
    given = graph.node("Add", hidden, _linear(graph, encoder, f"{name}.output.dense", inner))
    return _normalised(graph, encoder, f"{name}.output.LayerNorm", given)


def _attention(graph: Graph, encoder: _Encoder, name: str, hidden: str, bias: str) -> str:
    """-> the heads' contexts side by side, before their projection."""
    size = encoder.width // encoder.heads
    by_head = graph.constant(np.array([0, 0, encoder.heads, size]))

    def heads(part: str, order: list[int]) -> str:
        values = graph.node("Reshape", _linear(graph, encoder, f"{name}.{part}", hidden), by_head)
        return graph.node("Transpose", values, perm=order)

    query, key, value = heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1]), heads("value", [0, 2, 1, 3])
    scores = graph.node("Mul", graph.node("MatMul", query, key), graph.scalar(size**-0.5))
    weights = graph.node("Softmax", graph.node("Add", scores, bias), axis=-1)
    context = graph.node("Transpose", graph.node("MatMul", weights, value), perm=[0, 2, 1, 3])
    return graph.node("Reshape", context, graph.constant(np.array([0, 0, encoder.width])))


def _head(graph: Graph, encoder: _Encoder, hidden: str) -> str:
    """Over the first token's state: BERT's pooler and classifier, or RoBERTa's two layers."""
    first = graph.node("Gather", hidden, graph.constant(np.array(0)), axis=1)
    inner, outer = ("pooler.dense", "classifier") if encoder.has_types else ("classifier.dense", "classifier.out_proj")
    return _linear(graph, encoder, outer, graph.node("Tanh", _linear(graph, encoder, inner, first)))


def _linear(graph: Graph, encoder: _Encoder, name: str, values: str) -> str:
    weight = np.ascontiguousarray(encoder.weights[f"{name}.weight"].T)
    product = graph.node("MatMul", values, graph.constant(weight))
    return graph.node("Add", product, graph.constant(encoder.weights[f"{name}.bias"]))


def _gelu(graph: Graph, values: str) -> str:
    """In the form that both runtimes recognise: (x * (1 + erf(x / sqrt 2))) / 2."""
    one = graph.node("Add", graph.node("Erf", graph.node("Div", values, graph.scalar(math.sqrt(2)))), graph.scalar(1))
    return graph.node("Mul", graph.node("Mul", values, one), graph.scalar(0.5))


def _normalised(graph: Graph, encoder: _Encoder, name: str, values: str) -> str:
    weight, bias = (graph.constant(encoder.weights[f"{name}.{part}"]) for part in ("weight", "bias"))
    return graph.node("LayerNormalization", values, weight, bias, axis=-1, epsilon=encoder.epsilon)
