"""finetune.reward on a tiny model: it learns a preference, says so on held-out pairs, and scores the same once it is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from tiny_model import tiny_model
from tuning import answer, question, recipe, tune, write_rows
from typer.testing import CliRunner

from finetune.cli_reward import score
from finetune.hooks import Hooks, StoppedError
from finetune.rows import read_rows
from finetune.rows_split import split_rows
from finetune.schemas import Manifest, Message
from ingest.errors import InvalidError, NotFoundError

pytestmark = pytest.mark.slow
SHORT = ("max_steps=12", "eval_steps=6", "held_out=0.25", "gradient_accumulation_steps=1", "per_device_train_batch_size=4",
         "learning_rate=5e-3")  # fmt: skip
ASKED = (Message(role="user", content="What is the code of part 3?"),)
SAID = [(ASKED, "The code is GR-21."), (ASKED, "I would rather talk about turtles, and about the sea."), (ASKED, "")]


class Trained(NamedTuple):
    folder: Path
    manifest: Manifest
    scores: list[float]  # of SAID, before it was written


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", "dpo")


@pytest.fixture(scope="module")
def trained(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    from transformers import TrainerCallback

    from finetune.chat import read_chat
    from finetune.reward_model import RewardModel

    scores: list[float] = []

    class Watching(TrainerCallback):  # type: ignore[misc]
        def on_train_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            scores[:] = RewardModel(model, read_chat(base)).score(SAID)

    out = tmp_path_factory.mktemp("runs") / "reward"
    return Trained(out, tune(recipe("reward", rows, base, *SHORT), out, Hooks(callbacks=(Watching(),))), scores)


def test_it_prefers_what_was_chosen_to_what_was_rejected_also_where_it_has_not_learned(
    trained: Trained, rows: Path
) -> None:
    held = trained.manifest.metrics
    assert (held["accuracy"], held["accuracy_low"], held["accuracy_high"], held["pairs"]) == (1, 1, 1, 6)
    assert held["eval_loss"] < 0.5
    assert held["calibration_error"] < 0.4
    assert held["pairs_chosen_shorter"] + held["pairs_chosen_longer"] <= 6
    learn, held_out = split_rows(read_rows(rows, "reward"), 0.25, 17)
    assert not {row.prompt for row in learn.rows} & {row.prompt for row in held_out.rows}


def test_it_is_never_offered_to_the_engine_and_leaves_its_pictures(trained: Trained, base: Path) -> None:
    from finetune.export import Asked, export
    from finetune.methods import load_tuned

    manifest = trained.manifest
    assert (manifest.method, manifest.servable, manifest.prompt_version) == ("reward", False, None)
    assert "scores answers and writes none" in str(manifest.why_not)
    for refused in (
        lambda: load_tuned(trained.folder, base, "float32"),
        lambda: export(trained.folder, base / "out", base, Asked()),
    ):
        with pytest.raises(InvalidError, match="scores answers and writes none"):
            refused()
    for name in ("calibration.png", "curve.png"):
        assert (trained.folder / name).read_bytes().startswith(b"\x89PNG")


def test_scores_are_the_same_once_it_is_loaded_alone_and_in_a_batch(trained: Trained, base: Path) -> None:
    from finetune.reward_model import load_reward_model

    model = load_reward_model(trained.folder, base, "float32")
    assert model.score(SAID) == pytest.approx(trained.scores, abs=1e-4)
    assert [model.score([one])[0] for one in SAID] == pytest.approx(trained.scores, abs=1e-4)
    assert trained.scores[0] > trained.scores[1]


def test_it_reads_the_tokens_of_serving_up_to_the_end_of_the_answer(trained: Trained, base: Path) -> None:
    from finetune.chat import prompt_ids, read_chat
    from finetune.reward_model import conversation_ids, padding

    chat = read_chat(base)
    for _, said in SAID:
        ids = conversation_ids(chat, ASKED, said)
        start = len(prompt_ids(chat, ASKED))
        assert ids[:start] == prompt_ids(chat, ASKED)
        assert chat.tokenizer.decode(ids[start:-1]) == said
        assert ids[-1] in chat.ends
        assert padding(chat) not in chat.ends


def test_a_reward_model_of_another_tokenizer_is_refused_by_name(trained: Trained, base: Path, tmp_path: Path) -> None:
    from finetune.reward_model import load_reward_model

    other = shutil.copytree(base, tmp_path / "other")
    held = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(held | {"model_max_length": 77}))
    with pytest.raises(InvalidError, match=r"reads the tokens of .*other' has another tokenizer.*--base"):
        load_reward_model(trained.folder, other, "float32")
    asked = recipe("grpo", write_rows(tmp_path / "rows.jsonl", "dpo"), other, "rewards={reward_model=1.0}",
                   f"reward_model={json.dumps(str(trained.folder))}", "held_out=0")  # fmt: skip
    with pytest.raises(InvalidError, match="has another tokenizer"):
        tune(asked, tmp_path / "out")
    writes = shutil.copytree(trained.folder, tmp_path / "writes")
    manifest = json.loads((writes / "manifest.json").read_text())
    (writes / "manifest.json").write_text(json.dumps(manifest | {"method": "sft"}))
    with pytest.raises(InvalidError, match="holds a run of 'sft', and no reward model"):
        load_reward_model(writes, base, "float32")
    with pytest.raises(NotFoundError, match="no finished run"):
        load_reward_model(tmp_path, base, "float32")


def test_a_run_that_was_stopped_goes_on_with_its_head(trained: Trained, base: Path, rows: Path, tmp_path: Path) -> None:
    asked, steps = recipe("reward", rows, base, *SHORT), list[int]()

    def after_six() -> bool:
        steps.append(1)
        return len(steps) >= 6

    with pytest.raises(StoppedError):
        tune(asked, tmp_path / "out", Hooks(cancelled=after_six))
    manifest = tune(asked, tmp_path / "out")
    for name in ("eval_loss", "loss", "calibration_error"):
        assert manifest.metrics[name] == pytest.approx(trained.manifest.metrics[name], rel=1e-3)


def test_it_goes_on_from_a_supervised_adapter_and_takes_no_whole_weights(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    taught = write_rows(tmp_path / "sft.jsonl", "sft")
    tune(recipe("sft-lora", taught, base, "max_steps=1", "held_out=0"), tmp_path / "parent")
    parent = f"parent={json.dumps(str(tmp_path / 'parent'))}"
    manifest = tune(recipe("reward", rows, base, *SHORT[1:], "max_steps=1", parent), tmp_path / "out")
    assert str(manifest.parent).startswith("parent@")
    assert manifest.metrics["pairs"] == 6
    mine = tmp_path / "reward-full.toml"
    mine.write_text('method = "reward"\n[trained]\nweights = "full"\n')
    with pytest.raises(InvalidError, match="trains as a LoRA with a head, not as 'full'"):
        tune(recipe(str(mine), rows, base), tmp_path / "whole")


def test_what_learns_by_it_may_be_seen_by_those_alone_who_may_see_it(
    trained: Trained, base: Path, rows: Path, tmp_path: Path
) -> None:
    judge = shutil.copytree(trained.folder, tmp_path / "judge")
    limited = trained.manifest.model_copy(update={"acl": ("engineers",), "documents": ("secret.md",)})
    (judge / "manifest.json").write_text(limited.model_dump_json())
    given = ("rewards={reward_model=1.0}", f"reward_model={json.dumps(str(judge))}", "max_steps=1", "held_out=0")
    short = ("batch_size=4", "mini_batch_size=4", "max_new_tokens=4")
    manifest = tune(recipe("ppo", rows, base, *given, *short), tmp_path / "out")
    assert (manifest.acl, manifest.documents) == (("engineers",), ("secret.md",))


def test_one_command_scores_rows(trained: Trained, base: Path, rows: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(score)
    single = tmp_path / "single.jsonl"
    lines = [{"prompt": [question(3)], "completion": [answer(3)]}, {"prompt": "Hello?", "completion": "Turtles."}]
    single.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    done = CliRunner().invoke(app, [str(trained.folder), str(single), "--base", str(base)])
    assert done.exit_code == 0, done.exception
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["place"] for line in told] == ["single.jsonl:1", "single.jsonl:2"]
    assert told[0]["score"] == pytest.approx(trained.scores[0], abs=1e-3)
    asked = [
        str(trained.folder),
        str(rows),
        "--out",
        str(tmp_path / "scores.jsonl"),
        "--json",
        str(tmp_path / "said.json"),
    ]
    done = CliRunner().invoke(app, asked)  # the base by the name that the manifest has
    assert done.exit_code == 0, done.exception
    assert "24 pairs: the chosen answer has the higher score in 1.000" in done.output.replace("\n", " ")
    written = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert all(line["margin"] == pytest.approx(line["chosen"] - line["rejected"], abs=2e-4) for line in written)
    assert json.loads((tmp_path / "said.json").read_text())["pairs"] == 24
