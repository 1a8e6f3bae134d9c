"""Two runs of the same cases: how much each metric changed, and whether chance alone would do that. Pure functions."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from eval.case_rows import reason
from eval.resample import compared
from eval.schemas import AnswersRun, Difference, RetrievalRun, Run
from ingest.errors import InvalidError


def read_run(path: Path) -> RetrievalRun | AnswersRun:
    """What `--json` wrote. Raises InvalidError, OSError."""
    try:
        read: RetrievalRun | AnswersRun = TypeAdapter(Run).validate_json(path.read_bytes())
    except ValidationError as error:
        said = reason(error).partition("; ")[0]
        raise InvalidError(f"{str(path)!r} is not a run that `graft eval` wrote with --json: {said}") from error
    return read


def shared(before: Run, after: Run) -> tuple[str, ...]:
    """-> ids of the cases that are in both, and ask the same."""
    asked = {one.case.id: one.case.question for one in before.cases}
    return tuple(sorted(one.case.id for one in after.cases if asked.get(one.case.id) == one.case.question))


def differences(before: Run, after: Run, seed: int = 0) -> list[Difference]:
    """Of each metric that both have, over the cases for which both have it.

    p and interval as `resample.compared` has them. The order of cases does not matter. Raises InvalidError when the
    runs are of different kinds or data sets, or share no case.
    """
    check_comparable(before, after)
    held, got = _scores(before), _scores(after)
    cases = shared(before, after)
    found = []
    for name in (name for name in _names(before) if name in set(_names(after))):
        having = [one for one in cases if name in held[one] and name in got[one]]
        if having:
            old, new = ([scores[one][name] for one in having] for scores in (held, got))
            found.append(compared(name, having, old, new, seed))
    return found


def check_comparable(before: Run, after: Run) -> None:
    """Raises InvalidError."""
    if before.kind != after.kind:
        raise InvalidError(
            f"a run of {before.kind} and one of {after.kind} have no metrics in common; compare two of a kind"
        )
    if before.facts.dataset != after.facts.dataset:
        raise InvalidError(
            f"the runs are of different data sets, {before.facts.dataset!r} and {after.facts.dataset!r}; compare two of the same"
        )
    if not shared(before, after):
        raise InvalidError(f"the runs of {before.facts.dataset!r} share no case; ask the same sample (--limit, --seed)")


def _names(run: Run) -> list[str]:
    return list(dict.fromkeys([*run.metrics, *(name for one in _scores(run).values() for name in one)]))


def _scores(run: Run) -> dict[str, Mapping[str, float]]:
    if run.kind == "retrieval":
        return {one.case.id: one.metrics for one in run.cases}
    return {one.case.id: one.scores for one in run.cases}
