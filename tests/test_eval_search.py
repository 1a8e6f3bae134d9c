"""Spaces and studies: what can be written, what is refused, and a study that is killed goes on as if it had not been."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from eval.schemas import Case, DataSet
from eval.space import Choice, Float, Int, Setting, grid, parse_space
from eval.study import Trial, run_study
from eval.sweep import Plan, check, full_name, halves, named
from ingest.errors import InvalidError, LockedError, UnavailableError

SPACE = ("x=0..1.0", "n=1..9:2", "kind=good,bad", "on=true,false", "rate=1e-5..1e-2:log")


def height(setting: Setting) -> float:
    """Highest at x .3, n 5, good."""
    x, n = float(setting["x"]), float(setting["n"])
    return (setting["kind"] == "good") - (x - 0.3) ** 2 - (n - 5) ** 2 / 10


def test_a_space_is_typed_as_it_is_written() -> None:
    assert parse_space(SPACE) == {
        "x": Float(low=0, high=1),
        "n": Int(low=1, high=9, step=2),
        "kind": Choice(values=("good", "bad")),
        "on": Choice(values=(True, False)),
        "rate": Float(low=1e-5, high=1e-2, log=True),
    }


def test_whole_numbers_can_be_searched_by_their_logarithm_and_steps_need_not_reach_the_end() -> None:
    space = parse_space(["r=2..64:log", "x=0..1.0:.3"])
    assert space["r"] == Int(low=2, high=64, log=True)
    study = run_study(space, lambda setting: -abs(int(setting["r"]) - 8.0), 30)
    tried = {int(one.setting["r"]) for one in study.trials}
    assert tried <= set(range(2, 65))
    assert sum(one < 16 for one in tried) > sum(one > 48 for one in tried)
    assert {float(one["x"]) for one in grid({"x": space["x"]})} == {0.0, 0.3, 0.6, 0.9}
    assert {float(one.setting["x"]) for one in study.trials} <= {0.0, 0.3, 0.6, 0.9}


def test_a_file_says_the_same_as_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "space.toml"
    file.write_text(
        'x = "0..1.0"\nkind = ["good", "bad"]\non = [true, false]\n'
        "n = {low = 1, high = 9, step = 2}\nrate = {low = 1e-5, high = 1e-2, log = true}\n[chunking]\ntokens = [64, 128]\n"
    )
    assert parse_space([str(file)]) == {**parse_space(SPACE), "chunking.tokens": Choice(values=(64, 128))}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a=5..1", "5 is above 1"),
        ("a=", "has no values"),
        ("a=1,1", "twice"),
        ("a=0..1:log", "begins above 0"),
        ("a=x..y", "valid number"),
        ("a=1..9:x", "valid number"),
        ("a=1..9:0", "greater than or equal to 1"),
        ("a=nan..1", "finite"),
        ("a=1..9:inf", "finite"),
        ("a=1,nan", "no values"),
        ("a=1,1.0", "twice"),
        ("a=1..99999999999999999999", "less than or equal to"),
        ("a=-1e308..1e308", "too wide"),
        ("nowhere.toml", "neither key=values nor a file"),
    ],
)
def test_a_bad_space_is_refused_by_name(given: str, said: str) -> None:
    with pytest.raises(InvalidError, match=said) as error:
        parse_space([given])
    assert given in str(error.value)


def test_a_key_twice_a_broken_file_and_a_grid_without_steps_or_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("a = = 1")
    with pytest.raises(InvalidError, match="twice"):
        parse_space(["a=1,2", "a=3,4"])
    with pytest.raises(InvalidError, match="cannot be read"):
        parse_space([str(tmp_path / "broken.toml")])
    with pytest.raises(InvalidError, match=r"a=0\.\.1:STEP"):
        grid(parse_space(["a=0..1.0"]))
    with pytest.raises(InvalidError, match="10000 are searched at most"):
        grid(parse_space(["a=1..1000", "b=1..1000"]))


def test_tpe_comes_near_the_best_and_stays_within_the_space() -> None:
    study = run_study(parse_space(SPACE), height, 40)
    assert study.best is not None
    assert study.best.value is not None
    assert study.best.value > 0.9
    assert study.best.value == max(one.value for one in study.trials if one.value is not None)
    for one in study.trials:
        assert one.setting["n"] in {1, 3, 5, 7, 9}
        assert 1e-5 <= float(one.setting["rate"]) <= 1e-2


def test_a_grid_tries_each_point_once_and_ends() -> None:
    space = parse_space(["a=0..1.0:.25", "b=x,y"])
    study = run_study(space, lambda setting: -abs(float(setting["a"]) - 0.5), 100, "grid")
    assert sorted(map(str, (one.setting for one in study.trials))) == sorted(map(str, grid(space)))
    assert study.best is not None
    assert study.best.setting["a"] == 0.5


def test_starts_come_first_unless_they_are_outside() -> None:
    start: Setting = {"x": 0.25, "n": 3, "kind": "bad", "on": True, "rate": 1e-3}
    study = run_study(parse_space(SPACE), height, 2, starts=[start | {"n": 4}, start])
    assert study.trials[0].setting == start


def test_a_setting_is_measured_once_however_often_the_sampler_comes_back() -> None:
    measured: list[Setting] = []

    def objective(setting: Setting) -> float:
        measured.append(setting)
        if setting["a"] == 2:
            raise InvalidError("no such index")
        return float(setting["a"])

    study = run_study(parse_space(["a=1..3"]), objective, 15, "random")
    assert len(study.trials) == 15
    assert sorted(int(one["a"]) for one in measured) == [1, 2, 3]
    assert {(one.setting["a"], one.value) for one in study.trials} == {(1, 1.0), (2, None), (3, 3.0)}


def test_the_same_seed_searches_alike_and_another_does_not() -> None:
    first, same, other = (run_study(parse_space(SPACE), height, 5, "random", seed=seed) for seed in (1, 1, 2))
    settings = [[one.setting for one in study.trials] for study in (first, same, other)]
    assert settings[0] == settings[1] != settings[2]


@pytest.mark.slow
def test_a_killed_study_goes_on_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom eval.space import parse_space\nfrom eval.study import run_study\n"
        "from test_eval_search import SPACE, height\ntried = []\n"
        "def objective(setting):\n    tried.append(setting)\n"
        "    if len(tried) == 9: os.kill(os.getpid(), signal.SIGKILL)\n    return height(setting)\n"
        f"run_study(parse_space(SPACE), objective, 14, storage=Path({str(tmp_path)!r}), name='cut', seed=3)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    told: list[Trial] = []
    resumed = run_study(parse_space(SPACE), height, 14, storage=tmp_path, name="cut", seed=3, on_trial=told.append)
    whole = run_study(parse_space(SPACE), height, 14, seed=3)
    assert [one.number for one in told] == [8, 9, 10, 11, 12, 13]
    assert [one.setting for one in resumed.trials] == [one.setting for one in whole.trials]
    assert resumed.best is not None
    assert whole.best is not None
    assert resumed.best.setting == whole.best.setting


def test_another_search_under_the_same_name_is_refused_with_what_to_do(tmp_path: Path) -> None:
    run_study(parse_space(["a=1..9"]), lambda _: 1.0, 2, storage=tmp_path, name="mine", context={"metric": "f1"})
    with pytest.raises(InvalidError, match=r"mine.*another name, or delete .*mine\.study") as error:
        run_study(parse_space(["a=1..8"]), lambda _: 1.0, 2, storage=tmp_path, name="mine", context={"metric": "f1"})
    assert '"high": 9' in str(error.value)
    with pytest.raises(InvalidError, match="metric was"):
        run_study(parse_space(["a=1..9"]), lambda _: 1.0, 2, storage=tmp_path, name="mine", context={"metric": "map"})


def test_a_refused_setting_is_told_and_the_search_goes_on() -> None:
    def objective(setting: Setting) -> float:
        if setting["kind"] == "bad":
            raise InvalidError("overlap must be below tokens")
        return 1.0

    study = run_study(parse_space(["kind=good,bad"]), objective, 10, "grid")
    assert {str(one.setting["kind"]): (one.value, one.error) for one in study.trials} == {
        "good": (1.0, ""),
        "bad": (None, "overlap must be below tokens"),
    }


def test_a_lost_service_ends_the_search_which_can_be_gone_on_with(tmp_path: Path) -> None:
    tried: list[Setting] = []

    def objective(setting: Setting) -> float:
        tried.append(setting)
        if len(tried) == 3:
            raise UnavailableError("no service answers")
        return 1.0

    space = parse_space(["a=1..1000"])
    with pytest.raises(UnavailableError):
        run_study(space, objective, 5, "random", tmp_path, "lost")
    study = run_study(space, objective, 5, "random", tmp_path, "lost")
    assert len(study.trials) == 5
    assert tried[3] == tried[2]  # what was broken off is tried again


def test_two_processes_are_not_at_one_study(tmp_path: Path) -> None:
    with FileLock(tmp_path / "busy.study.lock"), pytest.raises(LockedError, match="another process"):
        run_study(parse_space(["a=1..9"]), lambda _: 1.0, 2, storage=tmp_path, name="busy")


def test_keys_are_settings_of_a_collection() -> None:
    space = named(
        parse_space(["tokens=64,128", "k=1..9", "weight=0..1.0", "embedder=a,b", "retrieval.rerank=true,false"])
    )
    assert list(space) == [
        "chunking.tokens", "retrieval.top_k", "retrieval.dense_weight", "embedder", "retrieval.rerank",
    ]  # fmt: skip
    with pytest.raises(InvalidError, match=r"'colour' is no setting.*chunking\.tokens"):
        full_name("colour")


@pytest.mark.parametrize(
    ("space", "metric", "collection", "said"),
    [
        ("prompt=brief,cited", "ndcg@10", None, "does not change ndcg@10"),
        ("k=1..9", "recall@10", None, "does not change recall@10"),
        ("tokens=64,128", "ndcg@10", "mine", "needs an index of its own"),
        ("weight=0..1.0", "f1", "mine", "would change the settings of 'mine'"),
        ("weight=0..1.0", "hallucination", None, "less is better"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_runs(
    space: str, metric: str, collection: str | None, said: str
) -> None:
    with pytest.raises(InvalidError, match=said):
        check(named(parse_space([space])), Plan({}, metric=metric), collection)


def test_the_halves_share_no_document_and_lose_no_question() -> None:
    relevant = [{f"d{n // 2}": 1} | ({f"d{n // 2 + 1}": 1} if n % 10 == 1 else {}) for n in range(60)]
    cases = tuple(Case(id=str(n), question="?", relevant=has) for n, has in enumerate(relevant))
    seen, unseen = halves(DataSet(name="x", documents=(), cases=cases), "ndcg@10", 0.5, seed=1)
    named_by = [{path for case in half.cases for path in case.relevant} for half in (seen, unseen)]
    assert not named_by[0] & named_by[1]
    assert len(seen.cases) + len(unseen.cases) == 60
    assert 24 <= len(unseen.cases) <= 30
    with pytest.raises(InvalidError, match="each needs 10"):
        halves(DataSet(name="x", documents=(), cases=cases[:12]), "ndcg@10", 0.5, seed=1)
