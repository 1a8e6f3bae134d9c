"""The lowest layers of an encoder as they are, while the others train: what they give of a text is computed once, and kept.

A pass of a batch then costs the upper layers alone, forward and backward. States are kept in float16, in memory, up to a limit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from ingest.errors import InvalidError

MOST = 2 * 2**30  # bytes of states that are kept; what comes later is computed each time
Key = tuple[tuple[int, ...], tuple[int, ...]]  # tokens of a text, and their types


def freeze(encoder: Any, count: int) -> None:
    """The word vectors and the lowest `count` layers stay as they are. Raises InvalidError where nothing is left to train."""
    body = encoder.base_model
    layers = body.encoder.layer
    if count >= len(layers):
        raise InvalidError(f"frozen_layers = {count}: the model has {len(layers)} layers, and the last must train")
    for part in (body.embeddings, *layers[:count]) if count else ():
        part.requires_grad_(False)


class States:
    """`held`: by text, (tokens, width)."""

    def __init__(self, encoder: Any, count: int, most: int = MOST) -> None:
        self._body = encoder.base_model
        self._layers = self._body.encoder.layer[:count]
        self._left = most
        self.held: dict[Key, Any] = {}

    def of(self, input_ids: Any, attention_mask: Any, token_type_ids: Any | None = None) -> Any:
        """(texts, tokens) padded on the right -> (texts, tokens, width), in which padding is zero."""
        import torch

        sizes = attention_mask.sum(1)
        mask = (1.0 - attention_mask.float())[:, None, None, :] * torch.finfo(torch.float32).min
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        keys = [
            (tuple(ids[:size]), tuple(kinds[:size]))
            for ids, kinds, size in zip(input_ids.tolist(), types.tolist(), sizes.tolist(), strict=True)
        ]
        missing = [at for at, key in enumerate(keys) if key not in self.held]
        made = {}
        if missing:
            computed = self._computed(input_ids[missing], types[missing], mask[missing])
            made = dict(zip(missing, computed, strict=True))
        width = self._body.config.hidden_size
        found = torch.zeros(*input_ids.shape, width, device=input_ids.device)
        for at, (key, size) in enumerate(zip(keys, sizes.tolist(), strict=True)):
            states = made[at] if at in made else self.held[key]
            found[at, :size] = states[:size]
            if at in made:
                self._keep(key, states[:size])
        return found

    def _computed(self, ids: Any, types: Any, mask: Any) -> Any:
        """As the model does it when it does not train."""
        import torch

        parts = (self._body.embeddings, *self._layers)
        training = [part.training for part in parts]
        for part in parts:
            part.eval()
        try:
            with torch.no_grad():
                states = type(self._body.embeddings).forward(self._body.embeddings, input_ids=ids, token_type_ids=types)
                for layer in self._layers:
                    states = type(layer).forward(layer, states, mask)
        finally:
            for part, was in zip(parts, training, strict=True):
                part.train(was)
        return states

    def _keep(self, key: Key, states: Any) -> None:
        size = states.numel() * 2
        if key not in self.held and size <= self._left:
            self.held[key] = states.half().clone()
            self._left -= size


@contextmanager
def kept(encoder: Any, count: int, states: States | None = None) -> Iterator[None]:
    """Inside, the model reads those states in place of computing them. `states`: of equal lower layers, from before."""
    if not count:
        yield
        return
    body, layers = encoder.base_model, encoder.base_model.encoder.layer[:count]
    found = states or States(encoder, count)

    masks: list[Any] = []  # of the pass that is under way: the word vectors are not told it
    whole = body.forward

    @wraps(whole)
    def seen(input_ids: Any, attention_mask: Any, **others: Any) -> Any:
        masks[:] = [attention_mask]
        return whole(input_ids=input_ids, attention_mask=attention_mask, **others)

    def read(input_ids: Any = None, token_type_ids: Any = None, **_: Any) -> Any:
        return found.of(input_ids, masks[0], token_type_ids)

    def passed_on(hidden: Any, *_: Any, **__: Any) -> Any:
        return hidden

    body.forward, body.embeddings.forward = seen, read
    for layer in layers:
        layer.forward = passed_on
    try:
        yield
    finally:
        for part in (body, body.embeddings, *layers):
            del part.forward
