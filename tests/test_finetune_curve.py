"""The training curve: what is logged is kept, drawn, and says which step was the best."""

import json
import math
from pathlib import Path

from finetune.curve import best_step, write_curve

POINTS = [
    {"step": 1, "loss": 2.0, "learning_rate": 1e-4},
    {"step": 2, "eval_loss": 1.5},
    {"step": 3, "loss": 1.0},
    {"step": 4, "eval_loss": 1.25},
    {"step": 5, "loss": 0.5},
    {"step": 6, "eval_loss": 1.75},
    {"step": 6, "train_runtime": 3.0},
]


def pixels(file: Path) -> int:
    """How many are not white."""
    import matplotlib.image

    return int((matplotlib.image.imread(file)[..., :3].min(axis=2) < 0.99).sum())


def test_all_points_are_kept_and_the_best_held_out_step_is_told(tmp_path: Path) -> None:
    assert write_curve(POINTS, tmp_path / "run") == 4
    kept = [json.loads(line) for line in (tmp_path / "run/curve.jsonl").read_text().splitlines()]
    assert kept == POINTS
    assert (tmp_path / "run/curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_both_losses(tmp_path: Path) -> None:
    alone = [point for point in POINTS if "eval_loss" not in point]
    write_curve(POINTS, tmp_path / "both")
    write_curve(alone, tmp_path / "loss")
    write_curve([], tmp_path / "none")
    both, loss, none = (pixels(tmp_path / name / "curve.png") for name in ("both", "loss", "none"))
    assert both > loss > none


def test_what_is_no_number_is_neither_drawn_nor_the_best(tmp_path: Path) -> None:
    points = [{"step": 0, "eval_loss": math.nan}, *POINTS, {"step": 8, "loss": math.inf}]
    assert write_curve(points, tmp_path) == 4
    assert '{"step": 0, "eval_loss": null}' in (tmp_path / "curve.jsonl").read_text()


def test_of_equals_the_earlier_step_is_the_best_and_a_step_that_was_done_again_counts_as_it_came_out_last() -> None:
    assert best_step([{"step": 2, "eval_loss": 1.0}, {"step": 4, "eval_loss": 1.0}]) == 2
    assert best_step([{"step": 2, "eval_loss": 1.0}, {"step": 4, "eval_loss": 2.0}, {"step": 2, "eval_loss": 3.0}]) == 4
    assert best_step([{"step": 1, "loss": 1.0}]) is None
