"""Logits for the learned positions alone: a third to a half of the work of a small model with a large vocabulary.

TRL's trainers score in tiles, on a GPU only where there is a label, but on a CPU at every position of the prompt too. Knows TRL's
`fused_lm_head` protocol (trl.trainer.utils.add_fused_lm_head), and changes no number that comes out of it.
"""

import functools
import types
from typing import Any

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def score_answers_only(model: Any) -> None:
    """Changes the forward of a model that a TRL trainer has prepared, or of the model inside PEFT's."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    whole = base.forward

    @functools.wraps(type(base).forward)
    def forward(self: Any, *args: Any, labels: Any = None, **options: Any) -> Any:
        if labels is None or not options.get("fused_lm_head") or options.get("shift_labels") is not None:
            return whole(*args, labels=labels, **options)
        following = labels[:, 1:]
        mask = following != -100

        def gather(_: Any, __: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state[:, :-1][mask][None]
            return output

        hook = self.base_model.register_forward_hook(gather)
        try:
            scored = whole(*args, **options, shift_labels=following[mask][None])
        finally:
            hook.remove()
        for name in FIELDS:
            if (values := scored.get(name)) is not None:
                scored[name] = values.new_zeros(mask.shape).masked_scatter(mask, values[0])
        scored["label_mask"] = mask
        return scored

    base.forward = types.MethodType(forward, base)
