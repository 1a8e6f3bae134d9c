"""From one supervised adapter and the same preference pairs: PPO, GRPO and DPO, with reward and KL side by side; and what PPO
does to a reward that can be fooled. Before that, how far a reward model agrees with pairs that it has not seen.

Each training is `graft tune` in a process of its own. What an adapter is worth is measured in one way for all: it answers the
held-out prompts, sampled at temperature 1, the reward model of these pairs scores the answers, and their KL is to the
supervised adapter. The second part is the loop itself with a reward for length, without a penalty and with two; it draws all.
With `--data` the pairs are people's (hh-rlhf), else preferences about machine parts that nobody makes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import tune_rows
from benchmarks.report import Options, Row, at_least, say, settings, shown, skipped
from benchmarks.tune_methods import graft, why_not
from finetune.base_folder import BUNDLED
from finetune.reward_report import Judged
from finetune.rows import read_rows, write_rows
from finetune.runs import read_manifest
from finetune.schemas import PreferenceRow

if TYPE_CHECKING:
    from finetune.ppo_step import Learner, Prompt
    from finetune.rewards import Sample

HH = "hh_rlhf_harmless"
SEED = 17
JUDGE_RATE = 2e-4


class Size(NamedTuple):
    """`episodes`: answers that PPO and GRPO write while they learn. `measured`: held-out prompts."""

    judged: int = 4000
    judged_tokens: int = 192  # of a pair of people's, its longer answer with its prompt, where a reward model learns
    pairs: int = 240
    episodes: int = 240
    batch: int = 16
    answer: int = 64  # tokens
    measured: int = 48
    steps: int = 14  # of the run with a reward for length
    longest: int = 64  # tokens of its answers
    cited: int = 240  # pairs
    sft_steps: int = -1  # all


QUICK = Size(judged=16, pairs=16, episodes=8, batch=4, answer=8, measured=4, steps=2, longest=8, sft_steps=1)
PENALTIES = {"no penalty": 0.0, "0.5 a nat": 0.5, "2 a nat": 2.0}  # where a word is worth WORD
WORD = 0.1
COLOURS = ("#8a8f98", "#7fb0e6", "#1f5fbf")  # of the figure's lines


class Files(NamedTuple):
    """Pairs that a reward model learns from, of these the pairs of the other methods, their chosen answers as rows to imitate,
    pairs that measure, and of these the pairs whose prompts are answered.
    """

    judged: Path
    pairs: Path
    chosen: Path
    held_out: Path
    asked: Path


def run(options: Options) -> list[Row]:
    if lacking := why_not():
        return [skipped("reward and KL", lacking)]
    size = QUICK if options.quick else Size()
    work = options.scratch / (
        "tune-rlhf-quick" if options.quick else "tune-rlhf"
    )  # what is kept there is not taken for the other
    files = _files(options, size, work)
    learns = {
        "learning_rate": JUDGE_RATE,
        "max_steps": size.sft_steps,
        "max_length": size.judged_tokens if options.folder(HH) else 512,
    }
    judge = _tuned(work / "reward", "reward", files.judged, **learns)
    people = "people's pairs" if options.folder(HH) else "made pairs"
    agreement = [_agrees(judge, files.held_out, work, people, 0.6), _on_citations(size, work)]
    sft = _tuned(work / "sft-lora", "sft-lora", files.chosen, max_steps=size.sft_steps, held_out=0)
    found = {"SFT": sft, **_by_method(work, files, size, sft, judge)}
    return [*agreement, *_side_by_side(found, judge, files, size), *_fooled(sft, files, size, work)]


def _files(options: Options, size: Size, work: Path) -> Files:
    folder = options.folder(HH)
    if folder is None:
        made = tune_rows.write(work / "made", "dpo")
        learn, held_out = (read_rows(file, "dpo").rows for file in made)
    else:
        from finetune.human_pairs import part, read_pairs

        parts = part(read_pairs(next(folder.glob("*.jsonl*"))), 0.1, SEED)
        learn, held_out = (*parts.a.rows, *parts.b.rows), parts.held_out.rows
    work.mkdir(parents=True, exist_ok=True)
    files = Files(*(work / f"{name}.jsonl" for name in Files._fields))
    pairs = [row for row in learn[: size.judged] if isinstance(row, PreferenceRow)]
    write_rows(pairs, files.judged)
    write_rows(pairs[: size.pairs], files.pairs)
    write_rows([_imitated(row) for row in pairs[: size.pairs]], files.chosen)
    write_rows(held_out, files.held_out)
    write_rows(held_out[: size.measured], files.asked)
    return files


def _imitated(row: PreferenceRow) -> Any:
    from finetune.schemas import SftRow

    return SftRow(prompt=row.prompt, completion=row.chosen, source=row.source)


def _by_method(work: Path, files: Files, size: Size, sft: Path, judge: Path) -> dict[str, Path]:
    """-> the adapters, each from the supervised one; PPO and GRPO see as many answers of their own."""
    rewarded = {"rewards": "{reward_model=1.0}", "reward_model": judge, "parent": sft, "held_out": 0}
    ppo = {"total_episodes": size.episodes, "batch_size": size.batch, "max_new_tokens": size.answer}
    ppo["mini_batch_size"] = size.batch // 2
    steps = size.episodes // size.batch
    grpo = {"max_steps": steps, "per_device_train_batch_size": 4, "gradient_accumulation_steps": size.batch // 4,
            "num_generations": 4, "max_completion_length": size.answer}  # fmt: skip
    return {
        "PPO": _tuned(work / "ppo", "ppo", files.pairs, **rewarded, **ppo),
        "GRPO": _tuned(work / "grpo", "grpo", files.pairs, **rewarded, **grpo),
        "DPO": _tuned(work / "dpo-lora", "dpo-lora", files.pairs, parent=sft, held_out=0, max_steps=size.sft_steps),
    }


def _on_citations(size: Size, work: Path) -> Row:
    """A reward model of pairs whose faults a check of citations finds: wrong, uncited, miscited, refused, unsupported."""
    files = tune_rows.write(work / "cited", "reward")
    learns = {"learning_rate": JUDGE_RATE, "max_rows": size.cited, "max_steps": size.sft_steps}
    judge = _tuned(work / "reward-cited", "reward", files.learn, **learns)
    return _agrees(judge, files.held_out, work, "citation pairs", 0.8)


def _agrees(judge: Path, pairs: Path, work: Path, title: str, bar: float) -> Row:
    """On pairs that share no prompt with those it has learned from."""
    said = work / "agreement.json"
    graft(["score", str(judge), str(pairs), "--out", str(work / "scores.jsonl"), "--json", str(said)], work)
    found = Judged.model_validate_json(said.read_text())
    manifest, accuracy = read_manifest(judge), found.accuracy
    apart = (("shorter", found.shorter, found.pairs_shorter), ("longer", found.longer, found.pairs_longer))
    note = (
        f"[{accuracy.low:.3f}, {accuracy.high:.3f}], {found.pairs} pairs; "
        + ", ".join(f"where the chosen answer is the {name} one {share or 0:.3f} of {of}" for name, share, of in apart)
        + f"; calibration error {found.calibration_error:.3f}; {manifest.rows} pairs learned in {manifest.seconds:.0f} s"
    )
    say(f"reward model on {title}: {accuracy.value:.3f} {note}")
    return at_least(f"reward model, accuracy on {title}", accuracy.value, "", bar, note)


def _tuned(out: Path, recipe: str, data: Path, **given: Any) -> Path:
    """What is there from an earlier run is not trained again. Raises GraftError with what the command said."""
    if not (out / "manifest.json").exists():
        say(f"training {out.name}")
        command = ["tune", recipe, "--data", str(data), "--out", str(out), "--restart", "--base", BUNDLED]
        graft([*command, *(part for key, value in given.items() for part in ("--set", f"{key}={value}"))], out.parent)
    return out


def _side_by_side(found: Mapping[str, Path], judge: Path, files: Files, size: Size) -> list[Row]:
    from finetune.rewards import reward_model

    base = settings().models / BUNDLED
    reward = reward_model(judge, base, "float32")
    rows = []
    for name, folder in found.items():
        told = _measured(folder, found["SFT"], {"reward_model": reward}, files, size)
        say(f"{name}: reward {told['reward']:.3f}, KL {told['kl']:.2f}")
        note = (
            f"KL to SFT {told['kl']:.2f} nats an answer; {told['length']:.0f} tokens, {told['ended']:.0%} ended; trained in "
            f"{read_manifest(folder).seconds:.0f} s"
        )
        rows.append(shown(f"{name}, reward of held-out answers", told["reward"], "", note))
    return rows


def _measured(folder: Path, sft: Path, rewards: Mapping[str, Any], files: Files, size: Size) -> Mapping[str, float]:
    from finetune.methods import load_plain, put_adapter
    from finetune.ppo_step import roll_out

    model = put_adapter(load_plain(settings().models / BUNDLED, "float32"), folder)
    learner, prompts = _learner(model, sft, rewards, files, max_new_tokens=size.answer, seed=SEED)
    return roll_out(learner, prompts).told


def _learner(
    model: Any, sft: Path, rewards: Mapping[str, Any], files: Files, **given: Any
) -> tuple["Learner", list["Prompt"]]:
    """-> what answers, compared with the supervised adapter, and the held-out prompts."""
    from finetune.chat import prompt_ids, read_chat
    from finetune.ppo_settings import PpoSettings
    from finetune.ppo_step import REFERENCE, Learner, Prompt
    from finetune.schemas import PromptRow

    model.load_adapter(str(sft), REFERENCE)
    chat = read_chat(settings().models / BUNDLED)
    rows = [row for row in read_rows(files.asked, "ppo").rows if isinstance(row, PromptRow)]
    learner = Learner(
        model,
        PpoSettings(**given),
        rewards=rewards,
        weights=dict.fromkeys(rewards, 1.0),
        ends=chat.ends,
        decode=lambda ids: str(chat.tokenizer.decode(ids, skip_special_tokens=True)),
    )
    return learner, [Prompt(prompt_ids(chat, row.prompt), row) for row in rows]


def _fooled(sft: Path, files: Files, size: Size, work: Path) -> list[Row]:
    """A reward that counts words: without a penalty answers grow as long as they may, and the more one costs, the less."""
    told = {
        name: _kept(work / f"length-{penalty}.json", sft, files, size, penalty) for name, penalty in PENALTIES.items()
    }
    figure = work / "reward-hacking.png"
    _draw(told, figure)
    free, *_, bound = told.values()
    rows = []
    for name, steps in told.items():
        first, last = steps[0], steps[-1]
        note = f"{first['length']:.1f} at first; reward {first['reward']:.2f} -> {last['reward']:.2f}, KL {last['kl']:.1f} nats"
        rows.append(shown(f"reward for length, {name}: an answer in the end", last["length"], "tokens", note))
    ratio = free[-1]["length"] / bound[-1]["length"]
    note = f"than with {list(PENALTIES)[-1]}; figure: {figure.name}"
    return [*rows, at_least("how much longer without a penalty", ratio, "times", 1.5, note)]


def _kept(file: Path, sft: Path, files: Files, size: Size, penalty: float) -> list[dict[str, float]]:
    """What is there from an earlier run is not done again."""
    if not file.exists():
        file.write_text(json.dumps(_lengthened(sft, files, size, penalty)))
    found: list[dict[str, float]] = json.loads(file.read_text())
    return found


def _lengthened(sft: Path, files: Files, size: Size, penalty: float) -> list[dict[str, float]]:
    import torch

    from finetune.methods import apply, load_base
    from finetune.ppo_step import improve, roll_out
    from finetune.recipe import Trained

    torch.manual_seed(SEED)
    trained = Trained(parent=sft)
    model = apply(load_base(settings().models / BUNDLED, trained, "float32"), trained)
    learner, prompts = _learner(
        model, sft, {"length": _words}, files, batch_size=size.batch, mini_batch_size=size.batch // 2,
        max_new_tokens=size.longest, learning_rate=2e-4, ppo_epochs=2, init_kl_coef=penalty, target_kl=None, max_kl=None,
        missing_eos_penalty=0, lam=1.0, seed=SEED,
    )  # fmt: skip
    # The shortest prompts are quick, and show no less.
    shortest = sorted(prompts, key=lambda one: len(one.ids))[: size.batch]
    told = []
    for step in range(size.steps):
        rollout = roll_out(learner, shortest)
        told.append(rollout.told)
        say(f"penalty {penalty}, step {step + 1}: {rollout.told['length']:.1f} tokens, KL {rollout.kl:.2f}")
        improve(learner, rollout)
    return told


def _words(samples: Sequence["Sample"]) -> list[float]:
    return [WORD * len(one.answer.split()) for one in samples]


def _draw(told: Mapping[str, Sequence[Mapping[str, float]]], file: Path) -> None:
    """Tokens and KL against steps, one beside the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.2), dpi=150, layout="constrained")
    for axes, key, said in zip(
        figure.subplots(1, 2), ("length", "kl"), ("tokens an answer", "KL, nats an answer"), strict=True
    ):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("step", fontsize=8)
        axes.set_title(said, fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        for (name, steps), colour in zip(told.items(), COLOURS, strict=True):
            axes.plot(range(1, len(steps) + 1), [one[key] for one in steps], color=colour, linewidth=1.6, label=name)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Software": None})
