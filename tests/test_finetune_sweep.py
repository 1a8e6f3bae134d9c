"""A sweep of trainings on a tiny model: every sampler, folds, pruning, a kill, refused settings, and what it leaves."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
import typer
from tiny_model import tiny_model
from tuning import QUIET, recipe, tune, write_rows
from typer.testing import CliRunner

from eval.samplers import SAMPLERS
from eval.space import parse_space
from eval.study import Trial
from finetune import runs, trial
from finetune.cli_sweep import sweep as command
from finetune.hooks import StoppedError
from finetune.recipe import Recipe, read_recipe, with_settings
from finetune.recipe_file import recipe_toml, toml_of
from finetune.rows import read_rows
from finetune.rows_split import fold_rows
from finetune.sweep import Plan, Swept, best_recipe, check_space, lower_is_better, recipe_at, sweep
from ingest.errors import GraftError, InvalidError, NotFoundError

SHORT = ("max_steps=2", "eval_steps=1", "save_steps=2", "held_out=0.2", "gradient_accumulation_steps=1",
         "per_device_train_batch_size=4", "lr_scheduler_type=constant", "warmup_steps=0", "patience=0")  # fmt: skip
RATES = "learning_rate=1e-6,1e-5,1e-4,1e-2"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", "sft", 16)


@pytest.fixture(scope="module")
def asked(base: Path, rows: Path) -> Recipe:
    return recipe("sft-lora", rows, base, *SHORT)


def swept(plan: Plan, on_trial: Callable[[Trial], None] = lambda _: None) -> Swept:
    return sweep(plan, QUIET, plan.folder, plan.folder, on_trial)


def test_a_key_that_no_recipe_has_or_that_changes_what_is_held_out_is_refused_by_name() -> None:
    chosen = read_recipe("sft-lora")
    check_space(
        chosen, parse_space(["learning_rate=1e-5..1e-3:log", "r=8,16", "trained.lora_alpha=8,16", "patience=1,2"])
    )
    for given, said in (
        ("learning_rat=1,2", "'learning_rat'.*did you mean learning_rate"),
        ("held_out=0.1,0.2", "'held_out' changes which rows are held out"),
        ("data.max_rows=10,20", "'data.max_rows' changes which rows"),
        ("trained.rank=1,2", "'trained.rank'.*lora_alpha"),
        ("bf16=true,false", "'bf16'.*model.dtype"),
        ("lora.r=1,2", "'lora.r'.*sections"),
    ):
        with pytest.raises(InvalidError, match=said):
            check_space(chosen, parse_space([given]))
    with pytest.raises(InvalidError, match=r"'r' and 'trained\.r' are the same"):
        check_space(chosen, parse_space(["r=8,16", "trained.r=8,16"]))


def test_a_setting_reaches_the_recipe_with_its_type() -> None:
    found = recipe_at(read_recipe("sft-lora"), {"learning_rate": 1e-5, "r": 8, "packing": True, "optim": "sgd"})
    assert found.training["learning_rate"] == 1e-5
    assert (found.trained.r, found.training["packing"], found.training["optim"]) == (8, True, "sgd")
    with pytest.raises(InvalidError, match="r: Input should be less"):
        recipe_at(read_recipe("sft-lora"), {"r": 4096})


@pytest.mark.parametrize("name", ["sft-lora", "sft-layers", "dpo-qlora"])
def test_a_recipe_is_written_as_it_is_read(name: str, tmp_path: Path) -> None:
    chosen = read_recipe(name, ('data="a \\"b\\".jsonl"', "lr_scheduler_kwargs={num_cycles = 2, x = [1, 2.5]}"))
    (tmp_path / "mine.toml").write_text(recipe_toml(chosen, ["one\ntwo"]))
    assert read_recipe(str(tmp_path / "mine.toml")) == chosen
    assert (tmp_path / "mine.toml").read_text().startswith("# one two\nname = ")
    assert toml_of({"a b": [True, 1e-5, "x"]}) == '{"a b" = [true, 1e-05, "x"]}'


def test_each_row_is_held_out_in_one_fold_and_no_question_is_on_both_sides(rows: Path) -> None:
    held = read_rows(rows, "sft")
    folds = fold_rows(held, 3, 1)
    assert sorted(place for _, part in folds for place in part.places) == sorted(held.places)
    for learn, part in folds:
        assert not set(learn.places) & set(part.places)
        assert len(learn.places) + len(part.places) == len(held.places)
        assert 5 <= len(part.places) <= 6
    assert fold_rows(held, 3, 1) == folds != fold_rows(held, 3, 2)
    with pytest.raises(InvalidError, match="makes no 17 folds"):
        fold_rows(held, 17, 1)


def test_less_is_better_of_a_loss() -> None:
    for metric in ("eval_loss", "calibration_error", "objective/kl"):
        assert lower_is_better(metric)
    for metric in ("eval_rewards/accuracies", "held_out_reward", "eval_closs"):
        assert not lower_is_better(metric)


@pytest.mark.slow
def test_what_cannot_be_judged_is_said_before_anything_trains(asked: Recipe, rows: Path, tmp_path: Path) -> None:
    space = parse_space([RATES])
    nothing = asked.model_copy(update={"data": asked.data.model_copy(update={"held_out": 0.0})})
    with pytest.raises(InvalidError, match=r"nothing of .* is held out.*--folds K"):
        swept(Plan(nothing, space, tmp_path, 1))
    both = asked.model_copy(update={"data": asked.data.model_copy(update={"eval_data": rows})})
    with pytest.raises(InvalidError, match="give one of them"):
        swept(Plan(both, space, tmp_path, 1, folds=2))
    with pytest.raises(InvalidError, match="--folds 1 would leave nothing to train on"):
        swept(Plan(asked, space, tmp_path, 1, folds=1))
    with pytest.raises(InvalidError, match="unknown training argument 'max_step'"):
        swept(Plan(with_settings(asked, ["max_step=2"]), space, tmp_path, 1))
    with pytest.raises(InvalidError, match=r"study name '\.\./mine'"):
        swept(Plan(asked, space, tmp_path, 1, name="../mine"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_trial_whose_sweep_ends_leaves_a_checkpoint_and_waits_for_no_answer(asked: Recipe, tmp_path: Path) -> None:
    ended = threading.Event()

    def report(_: int, value: float) -> bool:
        ended.set()
        return False

    long = with_settings(asked, ["max_steps=100000", "save_steps=100000"])
    order = trial.Order(long, tmp_path / "trial/run", QUIET, tmp_path, tmp_path, "eval_loss", 0)
    with pytest.raises(StoppedError):
        trial.run(order, report, ended.is_set)
    assert runs.last_checkpoint(order.out) is not None  # it was not killed


@pytest.mark.slow
def test_what_no_setting_can_mend_ends_the_sweep_and_what_one_can_refuses_it(asked: Recipe, tmp_path: Path) -> None:
    plan = Plan(asked, parse_space([RATES]), tmp_path, 2, name="mine")
    with pytest.raises(GraftError, match="FINETUNE_TRACKERS names 'nowhere', which is not installed"):
        sweep(plan, QUIET.model_copy(update={"trackers": ("nowhere",)}), tmp_path, tmp_path)
    small = sweep(plan, QUIET.model_copy(update={"memory_share": 1e-5}), tmp_path, tmp_path)
    assert [one.value for one in small.study.trials] == [None, None]
    assert all(re.search("takes about .* GiB, and here it may take 0.*try ", one.error) for one in small.study.trials)
    with pytest.raises(InvalidError, match=r"no trial has a value.*takes about"):
        best_recipe(small)
    with pytest.raises(NotFoundError, match=r"no 'eval_accuracy'; --metric takes .*eval_loss"):
        swept(plan._replace(metric="eval_accuracy", name="other"))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_trains_at_an_equal_budget(sampler: str, asked: Recipe, tmp_path: Path) -> None:
    space = parse_space(["learning_rate=1e-5,1e-2", "r=2,4"])
    found = swept(Plan(asked, space, tmp_path, 2, sampler=sampler, workers=2))  # type: ignore[arg-type]
    assert [one.error for one in found.study.trials] == ["", ""]
    assert found.study.best is not None
    assert found.study.best.value == min(one.value for one in found.study.trials if one.value is not None)
    assert found.weights is not None
    held = json.loads((found.weights / "run/manifest.json").read_text())
    assert held["metrics"]["eval_loss"] == found.study.best.value
    assert held["recipe"]["trained"]["r"] == found.study.best.setting["r"]
    assert [one.name for one in found.weights.parent.iterdir() if one.is_dir()] == [found.weights.name]


@pytest.mark.slow
def test_a_folded_value_is_the_mean_of_its_folds_trained_alone(asked: Recipe, tmp_path: Path) -> None:
    plan = Plan(asked, parse_space(["learning_rate=1e-3"]), tmp_path, 1, "grid", folds=2, seed=3)
    found = swept(plan)
    from finetune.train import Split

    whole = read_rows(asked.data.data or Path(), "sft")
    alone = [
        tune(recipe_at(asked, {"learning_rate": 1e-3}), tmp_path / f"alone-{at}", data=Split(whole, *sides))
        for at, sides in enumerate(fold_rows(whole, 2, 3))
    ]
    assert found.study.best is not None
    assert found.study.best.value == pytest.approx(fmean(one.metrics["eval_loss"] for one in alone), abs=1e-4)
    assert list(found.study.trials[0].intermediate) == [1]
    assert found.weights is not None
    learned, held_out = (found.weights / "fold-1", recipe_at(asked, {"learning_rate": 1e-3})), fold_rows(whole, 2, 3)
    base = Path(asked.model.base or "")
    assert runs.finished(*learned, held_out[0], base) is not None
    assert runs.finished(*learned, held_out[1], base) is None  # of other rows, as of a study that was deleted


@pytest.mark.slow
def test_a_hopeless_trial_is_ended_and_a_setting_that_fails_is_told_with_its_reason(
    asked: Recipe, tmp_path: Path
) -> None:
    """A grid in an order of its seed's, with the one that learns nothing behind four that do."""
    space = parse_space(["learning_rate=1e-2,9e-3,8e-3,7e-3,1e-9", "r=4,4096"])
    steps = ("max_steps=4", "eval_steps=2")  # what is asked to end does so after the next step, unless that is the last
    told: list[Trial] = []
    found = swept(
        Plan(with_settings(asked, steps), space, tmp_path, 10, "grid", prune=True, seed=_seed_with_last(space)),
        told.append,
    )
    refused = [one for one in told if one.setting["r"] == 4096]
    assert len(refused) == 5
    assert all("r: Input should be less than or equal to 512" in one.error for one in refused)
    (hopeless,) = (one for one in told if one.pruned)
    assert (hopeless.setting["learning_rate"], hopeless.value) == (1e-9, None)
    assert "worse than the median" in hopeless.error
    assert list(hopeless.intermediate) == [50]
    assert found.study.best is not None
    assert found.study.best.setting["learning_rate"] != 1e-9


def _seed_with_last(space: object) -> int:
    """-> a seed whose grid has the rate that learns nothing last of those of rank 4."""
    from eval.study import Search, _points

    for seed in range(1000):
        order = _points(space, Search(1, "grid", seed=seed))  # type: ignore[arg-type]
        if [one["learning_rate"] for one in order if one["r"] == 4][-1] == 1e-9:
            return seed
    raise AssertionError


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on_with_two_workers_and_leaves_a_page_and_a_recipe_that_trains(
    base: Path, rows: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("GRAFT_HOME", tmp_path / "home"), ("GRAFT_MODELS", models), ("FINETUNE_TRACKERS", ""),
                        ("FINETUNE_THREADS", 1), ("PYTHONPATH", Path(__file__).parent.parent)):  # fmt: skip
        monkeypatch.setenv(name, str(value))
    sets = [part for one in (*SHORT, "dtype=float32") for part in ("--set", one)]
    best, page, said = tmp_path / "best.toml", tmp_path / "page.html", tmp_path / "sweep.json"
    asked = ["sft-lora", "--data", rows, "--base", base, "--space", RATES, "--sampler", "grid", "--trials", 4, *sets,
             "--write", best, "--page", page, "--json", said]  # fmt: skip
    given = [str(one) for one in asked]
    cut = subprocess.Popen([sys.executable, "-c", "from service.cli import main; main()", "sweep", *given],
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert cut.stderr is not None
    first = cut.stderr.readline()
    assert first.split()[0] == "1", first
    cut.kill()
    cut.communicate()
    (log,) = (tmp_path / "home/studies").glob("*.runs/trial-1.log")
    trained = log.stat().st_mtime_ns

    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, [*given, "--workers", "2"])
    assert done.exit_code == 0, done.exception
    assert re.search(r"4 trials \(grid\)", done.output)
    assert f"graft tune {best}" in done.output
    found = Swept.model_validate_json(said.read_text())
    assert sorted(float(one.setting["learning_rate"]) for one in found.study.trials) == [1e-6, 1e-5, 1e-4, 1e-2]
    assert all(one.value is not None for one in found.study.trials)
    assert log.stat().st_mtime_ns == trained  # what had ended was not done again
    assert found.study.best is not None
    assert found.study.best.setting == {"learning_rate": 1e-2}
    assert (tmp_path / f"home/studies/{found.study.name}.study").is_file()
    assert best.read_text() == best_recipe(found)
    comment = best.read_text().partition("\nname")[0]
    assert found.study.name in comment
    assert f"{found.study.best.value:.6g}" in comment
    assert page.read_text().count("<svg") == 3
    manifest = tune(read_recipe(str(best)), tmp_path / "again")
    assert manifest.metrics["eval_loss"] == pytest.approx(found.study.best.value, abs=1e-4)
    assert manifest.recipe["training"]["learning_rate"] == 1e-2
