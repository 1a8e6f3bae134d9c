"""How the next setting of a study is chosen: by Optuna's samplers, and one of ours (`eval.swarm`), each seeded for each trial.

No sampler lives longer than one trial: what it knows it reads from the study. So a killed study ends as if it had not been, and
several processes can be at one study.
"""

import importlib.util
import random
from typing import TYPE_CHECKING, Literal, get_args

from eval.space import Setting, Space, distributions
from ingest.errors import InvalidError, SettingsError

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

Sampler = Literal["grid", "random", "tpe", "gp", "nsga2", "cmaes", "pso"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
POPULATION = 8  # of a generation and of a swarm: studies of trainings have tens of trials, not thousands
STARTUP = 8  # random trials before a model of the objective is asked
NEEDS = {"gp": ("torch", "`make train` installs it"), "cmaes": ("cmaes", "`make run` installs it")}


def read_sampler(given: str) -> Sampler:
    """Raises InvalidError for a name that is none, SettingsError where what it needs is not installed."""
    for one in SAMPLERS:
        if one == given:
            _require(one)
            return one
    raise InvalidError(f"--sampler {given!r} is none of {', '.join(SAMPLERS)}")


def sampler_of(kind: Sampler, space: Space, seed: int, number: int, fixed: Setting | None = None) -> "BaseSampler":
    """-> for the trial of that number alone. `fixed`: its setting, where that is settled.

    A grid's points are given one by one, since Optuna's GridSampler takes a killed trial's point for visited.
    """
    from optuna.samplers import PartialFixedSampler

    chosen = _sampler(kind, space, random.Random(f"{seed}:{number}").randrange(2**32))
    return PartialFixedSampler(fixed, chosen) if fixed else chosen


def _sampler(kind: Sampler, space: Space, seed: int) -> "BaseSampler":
    from optuna import samplers

    match kind:
        case "random" | "grid":
            return samplers.RandomSampler(seed=seed)
        case "tpe":
            return samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
        case "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=STARTUP)
        case "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=POPULATION)
        case "cmaes":
            return samplers.CmaEsSampler(seed=seed, popsize=POPULATION, warn_independent_sampling=False)
        case "pso":
            from eval.swarm import SwarmSampler

            return SwarmSampler(distributions(space), seed=seed, particles=POPULATION)


def _require(kind: Sampler) -> None:
    package, advice = NEEDS.get(kind, ("optuna", ""))
    if importlib.util.find_spec(package) is None:
        raise SettingsError(f"--sampler {kind!r} needs {package}, which is not installed: {advice}")
