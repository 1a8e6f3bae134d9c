"""Lists of hits, best first -> one: of several collections, of documents, of parents."""

from collections.abc import Sequence

from ingest.schemas import Hit

RANKS = 60  # the constant of reciprocal ranks


def fused(lists: Sequence[tuple[object, list[Hit]]]) -> list[Hit]:
    """(scale, hits best first) -> one list: by score within a scale; of several scales by reciprocal rank (Cormack et al.,
    2009), which then is the score. Ties go to what was named first.
    """
    scales = list(dict.fromkeys(scale for scale, _ in lists))
    groups = [
        sorted((hit for scale, hits in lists if scale == wanted for hit in hits), key=lambda hit: -hit.score)
        for wanted in scales
    ]
    if len(groups) == 1:
        return groups[0]
    by_rank = [
        hit.model_copy(update={"score": (RANKS + 1) / (RANKS + rank)})
        for group in groups
        for rank, hit in enumerate(group, 1)
    ]
    return sorted(by_rank, key=lambda hit: -hit.score)


def best_of_documents(hits: list[Hit]) -> list[Hit]:
    best: dict[str, Hit] = {}
    for hit in hits:
        best.setdefault(hit.document_id, hit)
    return list(best.values())


def best_of_parents(hits: list[Hit]) -> list[Hit]:
    """A hit without a parent stands for itself."""
    best: dict[object, Hit] = {}
    for hit in hits:
        best.setdefault((hit.document_id, hit.parent) if hit.parent else hit.chunk_id, hit)
    return list(best.values())
