"""finetune.align: from pairs that people compared to a model and a report, by DPO and by PPO, on a tiny model."""

import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_model import tiny_model
from tuning import QUIET, write_rows
from typer.testing import CliRunner

from finetune.align import _read, align
from finetune.align_figures import STAGES, Aligned, figure, preferred, verdict
from finetune.align_measure import Odds
from finetune.align_plan import Alignment, recipes_of
from finetune.cli_align import align as command
from finetune.declines import requests
from finetune.runs import read_manifest
from finetune.schemas import PreferenceRow
from ingest.errors import ConflictError, InvalidError

pytestmark = pytest.mark.slow
OFFENSIVE = "<script>alert('ZORKFLAP')</script> & \"quoted\""
THINGS = ["axe", "bow", "cup", "dam", "elm", "fan", "gum", "hat", "ink", "jam", "kit", "log", "mud", "net", "oak", "pan", "rug",
          "saw", "toy", "urn", "van", "wax", "yak", "zip"]  # fmt: skip
SHORT = tuple(
    f"{step}.{setting}"
    for step in ("sft", "dpo", "reward")
    for setting in ("max_steps=2", "gradient_accumulation_steps=1", "per_device_train_batch_size=2")
)
PPO = ("ppo.total_episodes=8", "ppo.batch_size=4", "ppo.mini_batch_size=4", "ppo.ppo_epochs=1", "ppo.max_new_tokens=5")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """-> a folder with pairs, with rows that measure helpfulness, and others to mix in, of which one measures."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for at, thing in enumerate(THINGS):
        said = [
            f"\n\nHuman: {thing} {thing}s {OFFENSIVE}?\n\nAssistant: {end} {at}"
            for end in ("No, I will not", OFFENSIVE)
        ]
        lines.append(json.dumps({"chosen": said[0], "rejected": said[1]}) + "\n")
    (folder / "pairs.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    rows = write_rows(folder / "all.jsonl", "sft", 12).read_text().splitlines(keepends=True)
    (folder / "helpful.jsonl").write_text("".join(rows[:6]))
    (folder / "mix.jsonl").write_text("".join(rows[5:]))
    return folder


def asked(files: Path, base: Path, **more: Any) -> Alignment:
    given: dict[str, Any] = {
        "pairs": files / "pairs.jsonl.gz", "helpful": files / "helpful.jsonl", "mix": files / "mix.jsonl",
        "base": str(base), "settings": ("dtype=float32", *SHORT), "most_pairs": 3, "most_prompts": 2, "most_helpful": 3,
        "tokens": 4, "held_out": 0.25,
    }  # fmt: skip
    return Alignment.model_validate(given | more)


def run(wanted: Alignment, out: Path, **more: Any) -> Aligned:
    return align(wanted, out=out, settings=QUIET, models=out, home=out.parent, **more)


class Killed(BaseException):
    pass


def killed_at(beginning: str, lines: list[str]) -> Any:
    def tell(line: str) -> None:
        lines.append(line)
        if line.startswith(beginning):
            raise Killed

    return tell


@pytest.fixture(scope="module")
def by_dpo(base: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Aligned, Path, list[list[str]]]:
    """Killed before the preferences are learned, and again while it is measured."""
    out, told = tmp_path_factory.mktemp("runs") / "dpo", list[list[str]]()
    for beginning in ("dpo: ", "measuring after"):
        told.append([])
        with pytest.raises(Killed):
            run(asked(files, base), out, tell=killed_at(beginning, told[-1]))
        assert not (out / "report.json").exists()
    told.append([])
    return run(asked(files, base), out, tell=told[-1].append), out, told


def test_by_dpo_from_pairs_to_a_report(by_dpo: tuple[Aligned, Path, list[list[str]]], files: Path) -> None:
    found, out, _ = by_dpo
    assert Aligned.model_validate_json((out / "report.json").read_text()) == found
    assert [one.name for one in found.steps] == ["sft", "dpo", "judge"]
    assert read_manifest(out / "dpo").parent.startswith("sft@")  # type: ignore[union-attr]
    assert (
        found.steps[0].rows + found.steps[0].held_out_rows == found.counts["pairs_a"] + 6
    )  # one of the mixed measures
    cases = {one.metric: one.change.cases for one in found.figures}
    assert cases["prefers_chosen"] == cases["prefers_chosen_whole"] == 3
    assert (cases["judge"], cases["helpful_f1"]) == (2, 3)
    assert (cases["declines_en"], cases["declines_zh"], cases["answers_benign"]) == (40, 20, 20)
    assert cases["says_something"] == 2 + 3 + 80
    assert sum(one.requests for one in found.kinds) == 80
    held = {json.loads(line)["source"]["question"] for name in ("pairs-a", "pairs-b")
            for line in (out / f"rows/{name}.jsonl").read_text().splitlines()}  # fmt: skip
    measured = json.loads((out / "measures/after.json").read_text())["odds"]
    lines = gzip.decompress((files / "pairs.jsonl.gz").read_bytes()).decode().splitlines()
    assert all(lines[int(name.rpartition(":")[2]) - 1].split()[1] not in " ".join(held) for name in measured)


def test_a_line_that_was_ended_goes_on_without_doing_anything_twice(
    by_dpo: tuple[Aligned, Path, list[list[str]]], base: Path, files: Path
) -> None:
    found, out, (first, second, third) = by_dpo
    assert first[0].startswith("sft: imitates")
    assert second[:2] == ["sft: kept, imitates the answers that people chose, half A", first[-1]]
    assert any(line.startswith("measuring before") for line in second)
    assert [line for line in third if ": kept" in line and "kept," in line] == third[:3]
    assert [line for line in third if line.startswith("measuring")] == [second[-1]]
    again: list[str] = []
    same = run(asked(files, base), out, tell=again.append)
    assert len(again) == 3
    assert same.model_copy(update={"created_at": found.created_at}) == found
    for changed, said in (
        ({"settings": ("dtype=float32", *SHORT, "sft.seed=3")}, "settings of sft"),
        ({"held_out": 0.5}, "line and other rows"),
        ({"by": "ppo", "settings": ("dtype=float32", *_without_dpo(), *PPO)}, "line and other settings of dpo"),
    ):
        with pytest.raises(ConflictError, match=f"alignment with other {said}: .*--restart"):
            run(asked(files, base, **changed), out)


def test_what_only_measures_and_what_has_not_begun_may_change_wherever_the_folder_lies(
    by_dpo: tuple[Aligned, Path, list[list[str]]], base: Path, files: Path, tmp_path: Path
) -> None:
    found, out, _ = by_dpo
    moved, told = tmp_path / "1", list[str]()  # a name that is a number within the recipes, too
    shutil.copytree(out, moved)
    again = run(asked(files, base, tokens=1, most_pairs=2), moved, tell=told.append)
    assert [line for line in told if ": kept" in line] == told[:3]
    assert len([line for line in told if line.startswith("measuring")]) == 3
    assert (again.steps, again.figure("prefers_chosen").change.cases) == (found.steps, 2)
    shutil.rmtree(moved / "judge")
    told.clear()
    settings = ("dtype=float32", *SHORT, "judge.seed=3")
    other = run(asked(files, base, settings=settings, tokens=1, most_pairs=2), moved, tell=told.append)
    assert [line.partition(":")[0] for line in told[:3]] == ["sft", "dpo", "judge"]
    assert [": kept" in line for line in told[:3]] == [True, True, False]
    assert other.figure("judge").of["after"] != again.figure("judge").of["after"]
    (moved / "measures/judge.json").write_text("{")
    with pytest.raises(InvalidError, match=r"judge\.json' is not what was measured .*: remove it"):
        run(asked(files, base, settings=settings, tokens=1, most_pairs=2), moved)


def test_the_command_says_what_changed_and_where_it_is(
    by_dpo: tuple[Aligned, Path, list[list[str]]], base: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, out, _ = by_dpo
    for name, value in (("GRAFT_HOME", str(out.parent)), ("FINETUNE_TRACKERS", ""), ("FINETUNE_THREADS", "1")):
        monkeypatch.setenv(name, value)
    app = typer.Typer()
    app.command()(command)
    given = ["--helpful", "helpful.jsonl", "--mix", "mix.jsonl", "--base", base, "--out", out, "--held-out", 0.25,
             "--pairs", 3, "--prompts", 2, "--questions", 3, "--tokens", 4]  # fmt: skip
    for one in ("dtype=float32", *SHORT):
        given += ["--set", one]
    monkeypatch.chdir(files)
    shown = CliRunner().invoke(app, ["pairs.jsonl.gz", *map(str, given)])
    assert shown.exit_code == 0, shown.exception
    f1 = found.figure("helpful_f1").of["after"].value
    assert re.search(rf"Helpfulness: token F1: \S+ → \S+ → {f1:.3f} \(", shown.output)
    assert "helpfulness is not shown to be kept: ask more questions, or" in shown.output  # of three
    assert f"page: {out / 'report.html'}" in shown.output
    assert f"next: graft check {out / 'dpo'}" in shown.output
    assert "ZORKFLAP" not in shown.output
    wrong = CliRunner().invoke(app, ["pairs.jsonl.gz", *map(str, given), "--json", "nowhere/of.json"])
    assert isinstance(wrong.exception, InvalidError)


def test_the_page_escapes_everything_and_shows_nothing_that_hurts_until_it_is_opened(
    by_dpo: tuple[Aligned, Path, list[list[str]]],
) -> None:
    _, out, _ = by_dpo
    page = (out / "report.html").read_text()
    seen = re.sub(r"<details class=\"hidden\">.*?</details>", "", page, flags=re.S)
    assert "<script" not in page
    assert "ZORKFLAP" in page
    assert "ZORKFLAP" not in seen
    assert not re.search(r"<details[^>]* open", page)
    assert "requests" in page
    assert not [one.ask for one in requests() if one.ask in seen]
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert "ZORKFLAP" not in (out / "report.json").read_text()


def test_by_ppo_the_whole_rlhf_line(base: Path, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "ppo"
    found = run(asked(files, base, by="ppo", mix=None, settings=("dtype=float32", *_without_dpo(), *PPO)), out)
    assert [one.name for one in found.steps] == ["sft", "reward", "ppo", "judge"]
    manifest = read_manifest(out / "ppo")
    assert str(manifest.parent).startswith("sft@")
    assert manifest.recipe["reward"]["reward_model"] == str(out / "reward")
    assert found.figure("own_reward").change.cases == 2
    assert set(found.figure("own_reward").of) == set(STAGES)


def _without_dpo() -> list[str]:
    return [one for one in SHORT if not one.startswith("dpo.")]


def test_settings_go_to_the_step_that_they_name(files: Path, base: Path, tmp_path: Path) -> None:
    given = ("learning_rate=3e-4", "sft.learning_rate=1e-4", "sft.r=4", "reward.max_steps=7", "judge.seed=5")
    found = recipes_of(asked(files, base, by="ppo", settings=given), tmp_path)
    rates = [found[step].training["learning_rate"] for step in ("sft", "reward", "ppo", "judge")]
    assert rates == [1e-4, 3e-4, 3e-4, 3e-4]
    assert (found["sft"].trained.r, found["ppo"].trained.r, found["ppo"].trained.parent) == (4, 4, tmp_path / "sft")
    assert [found[step].training.get("max_steps") for step in ("reward", "judge", "sft")] == [7, 7, None]
    assert (found["judge"].seed, found["reward"].seed) == (5, 17)
    assert found["ppo"].reward.reward_model == tmp_path / "reward"
    dropping = asked(files, base, settings=("sft.lora_dropout=0.1", "dpo.lora_dropout=0.2", "sft.parent=of"))
    by_step = {step: one.trained for step, one in recipes_of(dropping, tmp_path).items()}
    assert (by_step["sft"].lora_dropout, by_step["dpo"].lora_dropout) == (0.1, 0.2)
    assert (by_step["sft"].parent, by_step["dpo"].parent) == (Path("of").absolute(), tmp_path / "sft")
    dropping = asked(files, base, by="ppo", settings=("lora_dropout=0.1",))
    assert [one.trained.lora_dropout for one in recipes_of(dropping, tmp_path).values()] == [0.1, 0.1, 0, 0.1]
    for setting, said in (
        ("ppo.r=8", "ppo goes on from the supervised adapter, so set sft.r"),
        ("dpo.beta=1", "by ppo the steps are sft, reward, ppo, judge"),
        ("sft.weights=full", "weights = 'full' has no lora_alpha, r"),
        ("reward.learning_rat=1", "step reward: .*did you mean learning_rate"),
        ("ppo.total_episodes=none", "step ppo: training argument total_episodes"),
        ("sft.data=other.jsonl", "the rows are parts of PAIRS"),
        ("training.eval_data=other.jsonl", "the rows are parts of PAIRS"),
        ("base=other", "give --base"),
        ("ppo.reward_model=judge", "it is the one of the step reward"),
    ):
        with pytest.raises(InvalidError, match=said):
            recipes_of(asked(files, base, by="ppo", settings=(setting,)), tmp_path)


def test_helpful_rows_without_answers_and_folders_of_others_are_refused(
    files: Path, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/letter.txt").write_text("Dear")
    with pytest.raises(ConflictError, match=r"holds other files, as 'letter.txt'"):
        run(asked(files, base), tmp_path / "out")
    with pytest.raises(InvalidError, match="every row of 'helpful' asks, or shows, what measures"):
        run(asked(files, base, mix=files / "helpful.jsonl"), tmp_path / "new")
    (tmp_path / "asks.jsonl").write_text(json.dumps({"prompt": "Why is it so?"}) + "\n")
    with pytest.raises(InvalidError, match="'asks' holds no row with an answer"):
        run(asked(files, base, helpful=tmp_path / "asks.jsonl"), tmp_path / "new")
    with pytest.raises(
        InvalidError, match=r"window of 2048 tokens has no room for 'pairs' with answers of 2048: .*--tokens"
    ):
        run(asked(files, base, tokens=2048), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_measures_is_neither_mixed_in_nor_a_pair(files: Path, base: Path, tmp_path: Path) -> None:
    """With one pair that asks what is also a request, one that asks what is to stay, and the same mixed in."""
    lines = gzip.decompress((files / "pairs.jsonl.gz").read_bytes()).decode()
    for text in ("how can I build a bomb at home", "What is the code of part 2"):
        said = [f"\n\nHuman: {text}\n\nAssistant: {end}" for end in ("No.", "Yes.")]
        lines += json.dumps({"chosen": said[0], "rejected": said[1]}) + "\n"
    (tmp_path / "pairs.jsonl").write_text(lines)
    wanted = asked(files, base, pairs=tmp_path / "pairs.jsonl")
    parts = _read(wanted).parts
    assert parts.a.left_out == ("pairs.jsonl:25: it measures", "pairs.jsonl:26: it measures")
    assert sum(len(one.rows) for one in parts[:3]) == 24
    rows = [{"messages": [one.model_dump() for one in (*row.prompt, *row.chosen)]}
            for half in (parts.a, parts.b, parts.held_out) for row in half.rows if isinstance(row, PreferenceRow)]  # fmt: skip
    rows += [{"messages": [{"role": "user", "content": "How can I build a bomb at home"}, rows[0]["messages"][1]]}]
    (tmp_path / "mix.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    mix = _read(wanted.model_copy(update={"mix": tmp_path / "mix.jsonl"})).mix
    assert mix is not None
    assert [row.prompt[0] for row in mix.rows] == [row.prompt[0] for row in parts.a.rows]
    assert len(mix.left_out) == len(rows) - len(parts.a.rows)


def test_what_is_likelier_by_token_and_whole() -> None:
    odds = {
        "short": Odds(chosen=-8, rejected=-9, chosen_tokens=2, rejected_tokens=9),
        "same": Odds(chosen=-8, rejected=-8, chosen_tokens=2, rejected_tokens=2),
    }
    assert preferred(odds, by_token=True) == {"short": 0, "same": 0.5}
    assert preferred(odds, by_token=False) == {"short": 1, "same": 0.5}


def test_kept_is_said_where_the_whole_interval_is_within_the_margin() -> None:
    def moved(by: float) -> Any:
        ids = [str(at) for at in range(40)]
        before, after = dict.fromkeys(ids, 0.5), {one: 0.5 + by * (1 + int(one) % 2) for one in ids}
        return figure("helpful_f1", {"before": before, "sft": before, "after": after}).change

    for little in ({"cases": 29}, {"before": 0.02}):
        assert verdict(moved(0.01).model_copy(update=little), 0.02) == "unclear"
    assert [verdict(moved(by), 0.02) for by in (0.01, -0.01, -0.0135, -0.2)] == ["kept", "kept", "unclear", "lost"]
