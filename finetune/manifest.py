"""What a run leaves beside its weights: what was trained on what, who may see it, with what, and how well."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from finetune import hardware, methods
from finetune.base_folder import revision, tokenizer_digest
from finetune.curve import best_step
from finetune.recipe import Recipe
from finetune.run import Outcome, Run
from finetune.runs import manifests_before, settled
from finetune.schemas import Manifest, Method, Row, Rows, who_may_see
from ingest.catalog import now
from ingest.language import detect
from service.base_model import read_base
from service.preflight import WEIGHTS

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
NOT_SERVED: dict[Method, str] = {
    "reward": "a reward model scores answers and writes none: `graft score FOLDER ROWS` asks it, and recipes of grpo and ppo "
    "name it as reward_model"
}
COUNTED = ("epoch", "num_input_tokens_seen", "num_tokens", "step", "total_flos")


def manifest_of(run: Run, rows: Rows, trained: Outcome, seconds: float) -> Manifest:
    """`rows`: all of them, as they were read."""
    base = read_base(str(run.base.absolute()), None)
    trainable, everything = methods.counts(trained.trainer.model)
    used = (*run.learn.rows, *run.held_out.rows)
    parent, judge = manifests_before(run.recipe)
    before = [one for one in (parent, judge) if one is not None]  # the weights hold what these were trained on, too
    why_not = NOT_SERVED.get(run.recipe.method) or methods.why_not_servable(run.recipe.trained)
    return Manifest(
        created_at=now(),
        recipe=settled(run.recipe),
        method=run.recipe.method,
        weights=run.recipe.trained.weights,
        seed=run.recipe.seed,
        data=rows.name,
        data_digest=rows.digest,
        rows=len(run.learn.rows) - trained.left_out,
        held_out_rows=len(run.held_out.rows),
        documents=tuple(
            sorted(
                {
                    *(one for row in used for one in row.source.documents),
                    *(one for it in before for one in it.documents),
                }
            )
        ),
        acl=who_may_see([*(row.source.acl for row in used), *(it.acl for it in before)]),
        prompt_version=rows.prompt_version or (parent.prompt_version if parent else None),
        languages=tuple(dict.fromkeys((*languages_of(used), *(parent.languages if parent else ())))),
        base=base.identity,
        base_revision=revision(run.base),
        parent=_parent(run.recipe),
        tokenizer=tokenizer_digest(run.base),
        trainable_parameters=trainable,
        all_parameters=everything,
        metrics={
            **metrics(trained.trainer.state.log_history),
            **trained.metrics,
            "rows_left_out": float(trained.left_out),
        },
        notes=trained.notes,
        versions=_versions(),
        hardware={**hardware.hardware(), "dtype": run.dtype},
        seconds=round(seconds, 1),
        peak_memory_bytes=hardware.peak_memory(),
        servable=why_not is None,
        why_not=why_not,
    )


def languages_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """-> those of at least a twentieth of the rows' questions, the commonest first."""
    told = Counter(detect(row.source.question or row.prompt[-1].content) for row in rows)
    return tuple(name for name, count in told.most_common() if name != "und" and 20 * count >= len(rows))


def metrics(log: Sequence[dict[str, Any]]) -> dict[str, float]:
    """-> the trainer's last numbers; those of the held-out part at the step whose weights are kept."""
    found: dict[str, float] = {}
    best = best_step([one for one in log if "eval_loss" in one])
    for point in log:
        for key, value in point.items():
            if not isinstance(value, (int, float)) or key.removeprefix("eval_") in COUNTED:
                continue
            if not key.startswith("eval_") or point["step"] == best:
                found[key] = float(value)
    steps = max((point["step"] for point in log), default=0)
    tokens = max((point.get("num_input_tokens_seen", 0) for point in log), default=0)
    kept = {"steps": float(steps), "tokens": float(tokens)}
    return found | kept | ({} if best is None else {"best_step": float(best)})


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _parent(recipe: Recipe) -> str | None:
    """As "name@hash of its weights"."""
    if recipe.trained.parent is None:
        return None
    weights = (recipe.trained.parent / WEIGHTS).read_bytes()
    return f"{recipe.trained.parent.name}@{hashlib.sha256(weights).hexdigest()[:16]}"
