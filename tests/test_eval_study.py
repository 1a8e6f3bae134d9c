"""Samplers on one function at equal budget, pruning, several workers, and what a study looks like on its page."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

from eval.samplers import SAMPLERS, Sampler, read_sampler
from eval.space import Setting, parse_space
from eval.study import Attempt, PrunedError, Search, Study, run_study, search
from eval.study_page import importances, render_study
from eval.study_storage import GRACE_SECONDS, _started, lives, own, said, storage_of
from ingest.errors import InvalidError, LockedError, UnavailableError

SPACE = ("x=0..1.0:.125", "n=1..9:2", "rate=1e-5,1e-4,1e-3,1e-2")  # 180 points
BUDGET, REGRET = 40, 0.12


def loss(setting: Setting) -> float:
    """0 at x .5, n 5, rate 1e-3, which a grid has too; 1.4 on average."""
    x, n, rate = float(setting["x"]), float(setting["n"]), float(setting["rate"])
    return 2 * (x - 0.5) ** 2 + (n - 5) ** 2 / 16 + (0.0 if rate == 1e-3 else 1.0)


def searched(sampler: Sampler, trials: int = BUDGET, **more: Any) -> Study:
    asked = Search(trials, sampler, minimize=True, **more)
    return search(parse_space(SPACE), lambda attempt: loss(attempt.setting), asked)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [one for one in SAMPLERS if one != "grid"])
def test_each_sampler_comes_near_the_least_at_an_equal_budget(sampler: Sampler) -> None:
    study = searched(sampler)
    assert len(study.trials) == BUDGET
    assert study.best is not None
    assert study.best.value is not None
    assert study.best.value == min(one.value for one in study.trials if one.value is not None)
    assert study.best.value <= REGRET
    again = searched(sampler, 12)
    assert [one.setting for one in again.trials] == [one.setting for one in study.trials[:12]]


def test_a_grid_finds_the_least_once_it_has_tried_all() -> None:
    study = searched("grid", 1000)
    assert len(study.trials) == 9 * 5 * 4
    assert study.best is not None
    assert study.best.value == 0


def test_a_swarm_closes_in_on_what_is_best() -> None:
    space = parse_space(["x=0..1.0", "y=1e-6..1.0:log"])

    def far(setting: Setting) -> float:
        return abs(float(setting["x"]) - 0.3) + abs(math.log10(float(setting["y"])) + 2) / 6

    study = search(space, lambda attempt: far(attempt.setting), Search(96, "pso", minimize=True))
    values = [one.value or 0.0 for one in study.trials]
    first, last = sum(values[:16]) / 16, sum(values[-16:]) / 16
    assert last < first / 2
    assert study.best is not None
    assert far(study.best.setting) < 0.03


def test_a_sampler_is_told_by_its_name() -> None:
    assert [read_sampler(one) for one in SAMPLERS] == list(SAMPLERS)
    with pytest.raises(InvalidError, match=r"'annealing' is none of grid, random, tpe, gp, nsga2, cmaes, pso"):
        read_sampler("annealing")


def test_pruning_ends_a_hopeless_trial_and_no_other() -> None:
    ended: list[float] = []

    def objective(attempt: Attempt) -> float:
        height = float(attempt.setting["height"])
        for step in (10, 20, 30):
            if attempt.report(step, height + 1 / step):
                ended.append(height)
                raise PrunedError(f"given up at {step}")
        return height

    space = parse_space(["height=1,2,3,4,5,90"])
    starts: list[Setting] = [{"height": one} for one in (5, 4, 3, 2, 90, 1)]
    for prune in (True, False):
        study = search(space, objective, Search(6, "random", starts=starts, minimize=True, prune=prune))
        assert [one.pruned for one in study.trials] == [False, False, False, False, prune, False]
    assert ended == [90.0]
    pruned = search(space, objective, Search(6, "random", starts=starts, minimize=True, prune=True)).trials[4]
    assert (pruned.value, pruned.error, list(pruned.intermediate)) == (None, "given up at 10", [10])


WORKER = (
    "import sys, time\nfrom pathlib import Path\nfrom eval.space import parse_space\n"
    "from eval.study import Search, search\n"
    "def objective(attempt):\n"
    "    print(attempt.number, flush=True)\n    time.sleep(float(sys.argv[2]))\n    return float(attempt.setting['x'])\n"
    "search(parse_space(['x=0..1.0']), objective, Search(8, 'tpe', Path(sys.argv[1]), 'two', shared=True))\n"
)


def worker(folder: Path, seconds: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", WORKER, str(folder), str(seconds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_workers_make_exactly_the_trials_and_take_over_those_of_one_that_is_killed(tmp_path: Path) -> None:
    killed = worker(tmp_path, 60)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "0\n"
    killed.kill()
    killed.communicate()
    told = [one.communicate(timeout=120) for one in [worker(tmp_path, 0.2), worker(tmp_path, 0.2)]]
    assert not any(error for _, error in told)
    done = [int(line) for output, _ in told for line in output.split()]
    assert sorted(done) == list(range(8))
    study = search(parse_space(["x=0..1.0"]), lambda _: 0.0, Search(8, "tpe", tmp_path, "two", shared=True))
    assert [one.number for one in study.trials] == list(range(8))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["nsga2", "cmaes", "pso"])
def test_an_evolving_study_that_is_broken_off_ends_as_if_it_had_not_been(sampler: Sampler, tmp_path: Path) -> None:
    calls = 0

    def objective(setting: Setting) -> float:
        nonlocal calls
        calls += 1
        if calls in {5, 13}:
            raise KeyboardInterrupt
        return -loss(setting)

    space = parse_space(SPACE[:2])
    space |= parse_space(["rate=1e-5..1e-2:log"])
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_study(space, objective, 20, sampler, tmp_path)
    resumed = run_study(space, objective, 20, sampler, tmp_path)
    whole = run_study(space, lambda setting: -loss(setting), 20, sampler)
    assert [one.setting for one in resumed.trials] == [one.setting for one in whole.trials]


def test_a_trial_lives_while_its_process_does_or_another_machine_says_so() -> None:
    here, there = own(), {**own(), "where": "another machine"}
    assert lives({"worker": here}, 0)
    assert not lives({"worker": {**here, "started": 1}}, 0)  # its number was given to another process
    assert not lives({"worker": None}, 0)
    assert lives({"worker": there, "beat": 1000.0}, 1000.0)
    assert not lives({"worker": there, "beat": 1000.0}, 1001.0 + GRACE_SECONDS)
    ended = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.DEVNULL)
    started = _started(ended.pid)
    assert started is not None
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how
    assert not lives({"worker": {**here, "pid": ended.pid, "started": started}}, 0)
    ended.wait()


def test_a_study_in_use_alone_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.study_storage.TURN_SECONDS", 0.1)
    space = parse_space(["x=1..9"])

    def objective(_: Setting) -> float:
        with pytest.raises(LockedError, match="another process is at study 'one'"):
            search(space, lambda _: 1.0, Search(2, "random", tmp_path, "one", shared=True))
        return 1.0

    run_study(space, objective, 1, "random", tmp_path, "one")


@pytest.mark.parametrize(
    "url",
    [
        "mysql://u:secret@host/db",
        "mysql://u@host/db?password=secret",
        "sqlite://",
        "http:/x",
        "postgresql:/u:secret@host/db",
        "postgresql://u:secret@host:port/db",
    ],
)
def test_a_storage_that_cannot_be_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidError, match="postgresql://") as error:
        storage_of(url)
    assert "secret" not in str(error.value)
    assert error.value.__cause__ is None


def test_a_storage_is_told_without_its_password() -> None:
    assert said("postgresql://u:secret@host/db?sslmode=require&password=secret", "mine") == (
        "postgresql://u:***@host/db?sslmode=require"
    )
    assert storage_of("/somewhere/mine.db") == Path("/somewhere/mine.db")


def test_a_database_that_does_not_answer_is_told_without_its_password() -> None:
    asked = Search(1, "random", "postgresql://u:secret@127.0.0.1:1/db?connect_timeout=2", "far", shared=True)
    with pytest.raises(UnavailableError, match=r"study 'far' in .*127\.0\.0\.1:1.* cannot be read or written") as error:
        search(parse_space(SPACE), lambda _: 1.0, asked)
    assert "secret" not in str(error.value)


def test_what_is_no_study_of_ours_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("not a database, but a text that is long enough to be looked at" * 20)
    with pytest.raises(UnavailableError, match=r"notes\.db' cannot be read or written: file is not a database"):
        search(parse_space(SPACE), lambda _: 1.0, Search(1, "random", tmp_path / "notes.db"))
    with pytest.raises(InvalidError, match=r"cannot be made.*name another place"):
        search(parse_space(SPACE), lambda _: 1.0, Search(1, "random", tmp_path / "notes.db/below"))
    theirs = optuna.create_study(storage=f"sqlite:///{tmp_path}/theirs.db", study_name="theirs")
    theirs.ask().suggest_float("y", 0, 1)
    with pytest.raises(InvalidError, match=r"'theirs'.*is another program's.*Choose another name"):
        search(parse_space(SPACE), lambda _: 1.0, Search(2, "random", tmp_path / "theirs.db", "theirs", minimize=True))


def test_a_space_whose_key_is_called_as_what_a_study_is_of_is_told_apart(tmp_path: Path) -> None:
    run_study(parse_space(["seed=1,2"]), lambda _: 1.0, 1, "random", tmp_path, "mine")
    with pytest.raises(InvalidError, match=r"--space seed was .*\[1, 2\].*now .*\[1, 2, 3\]"):
        run_study(parse_space(["seed=1,2,3"]), lambda _: 1.0, 1, "random", tmp_path, "mine")


@pytest.mark.parametrize("tells", [True, False])
def test_a_trial_that_was_taken_for_dead_ends_as_the_other_worker_has_ended_it(tells: bool, tmp_path: Path) -> None:
    def objective(attempt: Attempt) -> float:
        other = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path}/study.study")
        other.tell(attempt.number, 7.0)
        if tells:
            attempt.report(1, 3.0)
        return 2.0

    study = search(parse_space(["x=0..1.0"]), objective, Search(2, "random", tmp_path))
    assert [one.value for one in study.trials] == [7.0, 7.0]


def test_a_value_that_compares_with_nothing_refuses_its_setting_and_leaves_no_trace_in_json() -> None:
    def objective(attempt: Attempt) -> float:
        attempt.report(1, math.nan)
        return math.inf if attempt.setting["n"] == 1 else 1.0

    study = search(parse_space(["n=1,2"]), objective, Search(2, "grid"))
    assert {one.setting["n"]: (one.value, one.error) for one in study.trials} == {
        1: (None, "its value is inf, which compares with nothing"),
        2: (1.0, ""),
    }
    assert "NaN" not in json.dumps(study.model_dump(mode="json"))


def test_a_page_shows_history_and_what_mattered_and_needs_nothing_beside_it() -> None:
    def objective(attempt: Attempt) -> float:
        if attempt.setting["n"] == 9:
            raise InvalidError("<b>too large</b>")
        attempt.report(50, 1.0)
        return loss(attempt.setting)

    study = search(parse_space(SPACE), objective, Search(16, "random", minimize=True, seed=2))
    shares = importances(study)
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=shares.__getitem__) == "rate"
    page = render_study(study, "eval_loss", {"Rows": "<i>mine</i>"})
    assert page.count("<svg") == 3
    for text in (
        "History",
        "Importance",
        "On the way",
        "a dot below: one without a value",
        "&lt;b&gt;too large",
        "&lt;i&gt;mine",
        "refused",
        "trial",
    ):
        assert text in page
    assert not any(one in page for one in ("<script", "http://", "https://", "<b>too", "src="))
    assert render_study(study, "eval_loss", {}) == render_study(study, "eval_loss", {})
    few = search(parse_space(SPACE), objective, Search(1, "random", minimize=True))
    assert "Not told: that takes 4 trials" in render_study(few, "eval_loss", {})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("initdb") is None or (os.getuid() == 0 and shutil.which("setpriv") is None),
                    reason="PostgreSQL is not installed")  # fmt: skip
def test_a_study_lies_in_postgresql(tmp_path: Path) -> None:
    with postgres(tmp_path) as url:
        for trials in (3, 5):
            study = search(
                parse_space(SPACE),
                lambda at: loss(at.setting),
                Search(trials, "pso", url, "far", minimize=True, shared=True),
            )
            assert [one.number for one in study.trials] == list(range(trials))
    same = searched("pso", 5, name="far")
    assert [one.setting for one in same.trials] == [one.setting for one in study.trials]


class postgres:
    """A server of its own, on a socket in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "pg"

    def __enter__(self) -> str:
        self.folder.mkdir(mode=0o700)
        shutil.chown(self.folder, "nobody") if os.getuid() == 0 else None
        for above in self.folder.parents:
            if os.getuid() == 0 and above.stat().st_uid == 0 and str(above).startswith("/tmp/"):
                above.chmod(above.stat().st_mode | 0o011)
        self.as_user = ["setpriv", "--reuid", "nobody", "--clear-groups"] if os.getuid() == 0 else []
        data, where = str(self.folder / "data"), str(self.folder)
        subprocess.run([*self.as_user, "initdb", "-D", data, "-U", "graft", "-A", "trust", "--no-sync"], check=True,
                       capture_output=True, cwd="/")  # fmt: skip
        self.server = subprocess.Popen(
            [*self.as_user, "postgres", "-D", data, "-k", where, "-c", "listen_addresses=", "-c", "fsync=off"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip
        for _ in range(300):
            if (self.folder / ".s.PGSQL.5432").exists():
                break
            time.sleep(0.1)
        return f"postgresql://graft@/postgres?host={where}"

    def __exit__(self, *_: object) -> None:
        self.server.send_signal(signal.SIGINT)
        self.server.wait(30)
