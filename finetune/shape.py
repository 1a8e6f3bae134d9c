"""The widths of a decoder, from its config.json: how many parameters it has, and where. Reads no weights."""

import json
from pathlib import Path
from typing import NamedTuple

from ingest.errors import InvalidError


class Shape(NamedTuple):
    """Of a decoder. `queries`, `keys`: their width over all heads; `heads`: of queries; `tied`: the head is the embedding."""

    hidden: int
    inner: int
    layers: int
    heads: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool
    experts: int

    def matrices(self) -> dict[str, tuple[int, int]]:
        """-> (in, out) of a layer's linear maps, but those of experts, by the names that they have in most models."""
        hidden, inner = self.hidden, self.inner
        attention = {
            "self_attn.q_proj": (hidden, self.queries),
            "self_attn.k_proj": (hidden, self.keys),
            "self_attn.v_proj": (hidden, self.keys),
            "self_attn.o_proj": (self.queries, hidden),
        }
        if self.experts > 1:
            return attention
        return attention | {
            "mlp.gate_proj": (hidden, inner),
            "mlp.up_proj": (hidden, inner),
            "mlp.down_proj": (inner, hidden),
        }

    @property
    def layer(self) -> int:
        """Parameters of one."""
        experts = 3 * self.hidden * self.inner * self.experts if self.experts > 1 else 0
        return sum(wide * high for wide, high in self.matrices().values()) + experts + 2 * self.hidden

    @property
    def all(self) -> int:
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer + embeddings + self.hidden


def read_shape(base: Path) -> Shape:
    """From `base`/config.json. Raises InvalidError."""
    try:
        config = json.loads((base / "config.json").read_text())
        config = config.get("text_config") or config
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidError(f"{str(base / 'config.json')!r} cannot be read: {error}") from error

    def size(*names: str, otherwise: int | None = None) -> int:
        found = next((config[name] for name in names if isinstance(config.get(name), int)), otherwise)
        if found is None:
            raise InvalidError(f"{str(base / 'config.json')!r} has no {names[0]}, which the memory is estimated by")
        return int(found)

    hidden, heads = size("hidden_size", "n_embd", "d_model"), size("num_attention_heads", "n_head", "n_heads")
    head = size("head_dim", otherwise=hidden // heads)
    return Shape(
        hidden=hidden,
        inner=size("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", otherwise=4 * hidden),
        layers=size("num_hidden_layers", "n_layer", "n_layers"),
        heads=heads,
        queries=heads * head,
        keys=size("num_key_value_heads", otherwise=heads) * head,
        vocabulary=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        experts=size("num_local_experts", "num_experts", "n_routed_experts", otherwise=1),
    )
