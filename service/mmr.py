"""Hits -> hits without repetition: maximal marginal relevance (Carbonell and Goldstein, 1998)."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ingest.schemas import Hit

POOL = 100  # hits that are chosen from, at most


def diversified(
    hits: Sequence[Hit], spaces: Sequence[Mapping[str, NDArray[np.float32]]], balance: float, count: int
) -> list[Hit]:
    """The `count` hits that are relevant and unlike those before them, each the best of the rest by

        balance * relevance - (1 - balance) * likeness to the most similar one chosen.

    Relevance is the reranker's score, else the fused one; hits that the reranker has read come before all others, since the
    two are no common scale. Relevance and cosines are scaled to 0..1 over the hits: an embedder's cosines may all lie
    between .7 and 1. `spaces`: of each embedder, unit vectors by chunk; hits of different embedders are not alike.
    """
    read = [hit for hit in hits if hit.rerank_score is not None]
    others = [hit for hit in hits if hit.rerank_score is None]
    ordered = [*read, *others]
    likeness = sum((_likeness(ordered, vectors) for vectors in spaces), np.zeros((len(ordered), len(ordered))))
    scores = _scaled([hit.rerank_score or 0.0 for hit in read]), _scaled([hit.score for hit in others])
    relevance = np.concatenate(scores)
    chosen: list[int] = []
    for places in (range(len(read)), range(len(read), len(hits))):
        left = list(places)
        while left and len(chosen) < count:
            nearest = likeness[np.ix_(left, chosen)].max(axis=1) if chosen else np.zeros(len(left))
            best = left[int(np.argmax(balance * relevance[left] - (1 - balance) * nearest))]
            chosen.append(best)
            left.remove(best)
    return [ordered[place] for place in chosen]


def _likeness(hits: Sequence[Hit], vectors: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    """(hits, hits): cosines, scaled so that the lowest is 0 and equal vectors have 1."""
    known = [place for place, hit in enumerate(hits) if hit.chunk_id in vectors]
    found = np.zeros((len(hits), len(hits)))
    if len(known) < 2:
        return found
    rows = np.stack([vectors[hits[place].chunk_id] for place in known]).astype(np.float64)
    cosines = rows @ rows.T
    low = float(cosines.min())
    found[np.ix_(known, known)] = (cosines - low) / (1 - low) if low < 1 else 1.0
    return found


def _scaled(scores: Sequence[float]) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if not len(values):
        return values
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.ones_like(values)
