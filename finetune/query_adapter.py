"""A query adapter is learned: the linear map under which questions lie nearer to their passages than to all others.

The loss is InfoNCE (van den Oord et al., 2018) over all passages of a pool at once, so each passage is a negative of every
question but its own; a question with several relevant passages is content with any of them. The scale of cosines is the one
that suits the vectors as they are: under a lower one, a map gains by making all differences larger, and ranks no better for it.
A penalty on the distance to the identity keeps other questions where they were; how strong it is, questions tell that are not
learned from. L-BFGS, on cached vectors.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval.schemas import Case
from finetune.passages import Passages, golds
from finetune.retrieval_recipe import Moving
from ingest.embed import Vectors
from ingest.errors import InvalidError

Matrix = NDArray[np.float32]
ROWS = 512  # questions whose logits are held at once
SCALES = (20.0, 500.0)  # between which the one that suits is looked for; below, a map hardly learns
Tell = Callable[[int, int, float, float | None], None]  # step, steps, loss, loss on the stopping questions; may raise


class Side(NamedTuple):
    """`questions`: (cases, dimension), of length 1. `right`: of each, places in the pool."""

    questions: Vectors
    right: list[list[int]]


class Learned(NamedTuple):
    """`penalty` None: no map was better than the identity. `losses`: on the stopping questions, by penalty; that of the identity
    under None. `scale`: of cosines, as it was given or found.
    """

    matrix: Matrix
    penalty: float | None
    scale: float
    losses: dict[float | None, float]
    log: list[dict[str, float]]


def side(cases: Sequence[Case], questions: Vectors, passages: Passages, pool: Sequence[int]) -> Side:
    """Cases whose relevant passages are all outside the pool are left out."""
    place = {at: number for number, at in enumerate(pool)}
    right = [[place[at] for at in own if at in place] for own in golds(cases, passages)]
    kept = [at for at, own in enumerate(right) if own]
    return Side(questions[kept], [right[at] for at in kept])


def pool_of(questions: Vectors, vectors: Vectors, right: Sequence[Sequence[int]], most: int) -> list[int]:
    """-> places of at most `most` passages: all; or the relevant ones, then those that are nearest to any question."""
    if len(vectors) <= most:
        return list(range(len(vectors)))
    best = np.full(len(vectors), -1.0, dtype=np.float32)
    for start in range(0, len(questions), ROWS):
        best = np.maximum(best, (questions[start : start + ROWS] @ vectors.T).max(axis=0))
    relevant = list(dict.fromkeys(at for own in right for at in own))[:most]
    best[relevant] = -2.0
    return sorted([*relevant, *(int(at) for at in np.argsort(-best, kind="stable")[: most - len(relevant)])])


def learn_from(
    learned: Sequence[Case],
    stop: Sequence[Case],
    questions: Callable[[Sequence[Case]], Vectors],
    passages: Passages,
    vectors: Vectors,
    how: Moving,
    tell: Tell = lambda *_: None,
) -> Learned:
    """`questions`: the vectors of cases. Raises InvalidError where no question has a passage to learn from."""
    both = [*learned, *stop]
    pool = pool_of(questions(both), vectors, golds(both, passages), how.pool)
    first, second = (side(cases, questions(cases), passages, pool) for cases in (learned, stop))
    if not first.right:
        raise InvalidError("no question has a passage with text to learn from")
    return learn(first, second, vectors[pool], how, tell)


def learn(learned: Side, stop: Side, vectors: Vectors, how: Moving, tell: Tell = lambda *_: None) -> Learned:
    """`vectors`: (pool, dimension). The penalty is chosen by `stop`, from the strongest on, then the map is learned anew from
    both. A map that is better than the identity by less than the standard error of that difference is none.
    """
    identity = np.eye(vectors.shape[1], dtype=np.float32)
    scale = suiting_scale(learned, vectors) if how.scale is None else how.scale
    untouched = each_loss(identity, stop, vectors, scale)
    losses: dict[float | None, float] = {None: float(untouched.mean()) if stop.right else 0.0}
    log: list[dict[str, float]] = []
    penalties = sorted(how.penalties, reverse=True)
    steps = how.steps * (len(penalties) + 1)
    done = 0

    def run(what: Side, penalty: float, start: Matrix) -> Matrix:
        nonlocal done
        begun = done

        def step(loss: float) -> None:
            nonlocal done
            done += 1
            log.append({"step": float(done), "loss": loss, "penalty": penalty})
            tell(done, steps, loss, min(losses.values()) if stop.right else None)

        found = minimised(what, vectors, scale, penalty, start, how.steps, step)
        done = begun + how.steps
        return found

    matrix, best, gained = identity, None, np.zeros(0)
    for penalty in penalties if stop.right else ():
        matrix = run(learned, penalty, matrix)
        each = each_loss(matrix, stop, vectors, scale)
        losses[penalty] = float(each.mean())
        log.append({"step": float(done), "eval_loss": losses[penalty], "penalty": penalty})
        if losses[penalty] > min(losses.values()):
            break  # weaker ones go further the same way
        best, gained = penalty, untouched - each
    if not stop.right:
        best = penalties[0]
    elif len(gained) and gained.mean() <= gained.std() / len(gained) ** 0.5:
        best = None
    if best is None:
        return Learned(identity, None, scale, losses, log)
    both = Side(np.concatenate([learned.questions, stop.questions]), [*learned.right, *stop.right])
    return Learned(run(both, best, identity), best, scale, losses, log)


def suiting_scale(what: Side, vectors: Vectors) -> float:
    """-> the scale of cosines under which questions that no map has moved have the least loss."""
    from scipy.optimize import minimize_scalar

    identity = np.eye(vectors.shape[1], dtype=np.float32)
    low, high = np.log(SCALES)
    found = minimize_scalar(
        lambda logarithm: each_loss(identity, what, vectors, float(np.exp(logarithm))).mean(),
        bounds=(low, high), method="bounded", options={"xatol": 0.02},
    )  # fmt: skip
    return float(np.exp(found.x))


def minimised(
    what: Side,
    vectors: Vectors,
    scale: float,
    penalty: float,
    start: Matrix,
    steps: int,
    step: Callable[[float], None] = lambda _: None,
) -> Matrix:
    """-> the map with the lowest loss + penalty * |map - identity|^2, in at most `steps` steps from `start`."""
    from scipy.optimize import minimize

    size = vectors.shape[1]
    identity = np.eye(size, dtype=np.float32)
    last = 0.0

    def of(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        nonlocal last
        matrix = flat.reshape(size, size).astype(np.float32)
        last, gradient = loss_of(matrix, what, vectors, scale)
        away = matrix - identity
        whole = last + penalty * float((away**2).sum())
        return whole, (gradient + 2 * penalty * away).astype(np.float64).ravel()

    found = minimize(
        of, start.astype(np.float64).ravel(), jac=True, method="L-BFGS-B", callback=lambda _: step(last),
        options={"maxiter": steps, "maxfun": 2 * steps},
    )  # fmt: skip
    return np.asarray(found.x, dtype=np.float32).reshape(size, size)


def loss_of(matrix: Matrix, what: Side, vectors: Vectors, scale: float) -> tuple[float, Matrix]:
    """-> the mean over questions of -log of the softmax' share of the relevant passages, and its gradient, a matrix too."""
    total, gradient = 0.0, np.zeros_like(matrix)
    for start in range(0, len(what.right), ROWS):
        questions, right = what.questions[start : start + ROWS], what.right[start : start + ROWS]
        units, lengths = _moved(questions, matrix)
        logits = scale * (units @ vectors.T)
        rows, places, among = _among(logits, right)
        everything, relevant = _log_sum(logits), _log_sum(among)
        total += float((everything - relevant).sum())
        logits -= everything  # in place: these are large
        np.exp(logits, out=logits)
        among -= relevant
        logits[rows, places] -= np.exp(among[rows, places])
        wanted = scale * (logits @ vectors)  # (questions, dimension): of the unit vectors
        wanted -= units * (units * wanted).sum(axis=1, keepdims=True)
        gradient += (wanted / lengths).T @ questions
    return total / len(what.right), np.asarray(gradient / len(what.right), dtype=np.float32)


def each_loss(matrix: Matrix, what: Side, vectors: Vectors, scale: float) -> NDArray[np.float64]:
    """-> (questions,): what `loss_of` is the mean of."""
    found = []
    for start in range(0, len(what.right), ROWS):
        logits = scale * (_moved(what.questions[start : start + ROWS], matrix)[0] @ vectors.T)
        *_, among = _among(logits, what.right[start : start + ROWS])
        found.append((_log_sum(logits) - _log_sum(among))[:, 0])
    return np.concatenate(found).astype(np.float64) if found else np.zeros(0)


def _moved(questions: Vectors, matrix: Matrix) -> tuple[Matrix, Matrix]:
    """-> of length 1, and the lengths before, (questions, 1)."""
    moved = questions @ matrix.T
    lengths = np.linalg.norm(moved, axis=1, keepdims=True)
    return np.asarray(moved / lengths), np.asarray(lengths)


def _among(
    logits: NDArray[np.float32], right: Sequence[Sequence[int]]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """-> rows and places of relevant passages, and the logits, -inf where a passage is not relevant."""
    rows = np.repeat(np.arange(len(right)), [len(own) for own in right])
    places = np.array([at for own in right for at in own])
    among = np.full_like(logits, -np.inf)
    among[rows, places] = logits[rows, places]
    return rows, places, among


def _log_sum(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    most = logits.max(axis=1, keepdims=True)
    return np.asarray(most + np.log(np.exp(logits - most).sum(axis=1, keepdims=True)), dtype=np.float32)
