"""finetune.ppo: its arithmetic by hand, its optimum where that is known, and runs on a tiny model that end in every way."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from test_finetune_resume import stopping
from tiny_model import tiny_model
from tuning import recipe, tune, write_rows

from finetune.hooks import StoppedError
from finetune.ppo_settings import PpoSettings
from finetune.rewards import Sample
from finetune.runs import read_manifest
from finetune.schemas import Message, PromptRow
from ingest.errors import InvalidError

pytestmark = pytest.mark.slow


def test_advantages_are_those_of_the_paper_and_end_with_the_answer() -> None:
    import torch

    from finetune.ppo_math import gae

    rewards, values = torch.tensor([[0, 0, 1.0], [0.1, 2, 0]]), torch.tensor([[0.5, 0.6, 0.7], [1, 0.5, 9]])
    mask = torch.tensor([[1, 1, 1.0], [1, 1, 0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    # By hand, from the end: 1 - 0.7, then 0.9 * 0.7 - 0.6 + 0.72 * 0.3, and so on; the value beyond an end counts for nothing.
    torch.testing.assert_close(advantages, torch.tensor([[0.21712, 0.246, 0.3], [0.63, 1.5, 0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.71712, 0.846, 1.0], [1.63, 2.0, 0]]))
    _, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)  # what is really got, whatever was foreseen
    torch.testing.assert_close(returns, torch.tensor([[0.81, 0.9, 1.0], [1.9, 2.0, 0]]))


def test_rewards_are_a_penalty_at_each_token_and_the_score_at_the_last() -> None:
    import torch

    from finetune.ppo_math import token_rewards

    kl, mask = torch.tensor([[0.5, -1, 2.0], [1, 9, 9]]), torch.tensor([[1, 1, 1.0], [1, 0, 0]])
    got = token_rewards(torch.tensor([3.0, 4.0]), kl, mask, 0.1)
    torch.testing.assert_close(got, torch.tensor([[-0.05, 0.1, 2.8], [3.9, 0, 0]]))


def test_whitening_looks_at_no_padding() -> None:
    import torch

    from finetune.ppo_math import whiten

    values, mask = torch.tensor([[1, 2, 3.0], [6, 900, 900]]), torch.tensor([[1, 1, 1.0], [1, 0, 0]])
    for shift, mean in ((True, 0.0), (False, 3.0)):
        got = whiten(values, mask, shift)
        held = got[mask.bool()]
        assert held.mean().item() == pytest.approx(mean, abs=1e-5)
        assert held.var(correction=0).item() == pytest.approx(1, abs=1e-4)
        assert got[1, 1:].tolist() == [0, 0]


@pytest.mark.parametrize(("kl", "factor"), [(12.0, 1.02), (6.6, 1.01), (6.0, 1.0), (5.4, 0.99), (-3.0, 0.98)])
def test_the_coefficient_follows_the_kl_and_not_too_fast(kl: float, factor: float) -> None:
    from finetune.ppo_math import adapted

    assert adapted(0.5, kl, target=6.0, horizon=1000, episodes=100) == pytest.approx(0.5 * factor)


def test_what_moved_too_far_gains_nothing_more() -> None:
    import torch

    from finetune.ppo_math import explained_variance, policy_loss, value_loss

    logprobs = torch.log(torch.tensor([[1.5, 1.1, 0.5, 1.5]]))
    loss, clipped = policy_loss(logprobs, torch.zeros(1, 4), torch.tensor([[1, 1, -1.0, -1]]), 0.2)
    torch.testing.assert_close(loss, torch.tensor([[-1.2, -1.1, 0.8, 1.5]]))
    assert clipped.tolist() == [[1, 0, 1, 0]]
    values = value_loss(torch.tensor([1.0, 0.1]), torch.zeros(2), torch.tensor([2.0, 2.0]), 0.2)
    torch.testing.assert_close(values, torch.tensor([0.5 * 1.8**2, 0.5 * 1.9**2]))
    returns, mask = torch.tensor([[1.0, 2, 3, 99]]), torch.tensor([[1.0, 1, 1, 0]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full((1, 4), 7.0), returns, mask) == pytest.approx(0)


# A policy of one layer over a few tokens, which are its words.

WORDS, END = 6, 5
FIXED: dict[str, Any] = {
    "batch_size": 256, "mini_batch_size": 128, "per_device_train_batch_size": 128, "forward_batch_size": 256, "ppo_epochs": 2,
    "learning_rate": 5e-3, "value_learning_rate": 1e-2, "target_kl": None, "max_kl": None, "seed": 3,
}  # fmt: skip


def learner_of(reward: Any, ends: Sequence[int] = (), **settings: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from finetune.ppo_step import Learner

    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(11)
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data *= 6  # else all words are as likely
    reference = deepcopy(model).requires_grad_(False)
    return Learner(
        model,
        PpoSettings(**(FIXED | settings)),
        rewards={"mine": reward},
        weights={"mine": 1.0},
        ends=frozenset(ends),
        decode=lambda ids: " ".join(map(str, ids)),
        reference=reference,
    )


def asked(count: int, *lengths: int) -> list[Any]:
    """Prompts of these lengths, by turns."""
    from finetune.ppo_step import Prompt

    row = PromptRow(prompt=(Message(role="user", content="?"),))
    return [Prompt([1, 2, 3, 4, 0][: (lengths or (2,))[at % len(lengths or (2,))]], row) for at in range(count)]


def train(learner: Any, steps: int) -> list[dict[str, float]]:
    from finetune.ppo_step import improve, roll_out

    told = []
    for step in range(steps):
        rollout = roll_out(learner, asked(learner.settings.batch_size))
        told.append(rollout.told | improve(learner, rollout, 1 - step / steps))
    return told


def distribution(model: Any, tokens: int, temperature: float) -> Any:
    """-> (WORDS ** tokens,) of all answers of so many."""
    import torch

    answers = torch.tensor(list(product(range(WORDS), repeat=tokens)))
    ids = torch.cat([torch.tensor([[1, 2]]).expand(len(answers), 2), answers], 1)
    with torch.no_grad():
        logprobs = (model(input_ids=ids).logits[:, 1:-1] / temperature).log_softmax(-1)
    return logprobs.gather(-1, answers[..., None]).sum((1, 2)).exp()


def worth(words: Sequence[int]) -> float:
    """Of one word its number; of two, whether they add up, which neither says alone."""
    return words[0] / 5 if len(words) == 1 else float(sum(words) == 5)


@pytest.mark.parametrize(("tokens", "steps"), [(1, 60), (2, 100)])
def test_it_finds_the_optimum_that_is_known(tokens: int, steps: int) -> None:
    """Under a penalty of beta, that is the reference times exp(reward / beta), normalised."""
    import torch

    beta, temperature = 0.5, 0.7

    def reward(samples: Sequence[Sample]) -> list[float]:
        return [worth([int(word) for word in one.answer.split()]) for one in samples]

    learner = learner_of(reward, max_new_tokens=tokens, init_kl_coef=beta, temperature=temperature)
    train(learner, steps)
    before = distribution(learner.reference, tokens, temperature)
    values = torch.tensor([worth(words) for words in product(range(WORDS), repeat=tokens)])
    best = before * torch.exp(values / beta)
    best /= best.sum()
    learned = distribution(learner.model, tokens, temperature)
    assert distance(before, best) > 0.2  # there was something to learn
    assert distance(learned, best) < 0.05
    assert distance(learned, best) < distance(learned, before * torch.exp(values / (beta / 2))) / 3


def distance(one: Any, other: Any) -> float:
    """The total variation."""
    return float((one / one.sum() - other / other.sum()).abs().sum() / 2)


def longer(samples: Sequence[Sample]) -> list[float]:
    return [0.25 * len(one.answer.split()) for one in samples]


def test_a_reward_for_length_makes_answers_longer_and_a_penalty_bounds_it() -> None:
    settings = {"batch_size": 64, "mini_batch_size": 32, "max_new_tokens": 16}
    free, bound = (train(learner_of(longer, [END], init_kl_coef=coef, **settings), 25) for coef in (0.0, 3.0))
    assert free[0]["length"] == bound[0]["length"] < 9
    assert free[-1]["length"] > 13
    assert bound[-1]["length"] < free[-1]["length"] - 3
    assert bound[-1]["kl"] < free[-1]["kl"] / 2
    assert free[-1]["ended"] < 0.5


def test_the_coefficient_steers_to_the_target() -> None:
    given = {"batch_size": 64, "mini_batch_size": 32, "max_new_tokens": 8, "init_kl_coef": 0.01}
    told = train(learner_of(longer, [END], target_kl=0.2, kl_horizon=200, **given), 8)
    assert told[1]["kl_coef"] < told[0]["kl_coef"] == 0.01  # nothing has moved yet
    assert told[-1]["kl"] > 0.2
    assert told[-1]["kl_coef"] > min(one["kl_coef"] for one in told)


@pytest.mark.parametrize("other", [{"per_device_train_batch_size": 5}, {"gradient_checkpointing": True}])
def test_how_many_pass_at_once_changes_no_number(other: dict[str, Any]) -> None:
    """Prompts and answers of several lengths: what they are padded with is not seen."""
    import torch

    from finetune.ppo_step import improve, roll_out

    found = []
    for more in ({}, other):
        learner = learner_of(longer, [END], batch_size=16, mini_batch_size=8, max_new_tokens=6, **more)
        found.append((improve(learner, roll_out(learner, asked(16, 5, 2, 3))), learner.trains))
    (mine, one), (theirs, two) = found
    assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)


def test_what_is_written_has_the_probability_that_it_was_drawn_with() -> None:
    """Alone, without padding and cache, each answer scores as in its batch; before the first step nothing has moved."""
    import torch

    from finetune.ppo_step import roll_out

    learner = learner_of(longer, [END], batch_size=12, mini_batch_size=12, max_new_tokens=6, temperature=0.7)
    prompts = asked(12, 5, 2, 3)
    rollout = roll_out(learner, prompts)
    assert rollout.kl == 0
    assert len({int(length) for length in rollout.answers.mask.sum(1)}) > 2
    for at, prompt in enumerate(prompts):
        answer = rollout.answers.ids[at, : int(rollout.answers.mask[at].sum())]
        with torch.no_grad():
            logits = learner.model(input_ids=torch.tensor([[*prompt.ids, *answer.tolist()]])).logits[0]
        alone = (logits[len(prompt.ids) - 1 : -1] / 0.7).log_softmax(-1).gather(-1, answer[:, None])[:, 0]
        torch.testing.assert_close(rollout.before.logprobs[at, : len(answer)], alone, atol=1e-5, rtol=1e-4)
        assert END not in answer[:-1]


def test_an_answer_of_nothing_is_scored_with_its_end_alone_and_learned_from() -> None:
    from finetune.ppo_step import improve, roll_out

    said: list[str] = []

    def reward(samples: Sequence[Sample]) -> list[float]:
        said.extend(one.answer for one in samples)
        return [float(bool(one.answer)) for one in samples]

    learner = learner_of(reward, range(WORDS), batch_size=8, mini_batch_size=8)  # any word ends it
    rollout = roll_out(learner, asked(8))
    assert said == [""] * 8
    assert (rollout.told["length"], rollout.told["ended"], rollout.told["reward"]) == (1, 1, 0)
    assert all(math.isfinite(value) for value in improve(learner, rollout).values())


def test_an_answer_without_an_end_costs_what_it_should() -> None:
    from finetune.ppo_step import roll_out

    learner = learner_of(lambda samples: [2.0] * len(samples), [END], max_new_tokens=4, missing_eos_penalty=1.5)
    told = roll_out(learner, asked(64)).told
    assert 0 < told["ended"] < 1
    assert told["reward"] == 2
    assert told["reward_with_kl"] == pytest.approx(2 - 1.5 * (1 - told["ended"]))


def test_a_reward_that_is_no_number_is_named() -> None:
    from finetune.ppo_step import roll_out

    learner = learner_of(lambda samples: [float("nan")] * len(samples), max_new_tokens=2)
    with pytest.raises(InvalidError, match="reward 'mine' is nan for the answer"):
        roll_out(learner, asked(2))


# Whole runs.

SAID = (" code", " is", " river", " stone", " green", " water", " house", " seven")
RUN = ("max_steps=8", "held_out=0", "batch_size=32", "mini_batch_size=16", "per_device_train_batch_size=16", "ppo_epochs=2",
       "forward_batch_size=32", "max_new_tokens=5", "learning_rate=1e-2", "save_steps=4", "missing_eos_penalty=0.2",
       "init_kl_coef=0.02", "target_kl=1", "kl_horizon=200")  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, which says hardly anything but a few words and the end of an answer."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    folder = tiny_model(tmp_path_factory.mktemp("base"))
    tokenizer, weights = AutoTokenizer.from_pretrained(folder), load_file(folder / "model.safetensors")
    likely = [*(tokenizer.encode(word)[0] for word in SAID), tokenizer.eos_token_id]
    rows = weights[
        "model.embed_tokens.weight"
    ]  # tied: the first number of the last state is about the same for all tokens
    rows[:, 0], rows[likely, 0] = 0.5, 2.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", "sft")


def run_of(rows: Path, base: Path, *more: str) -> Any:
    return recipe("ppo", rows, base, *RUN, *more)


@pytest.fixture(scope="module")
def unbroken(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    tune(run_of(rows, base), out)
    return out


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_the_reward_rises_and_all_that_tells_of_it_is_logged(unbroken: Path, base: Path) -> None:
    log, manifest = log_of(unbroken), read_manifest(unbroken)
    assert [one["step"] for one in log] == [*range(1, 9), 8]  # at the end, the answers of what is kept
    rewards = [one["reward"] for one in log]
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.1
    assert log[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert log[-1]["kl"] > 0.1
    assert {"rewards/token_f1", "reward_with_kl", "kl_coef", "length", "ended", "entropy", "clip_fraction", "value_loss",
            "explained_variance", "loss", "grad_norm", "learning_rate"} <= log[0].keys()  # fmt: skip
    assert (manifest.metrics["reward"], manifest.metrics["kl"]) == (rewards[-1], log[-1]["kl"])
    assert (manifest.method, manifest.notes, manifest.servable) == ("ppo", (), True)
    assert not (unbroken / "checkpoints").exists()


def test_a_run_that_is_cancelled_and_then_killed_goes_on_as_an_unbroken_one(
    base: Path, rows: Path, unbroken: Path, tmp_path: Path
) -> None:
    out, ended, this = tmp_path / "out", False, Path(__file__)

    def end() -> None:
        nonlocal ended
        ended = True

    with pytest.raises(StoppedError, match="its checkpoint of step 3 is kept"):
        tune(run_of(rows, base), out, stopping(2, end)._replace(cancelled=lambda: ended))
    script = (
        f"import os, signal, sys; sys.path.insert(0, {str(this.parent)!r})\n"
        "from pathlib import Path\nfrom tuning import tune\nfrom test_finetune_ppo import run_of, stopping\n"
        f"asked = run_of(Path({str(rows)!r}), Path({str(base)!r}))\n"
        f"tune(asked, Path({str(out)!r}), stopping(6, lambda: os.kill(os.getpid(), signal.SIGKILL)))\n"
    )
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr[-500:]
    assert sorted(os.listdir(out / "checkpoints")) == ["checkpoint-3", "checkpoint-4"]
    tune(run_of(rows, base), out)
    mine, theirs = log_of(out), log_of(unbroken)
    assert len(mine) == len(theirs)
    spent = [one.pop("seconds") for one in mine]
    assert spent == sorted(spent)  # with those before it was ended
    for one, other in zip(mine, theirs, strict=True):
        assert one == pytest.approx(
            {name: value for name, value in other.items() if name != "seconds"}, rel=1e-3, abs=1e-5
        )
    from safetensors.numpy import load_file

    ours, whole = (load_file(one / "adapter_model.safetensors") for one in (out, unbroken))
    assert all(abs(ours[name] - whole[name]).max() < 1e-4 for name in whole)


def test_a_policy_that_runs_away_is_stopped_and_what_was_good_is_kept(base: Path, rows: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    settings = ("learning_rate=0.3", "max_kl=0.5", "save_steps=1")
    manifest = tune(run_of(rows, base, *settings), tmp_path / "out")
    assert "the weights are those of step 0. Lower learning_rate" in manifest.notes[0]
    assert "stopped after step 1 of 8: the KL to the reference was" in manifest.notes[0]
    assert max(one["kl"] for one in log_of(tmp_path / "out")) > 0.5
    assert (manifest.metrics["kept_step"], manifest.metrics["kl"]) == (0, pytest.approx(0, abs=1e-5))
    held = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(not weight.any() for name, weight in held.items() if "lora_B" in name)  # as it began
    assert not (tmp_path / "out/checkpoints").exists()


def test_it_goes_on_from_an_adapter_which_is_then_the_reference(
    base: Path, rows: Path, unbroken: Path, tmp_path: Path
) -> None:
    long = {"prompt": [{"role": "user", "content": "a very long story " * 40}], "known": {"answers": ["x"]}}
    data = tmp_path / "rows.jsonl"
    data.write_text(rows.read_text() + json.dumps(long) + "\n")
    given = ("max_steps=1", "max_prompt_length=100", f"parent={json.dumps(str(unbroken))}")
    manifest = tune(run_of(data, base, *given), tmp_path / "out")
    log = log_of(tmp_path / "out")
    assert log[0]["kl"] == pytest.approx(0, abs=1e-4)  # against the base alone it is far
    first, last = (log_of(unbroken)[at]["entropy"] for at in (0, -1))
    assert abs(log[0]["entropy"] - last) < abs(log[0]["entropy"] - first) / 3  # it begins where that one ended
    assert log[-1]["kl"] != 0
    assert str(manifest.parent).startswith("unbroken@")
    assert (manifest.rows, manifest.metrics["rows_left_out"]) == (24, 1)
    assert manifest.notes == ("too long to leave room for an answer, and left out: rows.jsonl:25",)
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


def test_whole_weights_are_compared_with_a_copy_of_what_they_were(base: Path, rows: Path, tmp_path: Path) -> None:
    mine = tmp_path / "ppo-full.toml"
    mine.write_text('method = "ppo"\n[trained]\nweights = "full"\n[reward]\nrewards = {token_f1 = 1.0}\n')
    given = ("max_steps=1", "learning_rate=1e-3", "batch_size=8", "mini_batch_size=8")
    tune(recipe(str(mine), rows, base, *RUN, *given), tmp_path / "out")
    log = log_of(tmp_path / "out")
    assert log[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert log[-1]["kl"] != 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("max_prompt_length=8",), r"no prompt fits: the shortest, rows\.jsonl:\d+, has"),
        (("clip_range=0.2",), "unknown training argument 'clip_range': did you mean cliprange"),
        (("learning_rate=-1",), "training argument learning_rate = -1 does not fit"),
        (("mini_batch_size=64",), "mini_batch_size = 64 is more than batch_size = 32"),
        (("lora_dropout=0.1",), "lora_dropout = 0.1: PPO compares"),
        (("rewards={citation_correct=1.0}",), r"rows\.jsonl:\d+: reward 'citation_correct' needs the passages"),
    ],
)
def test_what_cannot_be_trained_is_said(
    settings: tuple[str, ...], said: str, base: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidError, match=said):
        tune(run_of(rows, base, *settings), tmp_path / "out")


def test_a_reward_model_of_another_tokenizer_is_refused(base: Path, rows: Path, unbroken: Path, tmp_path: Path) -> None:
    other = read_manifest(unbroken).model_copy(update={"method": "reward", "tokenizer": "0" * 64})
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge/manifest.json").write_text(other.model_dump_json())
    given = ("rewards={reward_model=1.0}", f"reward_model={json.dumps(str(tmp_path / 'judge'))}")
    with pytest.raises(InvalidError, match=r"the reward model in .*judge.* has another tokenizer"):
        tune(run_of(rows, base, *given), tmp_path / "out")
