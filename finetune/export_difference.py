"""How far two models are apart: their logits on fixed prompts, at the end of each, where an answer begins."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune import check_prompts
from finetune.check_peft import prompt_tokens
from ingest.schemas import Frozen
from service.prompt import CURRENT, built_in_versions

EVERY = 4  # of the fixed set of `graft check`, one
POSITIONS = 48  # of each prompt, the last ones


class Difference(Frozen):
    """`mean`, `largest`: of the absolute differences of the logits, over positions and vocabulary. `same`: share of the
    positions whose likeliest token is the same.
    """

    mean: float
    largest: float
    same: float


def fixed_prompts(base: Path, version: str | None) -> list[list[int]]:
    """-> tokens. `version`: of the prompt that was trained on, where it is one of the product's own."""
    chosen = version if version in built_in_versions() else CURRENT["brief"]
    return prompt_tokens(base, list(check_prompts.prompts(chosen))[::EVERY])


def logits_of(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """-> for each prompt (positions, vocabulary), in float32 on the CPU."""
    found = []
    model.eval()
    for prompt in prompts:
        with torch.inference_mode():
            ids = torch.tensor([prompt], device=model.device)
            logits = model(input_ids=ids, logits_to_keep=min(POSITIONS, len(prompt))).logits[0]
        found.append(logits.float().cpu())
    return found


def difference(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> Difference:
    one, other = torch.cat(list(ones)), torch.cat(list(others))
    apart = (one - other).abs()
    same = (one.argmax(-1) == other.argmax(-1)).float().mean()
    return Difference(mean=float(apart.mean()), largest=float(apart.max()), same=float(same))
