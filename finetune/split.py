"""A data set in two: questions to learn from, and questions that measure, with no document on both sides."""

import random
from collections.abc import Sequence

from eval.groups import connected
from eval.schemas import Case, DataSet
from ingest.errors import InvalidError


def split_dataset(dataset: DataSet, share: float, seed: int) -> tuple[DataSet, DataSet]:
    """-> (to learn from, held out), `share` of the questions in the second. Questions that share a document, or an article,
    stay together; documents that no question is about go with chance. Raises InvalidError where one side would be empty.
    """
    groups = _groups(dataset.cases)
    chance = random.Random(seed)
    wanted, held = share * len(dataset.cases), list[Case]()
    for group in chance.sample(sorted(groups, key=lambda group: group[0].id), len(groups)):
        if len(held) + len(group) / 2 <= wanted:  # whichever is nearer
            held += group
    ids = {case.id for case in held}
    documents = {document for case in held for document in case.relevant}
    asked = {document for case in dataset.cases for document in case.relevant}
    documents |= {one.id for one in dataset.documents if one.id not in asked and chance.random() < share}
    learn = tuple(case for case in dataset.cases if case.id not in ids)
    if not held or not learn:
        raise InvalidError(
            f"{dataset.name!r} cannot be split: its questions are all about the same documents; give it another share"
        )
    sides = []
    for name, cases, held_out in (("learn", learn, False), ("held-out", tuple(held), True)):
        texts = tuple(one for one in dataset.documents if (one.id in documents) == held_out)
        lines = {case.id: dataset.lines[case.id] for case in cases if case.id in dataset.lines}
        sides.append(DataSet(name=f"{dataset.name}/{name}", documents=texts, cases=cases, lines=lines))
    return sides[0], sides[1]


def _groups(cases: Sequence[Case]) -> list[list[Case]]:
    """Connected by a document, or by the article that a data set names."""
    found = connected(
        [
            [*case.relevant, *([("article", case.slices["document"])] if "document" in case.slices else [])]
            for case in cases
        ]
    )
    return [[cases[at] for at in group] for group in found]
