"""One step of PPO: answers are written and scored, and then learned from. Knows no recipe, no folder and no trainer.

`roll_out` and `improve` are what `finetune.ppo` repeats. Around the arithmetic of `ppo_math` this is the rest that
Huang et al. found to matter: probabilities at the temperature that was sampled at, dropout off, Adam's epsilon, a value head that
begins at zero.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from finetune.ppo_math import (
    adapted,
    explained_variance,
    gae,
    masked_mean,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from finetune.ppo_settings import PpoSettings
from finetune.rewards import Reward, sample_of, scored
from finetune.schemas import PromptRow
from ingest.errors import InvalidError

REFERENCE = "reference"  # name of the adapter that the run goes on from, as it was


class Prompt(NamedTuple):
    """`ids`: (tokens,), up to where the model goes on."""

    ids: list[int]
    row: PromptRow


class Answers(NamedTuple):
    """Prompts, padded on the left, and their answers, padded on the right; a mask is 1 where there is a token."""

    prompts: Any  # (answers, tokens of the longest prompt)
    prompt_mask: Any
    ids: Any  # (answers, tokens of the longest answer), the token that ends one included
    mask: Any

    def part(self, rows: Any) -> "Answers":
        """-> these rows alone, no wider than they need."""
        before = self.prompts.shape[1] - int(self.prompt_mask[rows].sum(1).max())
        after = int(self.mask[rows].sum(1).max())
        return Answers(
            self.prompts[rows, before:],
            self.prompt_mask[rows, before:],
            self.ids[rows, :after],
            self.mask[rows, :after],
        )


class Scored(NamedTuple):
    """Of each token of the answers: (answers, tokens), 0 beyond their ends. `values`: foreseen before the token is known."""

    logprobs: Any
    values: Any
    entropy: Any


class Rollout(NamedTuple):
    """What a step learns from. `told`: numbers for the log; `kl`: nats an answer, over all of them."""

    answers: Answers
    before: Scored
    advantages: Any
    returns: Any
    kl: float
    told: dict[str, float]


class Learner:
    """A policy with its value head, optimizer, KL coefficient and chance: all that a checkpoint holds.

    `model`: transformers' or PEFT's, with gradients where it trains. `ends`: tokens that end an answer. `reference`: a model of
    its own; None: `model` with its adapter off, or as REFERENCE, where it has one of that name.
    """

    def __init__(
        self,
        model: Any,
        settings: PpoSettings,
        *,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float],
        ends: frozenset[int],
        decode: Callable[[list[int]], str],
        reference: Any | None = None,
        dtype: str = "float32",
    ) -> None:
        self.model, self.settings = model.eval(), settings
        self.reference = None if reference is None else reference.eval()
        self.rewards, self.weights, self.ends, self.decode = rewards, weights, ends, decode
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.device, self.dtype = self.causal.device, getattr(torch, dtype)
        if settings.gradient_checkpointing:
            self.causal.activation_checkpointing_enable({"use_reentrant": False})
        self.head = torch.nn.Linear(self.causal.config.get_text_config().hidden_size, 1, device=self.device)
        torch.nn.init.zeros_(self.head.weight)  # it foresees nothing before it has seen anything
        torch.nn.init.zeros_(self.head.bias)
        self.trains = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        groups = [
            {"params": list(self.trains.values()), "lr": settings.learning_rate},
            {"params": list(self.head.parameters()), "lr": settings.value_learning_rate},
        ]
        self.optimizer = torch.optim.Adam(groups, eps=settings.adam_epsilon)
        self.kl_coef = settings.init_kl_coef
        self.chance = torch.Generator(self.device).manual_seed(settings.seed)

    def state(self) -> dict[str, Any]:
        return {
            "weights": {name: weight.detach() for name, weight in self.trains.items()},
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "kl_coef": self.kl_coef,
            "chance": self.chance.get_state(),
            "torch": torch.get_rng_state(),
            "python": random.getstate(),  # rewards may draw, too
        }

    def load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, weight in self.trains.items():
                weight.copy_(state["weights"][name])
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.kl_coef = state["kl_coef"]
        self.chance.set_state(state["chance"].cpu())
        torch.set_rng_state(state["torch"].cpu())
        random.setstate(state["python"])


def write(learner: Learner, prompts: Sequence[Prompt], *, greedy: bool = False) -> Answers:
    """Samples from all of the distribution at the temperature: what is left out by top-k or top-p would have no probability."""
    size, asked, said = learner.settings.forward_batch_size, [prompt.ids for prompt in prompts], []
    with torch.no_grad():
        for start in range(0, len(asked), size):
            said += _write(asked[start : start + size], learner, greedy)
    return Answers(*_padded(asked, learner.device, left=True), *_padded(said, learner.device))


def _write(prompts: list[list[int]], learner: Learner, greedy: bool) -> list[list[int]]:
    """-> the answers' tokens, the first that ends one included."""
    settings, cache = learner.settings, None
    kept: list[list[int]] = [[] for _ in prompts]
    ids, mask = _padded(prompts, learner.device, left=True)
    mask = mask.long()
    writing = set(range(len(prompts)))
    for _ in range(settings.max_new_tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with _products(learner):
            said = learner.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
        logits, cache = said.logits[:, -1].float() / settings.temperature, said.cache
        likely = logits.softmax(-1)
        ids = likely.argmax(-1, keepdim=True) if greedy else torch.multinomial(likely, 1, generator=learner.chance)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        for row, token in enumerate(ids[:, 0].tolist()):
            if row in writing:
                kept[row].append(token)
                if token in learner.ends:
                    writing.discard(row)
        if not writing:
            break
    return kept


def score(learner: Learner, model: Any, answers: Answers) -> Scored:
    """With gradients, where they are on. The head sits on the last hidden states, which it shapes too."""
    width = answers.ids.shape[1]
    ids, mask = torch.cat([answers.prompts, answers.ids], 1), torch.cat([answers.prompt_mask, answers.mask], 1).long()
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden: list[Any] = []
    hook = causal.base_model.register_forward_hook(lambda _, __, said: hidden.append(said.last_hidden_state))
    try:
        with _products(learner):
            said = model(
                input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False,
                logits_to_keep=width + 1,
            )  # fmt: skip
    finally:
        hook.remove()
    logprobs = (said.logits[:, :-1].float() / learner.settings.temperature).log_softmax(-1)
    values = learner.head(hidden[0][:, -width - 1 : -1].float()).squeeze(-1)
    chosen = logprobs.gather(-1, answers.ids[..., None]).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return Scored(chosen * answers.mask, values * answers.mask, entropy * answers.mask)


def _score_all(learner: Learner, model: Any, answers: Answers) -> Scored:
    found = Scored(*(torch.zeros_like(answers.mask) for _ in Scored._fields))
    with torch.no_grad():
        for rows in torch.arange(len(answers.ids)).split(learner.settings.forward_batch_size):
            for whole, part in zip(found, score(learner, model, answers.part(rows)), strict=True):
                whole[rows, : part.shape[1]] = part
    return found


@contextmanager
def as_reference(learner: Learner) -> Iterator[Any]:
    """-> the model that the policy is compared with."""
    if learner.reference is not None:
        yield learner.reference
    elif REFERENCE in learner.model.peft_config:
        learner.model.set_adapter(REFERENCE, inference_mode=True)
        try:
            yield learner.model
        finally:
            learner.model.set_adapter("default")
    else:
        with learner.model.disable_adapter():
            yield learner.model


def _products(learner: Learner) -> Any:
    return torch.autocast(learner.device.type, learner.dtype, enabled=learner.dtype is not torch.float32)


def _padded(rows: Sequence[list[int]], device: Any, left: bool = False) -> tuple[Any, Any]:
    """-> ids and mask, (rows, tokens of the longest)."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width)
    for at, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(len(row))
        ids[at, where], mask[at, where] = torch.tensor(row, dtype=torch.long), 1.0
    return ids.to(device), mask.to(device)


def roll_out(learner: Learner, prompts: Sequence[Prompt]) -> Rollout:
    """Raises InvalidError for a reward that is no number."""
    settings, answers = learner.settings, write(learner, prompts)
    said, ended = texts(learner, answers)
    parts = scored(learner.rewards, [sample_of(prompt.row, text) for prompt, text in zip(prompts, said, strict=True)])
    total = [sum(learner.weights[name] * parts[name][at] for name in parts) for at in range(len(prompts))]
    scores = torch.tensor(total, device=learner.device) - (settings.missing_eos_penalty or 0.0) * ~ended
    before = _score_all(learner, learner.model, answers)
    with as_reference(learner) as reference:
        kl = before.logprobs - _score_all(learner, reference, answers).logprobs
    rewards = token_rewards(scores, kl, answers.mask, learner.kl_coef)
    with_kl = float(rewards.sum(1).mean())
    if settings.whiten_rewards:
        rewards = whiten(rewards, answers.mask, shift_mean=False)
    advantages, returns = gae(rewards, before.values, answers.mask, settings.gamma, settings.lam)
    if settings.whiten_advantages:
        advantages = whiten(advantages, answers.mask)
    told = {
        "reward": math.fsum(total) / len(total),
        **{f"rewards/{name}": math.fsum(values) / len(values) for name, values in parts.items()},
        "reward_with_kl": with_kl,
        "kl": float(kl.sum(1).mean()),
        "kl_coef": learner.kl_coef,
        "length": float(answers.mask.sum(1).mean()),
        "ended": float(ended.float().mean()),
        "entropy": float(masked_mean(before.entropy, answers.mask)),
        "explained_variance": explained_variance(before.values, returns, answers.mask),
    }
    return Rollout(answers, before, advantages, returns, told["kl"], told)


def improve(learner: Learner, rollout: Rollout, rate: float = 1.0) -> dict[str, float]:
    """Learns from a rollout, at this share of the learning rates. -> numbers for the log, means over all that it did.

    Raises InvalidError where it leaves the numbers.
    """
    settings, told = learner.settings, dict.fromkeys(("loss", "policy_loss", "value_loss", "clip_fraction"), 0.0)
    for group, most in zip(learner.optimizer.param_groups, _rates(settings), strict=True):
        group["lr"] = most * rate
    norms, passed = [], 0.0
    learner.model.train(settings.gradient_checkpointing)  # which needs it; else without: dropout would be a difference
    for _ in range(settings.ppo_epochs):
        order = torch.randperm(len(rollout.answers.ids), generator=learner.chance, device=learner.device)
        for batch in order.split(settings.mini_batch_size):
            tokens = float(rollout.answers.mask[batch].sum())
            learner.optimizer.zero_grad()
            for rows in batch.split(settings.per_device_train_batch_size):
                for name, total in _backward(learner, rollout, rows, tokens).items():
                    told[name] += total
            norms.append(_step(learner))
            passed += tokens
    learner.model.eval()
    kl, episodes = rollout.kl, len(rollout.answers.ids)
    if settings.target_kl is not None:
        learner.kl_coef = adapted(learner.kl_coef, kl, settings.target_kl, settings.kl_horizon, episodes)
    means = {name: total / passed for name, total in told.items()}
    return means | {"grad_norm": math.fsum(norms) / len(norms), "learning_rate": settings.learning_rate * rate}


def _backward(learner: Learner, rollout: Rollout, rows: Any, tokens: float) -> dict[str, float]:
    """Adds the gradients of these answers' share of a loss over `tokens`. -> sums over their tokens."""
    settings, part = learner.settings, rollout.answers.part(rows)
    width, mask = part.ids.shape[1], part.mask
    before, advantages, returns = rollout.before, rollout.advantages[rows, :width], rollout.returns[rows, :width]
    now = score(learner, learner.model, part)
    policy, clipped = policy_loss(now.logprobs, before.logprobs[rows, :width], advantages, settings.cliprange)
    value = value_loss(now.values, before.values[rows, :width], returns, settings.cliprange_value)
    loss = ((policy + settings.vf_coef * value - settings.entropy_coef * now.entropy) * mask).sum()
    (loss / tokens).backward()
    sums = {"loss": loss, "policy_loss": policy * mask, "value_loss": value * mask, "clip_fraction": clipped * mask}
    return {name: float(each.detach().sum()) for name, each in sums.items()}


def _step(learner: Learner) -> float:
    """-> the gradients' norm, before it was limited. Raises InvalidError where it is no number."""
    weights = [*learner.trains.values(), *learner.head.parameters()]
    norm = float(torch.nn.utils.clip_grad_norm_(weights, learner.settings.max_grad_norm))
    if not math.isfinite(norm):
        rate = learner.settings.learning_rate
        raise InvalidError(
            f"the gradients are {norm}: lower learning_rate (it is {rate:g}), or set model.dtype to float32"
        )
    learner.optimizer.step()
    return norm


def _rates(settings: PpoSettings) -> tuple[float, float]:
    return settings.learning_rate, settings.value_learning_rate


def texts(learner: Learner, answers: Answers) -> tuple[list[str], Any]:
    """-> what was said, without its end, and (answers,) whether it has one. An answer of nothing but its end is ""."""
    said, ended = [], []
    for ids, length in zip(answers.ids.tolist(), answers.mask.sum(1).long().tolist(), strict=True):
        ended.append(ids[length - 1] in learner.ends)
        said.append(learner.decode(ids[: length - ended[-1]]))
    return said, torch.tensor(ended, device=learner.device)
