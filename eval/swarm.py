"""Particle swarm optimisation as a sampler of Optuna, which has none. Kennedy and Eberhart, 1995; with the constriction of Clerc
and Kennedy, 2002, which needs no limit to velocities. Imports Optuna.

A particle moves by its inertia, towards the best place that it has found, and towards the best that any has. Trial n moves
particle n modulo the swarm's size. Place and velocity are kept with each trial, so the swarm is read from the study and no
process holds it. Libraries that have the method (pymoo, nevergrad) hold a swarm in memory, and wait for a whole generation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

INERTIA, PULL = 0.7298, 1.4962  # the constriction, and it times 2.05
KEY = "swarm"  # of a trial's system attributes: [places, velocities], by parameter, in the unit cube


class SwarmSampler(BaseSampler):
    """`space`: all parameters of each trial. `seed`: of the trial at hand."""

    def __init__(self, space: Mapping[str, BaseDistribution], seed: int, particles: int) -> None:
        self._space = {name: one for name, one in space.items() if not one.single()}
        self._random = np.random.default_rng(seed)
        self._particles = particles
        self._alone = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        names = list(search_space)
        if not names:
            return {}
        place, velocity = self._moved(study, trial, names)
        moved = [dict(zip(names, one.tolist(), strict=True)) for one in (place, velocity)]
        study._storage.set_trial_system_attr(trial._trial_id, KEY, moved)
        return {name: value_at(search_space[name], float(at)) for name, at in zip(names, place, strict=True)}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._alone.sample_independent(study, trial, param_name, param_distribution)

    def _moved(self, study: Study, trial: FrozenTrial, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """-> (place, velocity) of this trial's particle; at first anywhere, and still."""
        before = [
            one
            for one in study.get_trials(deepcopy=False)
            if one.number < trial.number and one.params.keys() >= set(names)
        ]
        own = [one for one in before if one.number % self._particles == trial.number % self._particles]
        if not own:
            return self._random.random(len(names)), np.zeros(len(names))
        place, velocity = self._place(own[-1], names), self._velocity(own[-1], names)
        for group in (own, before):
            best = _best(study, group)
            if best is not None:
                pull = PULL * self._random.random(len(names)) * (self._place(best, names) - place)
                velocity = velocity + pull if group is before else INERTIA * velocity + pull
            elif group is own:
                velocity = INERTIA * velocity
        moved = np.clip(place + velocity, 0.0, 1.0)
        return moved, moved - place  # a wall takes the speed

    def _place(self, trial: FrozenTrial, names: Sequence[str]) -> np.ndarray:
        """Before it was rounded to what the parameters can be, where a particle made it and the trial kept to it."""
        held = trial.system_attrs.get(KEY, ({}, {}))[0]
        kept = {name for name, at in held.items() if value_at(self._space[name], at) == trial.params[name]}
        return np.array(
            [held[name] if name in kept else place_of(self._space[name], trial.params[name]) for name in names]
        )

    def _velocity(self, trial: FrozenTrial, names: Sequence[str]) -> np.ndarray:
        held = trial.system_attrs.get(KEY, ({}, {}))[1]
        return np.array([held.get(name, 0.0) for name in names])


def value_at(distribution: BaseDistribution, at: float) -> Any:
    """-> the value at a place from 0 to 1; a choice has an equal part for each of its values, as has each step."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[min(int(at * len(distribution.choices)), len(distribution.choices) - 1)]
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    low, high, step = distribution.low, distribution.high, distribution.step
    if step is not None and not distribution.log:
        count = round((high - low) / step) + 1
        value = low + min(int(at * count), count - 1) * step
    elif distribution.log:
        value = float(np.exp(np.log(low) + at * (np.log(high) - np.log(low))))
    else:
        value = low + at * (high - low)
    value = min(max(value, low), high)
    return round(value) if isinstance(distribution, IntDistribution) else float(value)


def place_of(distribution: BaseDistribution, value: Any) -> float:
    """-> the middle of the value's part."""
    if isinstance(distribution, CategoricalDistribution):
        return (distribution.choices.index(value) + 0.5) / len(distribution.choices)
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    low, high, step = distribution.low, distribution.high, distribution.step
    if step is not None and not distribution.log:
        return float(((value - low) / step + 0.5) / (round((high - low) / step) + 1))
    if distribution.log:
        return float((np.log(value) - np.log(low)) / (np.log(high) - np.log(low)))
    return float((value - low) / (high - low))


def _best(study: Study, trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    done = [one for one in trials if one.state == TrialState.COMPLETE and one.value is not None]
    sign = 1 if study.direction == StudyDirection.MAXIMIZE else -1
    return max(done, key=lambda one: sign * (one.value or 0.0), default=None)
