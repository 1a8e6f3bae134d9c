"""finetune.reward_report: how far scores agree with preferences, how sure they may be, and whether length decides."""

import math
from pathlib import Path

import pytest

from finetune.reward_report import draw_calibration, judge


def margin(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_accuracy_is_told_apart_for_shorter_and_longer_chosen_answers() -> None:
    margins = [2.0, 1.0, -1.0, 3.0, -2.0, 0.5, 0.0]
    chosen = [5, 4, 3, 9, 8, 6, 7]
    rejected = [9, 9, 9, 2, 3, 6, 7]
    found = judge(margins, chosen, rejected)
    assert (found.pairs, found.pairs_shorter, found.pairs_longer) == (7, 3, 2)
    assert found.shorter == pytest.approx(2 / 3)
    assert found.longer == 0.5
    assert found.accuracy.value == pytest.approx(4.5 / 7)  # a tie counts half
    assert found.accuracy.low < found.accuracy.value < found.accuracy.high
    kept = found.metrics()
    assert kept["accuracy_chosen_shorter"] == pytest.approx(2 / 3)
    assert kept["pairs_chosen_longer"] == 2
    assert "accuracy_chosen_longer" not in judge([1.0], [1], [2]).metrics()  # no such pair is no 0


def test_the_interval_is_over_prompts() -> None:
    margins, lengths = [1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0], [1] * 8
    apart = judge(margins, lengths, lengths).accuracy
    together = judge(margins, lengths, lengths, ["a"] * 4 + ["b"] * 4).accuracy
    assert (together.low, together.high) == (0, 1)
    assert apart.high - apart.low < together.high - together.low


def test_a_model_that_knows_how_sure_it_may_be_has_no_calibration_error(tmp_path: Path) -> None:
    lengths = [1] * 10
    sure = [margin(0.8)] * 8 + [-margin(0.8)] * 2
    assert judge(sure, lengths, lengths).calibration_error == pytest.approx(0, abs=1e-9)
    too_sure = [margin(0.999)] * 6 + [-margin(0.999)] * 4
    found = judge(too_sure, lengths, lengths)
    assert found.calibration_error == pytest.approx(0.399, abs=1e-6)
    assert [(one.pairs, one.accuracy) for one in found.bins] == [(10, pytest.approx(0.6))]
    draw_calibration(found, tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
