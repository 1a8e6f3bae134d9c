"""Hard negatives: what our own search finds first for a question, and no judgement names.

What is not judged may be relevant all the same (Qu et al., 2021, arXiv 2010.08191), so three things are never taken: passages of
the relevant documents, passages that say the same as one of theirs, and passages whose cosine lies clearly above that of the best
relevant one (after NV-Retriever, Moreira et al., 2024, arXiv 2407.15831).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from eval.schemas import Case
from finetune.passages import Searched, golds
from finetune.retrieval_recipe import Mining
from finetune.rows_split import normal
from ingest.embed import Vectors


class Mined(NamedTuple):
    """Places of passages: `positive`, the best relevant one by the embedder as it is, and `negatives`, hardest first."""

    question: str
    positive: int
    negatives: tuple[int, ...]
    right: frozenset[int] = frozenset()  # passages of all its relevant documents


def mine(
    cases: Sequence[Case],
    questions: Vectors,
    vectors: Vectors,
    search: Searched,
    how: Mining,
    given: Mapping[str, Sequence[str]] = {},
) -> list[Mined]:
    """One for each relevant document of a case. `questions`: (cases, dimension); `vectors`: (passages, dimension); `given`: by
    case, documents that are known to be wrong, which come first.
    """
    passages = search.passages
    by_document: dict[str, list[int]] = {}
    for at, document in enumerate(passages.documents):
        by_document.setdefault(document, []).append(at)
    found = []
    for case, question, right in zip(cases, questions, golds(cases, passages), strict=True):
        if not right:
            continue
        cosines = vectors @ question
        forbidden, said = set(right), {normal(passages.texts[at]) for at in right}
        most = max(cosines[at] for at in right) + how.most_above
        known = (at for one in given.get(case.id, ()) for at in by_document.get(one, ()))
        negatives = [at for at in known if at not in forbidden]
        for at in search.search(case.question, question)[: how.depth] if len(negatives) < how.negatives else ():
            if at not in forbidden and cosines[at] <= most and normal(passages.texts[at]) not in said:
                negatives.append(at)
        chosen = tuple(dict.fromkeys(negatives))[: how.negatives]
        for document, grade in case.relevant.items():
            own = by_document.get(document, ()) if grade > 0 else ()
            if own:
                found.append(
                    Mined(case.question, max(own, key=lambda at: float(cosines[at])), chosen, frozenset(right))
                )
    return found


def evenly(mined: Sequence[Mined], count: int, seed: int) -> list[Mined]:
    """-> each with `count` negatives: those that have fewer get passages drawn by chance from others' negatives and positives,
    never ones of their own question.
    """
    random = np.random.default_rng(seed)
    others = sorted({at for one in mined for at in (one.positive, *one.negatives)})
    full = []
    for one in mined:
        negatives = list(one.negatives)
        if len(negatives) < count:
            free = [at for at in others if at not in one.right and at not in negatives]
            drawn = random.choice(free, min(count - len(negatives), len(free)), replace=False) if free else ()
            negatives += [int(at) for at in drawn]
        full.append(one._replace(negatives=tuple(negatives[:count])))
    return full
