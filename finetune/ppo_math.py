"""The arithmetic of PPO, over (answers, tokens) with a mask that is 1 where an answer has a token. Knows no model.

Schulman et al., 2015 (arXiv 1506.02438) and 2017 (arXiv 1707.06347); Ziegler et al., 2019 (arXiv 1909.08593).
"""

from typing import Any

import torch

FARTHEST = 20.0  # of a token's log-probability from what it was, before its ratio leaves the numbers
STEEPEST = 0.2  # of the error that the KL controller answers to, each way


def masked_mean(values: Any, mask: Any) -> Any:
    return (values * mask).sum() / mask.sum()


def whiten(values: Any, mask: Any, shift_mean: bool = True) -> Any:
    """-> with variance 1 over the mask, and mean 0 unless it shall stay; 0 beyond the mask."""
    mean = masked_mean(values, mask)
    scaled = (values - mean) * torch.rsqrt(masked_mean((values - mean) ** 2, mask) + 1e-8)
    return (scaled if shift_mean else scaled + mean) * mask


def token_rewards(scores: Any, kl: Any, mask: Any, kl_coef: float) -> Any:
    """The penalty at each token, and at the answer's last one its score (answers,) too."""
    rewards = -kl_coef * kl * mask
    last = mask.sum(1).long() - 1
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


def gae(rewards: Any, values: Any, mask: Any, gamma: float, lam: float) -> tuple[Any, Any]:
    """-> generalised advantages, and the returns that values are fitted to. An answer's end is an end: nothing follows it."""
    values, advantages = values * mask, torch.zeros_like(rewards)
    following, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for at in reversed(range(rewards.shape[1])):
        surprise = rewards[:, at] + gamma * next_value - values[:, at]
        following = (surprise + gamma * lam * following) * mask[:, at]
        advantages[:, at], next_value = following, values[:, at]
    return advantages, (advantages + values) * mask


def policy_loss(logprobs: Any, before: Any, advantages: Any, cliprange: float) -> tuple[Any, Any]:
    """-> the clipped objective's loss, and whether it was clipped, each (answers, tokens)."""
    ratio = torch.exp((logprobs - before).clamp(-FARTHEST, FARTHEST))
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(plain, clipped), (clipped > plain).float()


def value_loss(values: Any, before: Any, returns: Any, cliprange: float) -> Any:
    """-> (answers, tokens): half the squared error, of the value or of where it may go in one step, the larger."""
    near = torch.clamp(values, before - cliprange, before + cliprange)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def explained_variance(values: Any, returns: Any, mask: Any) -> float:
    """1: values foresee the returns; 0: no better than their mean."""
    held, foreseen = returns[mask.bool()], values[mask.bool()]
    spread = held.var(correction=0)
    return float(1 - (held - foreseen).var(correction=0) / spread) if spread > 0 else 0.0


def adapted(kl_coef: float, kl: float, target: float, horizon: int, episodes: int) -> float:
    """-> the coefficient after `episodes` whose KL was `kl`: larger where that is above the target, smaller below it."""
    error = min(max(kl / target - 1, -STEEPEST), STEEPEST)
    return kl_coef * (1 + error * episodes / horizon)
