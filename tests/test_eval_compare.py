"""Two runs side by side: what changed, by how much, and whether chance alone would do that."""

import json
import random
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from service_fixtures import run_graft

from eval.compare import differences, read_run, shared
from eval.schemas import AnswerCase, AnswersRun, Case, Ranked, RetrievalCase, RetrievalRun, RunFacts
from ingest.errors import InvalidError


def facts(name: str = "run", dataset: str = "set") -> RunFacts:
    return RunFacts(name=name, dataset=dataset, created_at=datetime(2026, 1, 1, tzinfo=UTC), configuration={"a": 1})


def run(
    values: Mapping[str, float] | Sequence[float], dataset: str = "set", question: str = "What is {}?"
) -> RetrievalRun:
    """One metric, `ndcg@10`, by case; its best document tells it."""
    by_case = values if isinstance(values, Mapping) else {str(at): value for at, value in enumerate(values)}
    cases = tuple(
        RetrievalCase(
            case=Case(id=key, question=question.format(key), relevant={"right": 1}),
            ranked=(Ranked(document=f"found {value:g}", score=1.0),),
            metrics={"ndcg@10": value},
        )
        for key, value in by_case.items()
    )
    mean = float(np.mean(list(by_case.values())))
    return RetrievalRun(facts=facts(dataset=dataset), metrics={"ndcg@10": mean}, cases=cases)


def answers(scores: Sequence[dict[str, float]]) -> AnswersRun:
    cases = tuple(
        AnswerCase(
            case=Case(id=str(at), question=f"What is {at}?", answers=("x",)),
            answer=f"It is {at}.",
            refused=False,
            finish_reason="stop",
            interaction_id="i",
            scores=one,
            good=True,
        )
        for at, one in enumerate(scores)
    )
    return AnswersRun(facts=facts(), metrics={}, counts={}, cases=cases)


def noisy(count: int, gain: float, seed: int = 0) -> tuple[list[float], list[float]]:
    """Scores before, and after with `gain` in the mean."""
    draw = np.random.default_rng(seed)
    before = draw.uniform(0, 0.8, count)
    return list(before), list(before + gain + draw.normal(0, 0.1, count))


def test_a_real_difference_is_told_from_chance() -> None:
    (found,) = differences(*map(run, noisy(200, 0.05)))
    assert found.p < 0.001
    assert 0 < found.low < found.difference < found.high
    assert found.difference == pytest.approx(0.05, abs=0.02)
    assert found.difference == pytest.approx(found.after - found.before)
    assert found.cases == 200


def test_chance_is_not_taken_for_a_difference() -> None:
    """Where nothing differs, p is even between 0 and 1: below .05 in one of twenty."""
    found = [differences(*map(run, noisy(40, 0.0, seed)))[0] for seed in range(60)]
    low = sum(one.p < 0.05 for one in found)
    assert low <= 8
    assert 20 <= sum(one.p < 0.5 for one in found) <= 40
    assert sum(one.low <= 0 <= one.high for one in found) >= 52


def test_identical_runs() -> None:
    before, _ = noisy(50, 0.0)
    (found,) = differences(run(before), run(before))
    assert (found.p, found.difference, found.low, found.high, found.won, found.lost) == (1.0, 0.0, 0.0, 0.0, (), ())


def test_p_is_the_share_of_exchanges_that_differ_as_much() -> None:
    """Of five cases that all gain the same, 2 of the 32 ways to exchange them do as much: all and none."""
    (found,) = differences(run([0.0] * 5), run([0.5] * 5))
    assert found.p == pytest.approx(2 / 32, abs=0.01)
    assert (found.low, found.high) == (0.5, 0.5)


def test_interval_is_that_of_the_mean() -> None:
    before, after = noisy(400, 0.0, seed=5)
    (found,) = differences(run(before), run(after))
    change = np.array(after) - np.array(before)
    error = change.std(ddof=1) / np.sqrt(len(change))
    assert found.low == pytest.approx(change.mean() - 1.96 * error, abs=error / 8)
    assert found.high == pytest.approx(change.mean() + 1.96 * error, abs=error / 8)


def test_order_of_cases_does_not_matter() -> None:
    before, after = (dict(zip(map(str, range(60)), values, strict=True)) for values in noisy(60, 0.02))
    keys = list(before)
    random.Random(1).shuffle(keys)
    shuffled = {key: after[key] for key in keys}
    assert differences(run(before), run(after)) == differences(run(before), run(shuffled))


def test_the_other_way_round_is_the_mirror_image() -> None:
    before, after = map(run, noisy(60, 0.02))
    (there,), (back,) = differences(before, after), differences(after, before)
    assert (back.difference, back.low, back.high) == tuple(
        map(pytest.approx, (-there.difference, -there.high, -there.low))
    )
    assert (back.p, back.won, back.lost) == (there.p, there.lost, there.won)


def test_won_and_lost_begin_with_the_most() -> None:
    (found,) = differences(
        run({"a": 0.5, "b": 0.0, "c": 1.0, "d": 0.3, "e": 0.5}), run({"a": 0.6, "b": 0.9, "c": 0.0, "d": 0.3, "e": 0.4})
    )
    assert found.won == ("b", "a")
    assert found.lost == ("c", "e")


def test_a_score_that_is_missing_takes_no_part() -> None:
    before = answers([{"f1": 0.2, "judge": 0.5}, {"f1": 0.4}, {"f1": 1.0, "judge": 1.0}])
    after = answers([{"f1": 0.4, "judge": 0.7}, {"f1": 0.4, "judge": 0.1}, {"f1": 1.0}])
    by_metric = {one.metric: one for one in differences(before, after)}
    assert by_metric["f1"].cases == 3
    assert by_metric["f1"].difference == pytest.approx(0.2 / 3)
    assert (by_metric["judge"].cases, by_metric["judge"].before, by_metric["judge"].after) == (1, 0.5, 0.7)
    assert differences(answers([{"f1": 1.0}]), answers([{"em": 1.0}])) == []


def test_runs_that_share_some_cases_are_compared_on_these() -> None:
    before, after = run({"a": 0.0, "b": 0.5}), run({"b": 1.0, "c": 1.0})
    assert shared(before, after) == ("b",)
    (found,) = differences(before, after)
    assert (found.cases, found.before, found.after) == (1, 0.5, 1.0)


def test_runs_that_cannot_be_compared_are_refused() -> None:
    one = run([0.5])
    for other, said in (
        (run([0.5], dataset="other"), "different data sets, 'set' and 'other'"),
        (answers([{"ndcg@10": 1.0}]), "no metrics in common"),
        (run({"x": 0.5}), "share no case"),
        (run([0.5], question="Why {}?"), "share no case"),  # another question under the same id
    ):
        with pytest.raises(InvalidError, match=said):
            differences(one, other)


def test_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    for written in (run([0.5, 1.0]), answers([{"f1": 0.5}])):
        (tmp_path / "run.json").write_text(written.model_dump_json())
        assert read_run(tmp_path / "run.json") == written
        assert json.loads((tmp_path / "run.json").read_text())["configuration"] == {"a": 1}


def test_command_shows_both_side_by_side(tmp_path: Path) -> None:
    before, after = run({"a": 0.25, "b": 1.0, "c": 0.5}), run({"a": 0.75, "b": 0.125, "c": 0.5, "d": 1.0})
    for name, one in (("before", before), ("after", after)):
        (tmp_path / f"{name}.json").write_text(one.model_dump_json())
    done = run_graft(tmp_path, "eval", "compare", "before.json", "after.json", "--json", "change.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 cases are in both, of 3 before and 4 after" in done.stderr
    won, lost = done.stdout.index("won most"), done.stdout.index("lost most")
    assert done.stdout.index("What is a?") > won
    assert "found 0.25" in done.stdout[won:lost]
    assert "found 0.75" in done.stdout[won:lost]
    assert "What is b?" in done.stdout[lost:]
    assert json.loads((tmp_path / "change.json").read_text())[0]["won"] == ["a"]


@pytest.mark.slow
def test_command_says_in_one_line_what_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(run([0.5]).model_dump_json())
    (tmp_path / "other.json").write_text(run([0.5], dataset="other").model_dump_json())
    (tmp_path / "junk.json").write_text('{"kind": "retrieval"}')
    for arguments, said in (
        (["run.json", "other.json"], "different data sets"),
        (["run.json", "junk.json"], "junk.json"),
        (["run.json", "gone.json"], "gone.json"),
        (["run.json", "run.json", "--metric", "f1"], "there are ndcg@10"),
    ):
        done = run_graft(tmp_path, "eval", "compare", *arguments, cwd=tmp_path)
        assert done.returncode == 1, done
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert done.stdout == ""
