"""sentence-transformers' trainers as ours are run: progress, a log, checkpoints, early stopping, an end by signals."""

import difflib
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from finetune import runs
from finetune.arguments import typed
from finetune.curve import best_step, write_curve
from finetune.frozen_layers import States, kept
from finetune.hooks import StoppedError
from finetune.retrieval_recipe import RetrievalRecipe
from finetune.retrieval_run import Ready
from finetune.training_names import encoder_training_names
from ingest.errors import InvalidError, SettingsError

PER_RUN = 0.1  # of the steps between two evaluations, each with a checkpoint
NEEDED = ("torch", "transformers", "datasets", "accelerate", "sentence_transformers")
# Arguments that are settled elsewhere, and where.
ELSEWHERE = {
    "output_dir": "give --out DIR",
    "use_cpu": "set CUDA_VISIBLE_DEVICES to nothing",
    "report_to": "the log and the curve in the run's folder are what is kept",
    "load_best_model_at_end": "set data.stop",
    "resume_from_checkpoint": "give the same command again",
    "restore_callback_states_from_checkpoint": "a run always goes on as it was",
    "metric_for_best_model": "the best is the lowest loss on the stopping questions",
    "greater_is_better": "the best is the lowest loss on the stopping questions",
    "push_to_hub": "nothing is uploaded",
    "prompts": "an embedder's own prefixes are put before its texts",
    "trust_remote_code": "no code that comes with a model is run",
}


def require_sentence_transformers() -> None:
    """Raises SettingsError."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"tuning an embedder or a reranker needs {', '.join(missing)}, which are not installed: run `make train`"
        )


def refuse_unknown(recipe: RetrievalRecipe) -> None:
    """Training arguments by name. Loads no training stack. Raises InvalidError, SettingsError."""
    known = encoder_training_names() - ELSEWHERE.keys()
    for name in recipe.training:
        if name in ELSEWHERE:
            raise InvalidError(f"training argument {name!r} cannot be set: {ELSEWHERE[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), 3, 0.6)
            advice = f"did you mean {' or '.join(near)}?" if near else "sentence-transformers' trainer has none such"
            raise InvalidError(f"unknown training argument {name!r}: {advice}")


def training_arguments(kind: type[Any], run: Ready, **own: Any) -> Callable[[bool], Any]:
    """-> what makes a `kind` of sentence-transformers, told whether there are questions to stop by. Raises InvalidError for a
    value that does not fit, at once.
    """
    given = {name: typed(kind, name, value) for name, value in run.recipe.training.items()}

    def settled(has_stop: bool) -> Any:
        try:
            return kind(**_arguments(run, given, has_stop, own))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise InvalidError(f"recipe {run.recipe.name!r} does not fit: {error}") from error

    settled(bool(run.sides.stop))
    return settled


def _arguments(run: Ready, given: dict[str, Any], has_stop: bool, own: dict[str, Any]) -> dict[str, Any]:
    import torch

    defaults: dict[str, Any] = {
        "run_name": run.recipe.name,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_total_limit": 2,
        "disable_tqdm": True,
        "seed": run.recipe.seed,
        "data_seed": run.recipe.seed,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "per_device_eval_batch_size": given.get("per_device_train_batch_size", 8),
        "save_strategy": given.get("eval_strategy", "steps") if has_stop else "steps",
        "save_steps": given.get("eval_steps", PER_RUN),
    }
    settled: dict[str, Any] = {
        "output_dir": str(run.out / runs.CHECKPOINTS),
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "push_to_hub": False,
        "restore_callback_states_from_checkpoint": True,
    }
    if has_stop:
        defaults |= {"eval_strategy": "steps", "eval_steps": PER_RUN}
        settled |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    else:
        settled |= {"eval_strategy": "no"}
    return defaults | own | given | settled


def train_with(
    kind: type[Any], run: Ready, resume: bool, states: States | None = None, **parts: Any
) -> dict[str, float]:
    """Trains by a trainer of sentence-transformers. -> its last numbers, and those of the step whose weights are kept. Raises
    StoppedError, InvalidError.
    """
    import torch
    from transformers import EarlyStoppingCallback, PrinterCallback

    from finetune.progress import ProgressCallback
    from finetune.train import ended_by_signals, quiet

    quiet()
    if run.settings.threads:
        torch.set_num_threads(run.settings.threads)
    model, reads = parts["model"], parts["model"].max_seq_length
    model.max_seq_length = min(reads, run.recipe.data.max_tokens or reads)
    model.model_card_data.widget = [{}]  # else examples for a card that nobody reads are made, under a bar
    callback = ProgressCallback(run.hooks, run.out / runs.LOG, time.perf_counter())
    stops = (
        [EarlyStoppingCallback(run.recipe.data.patience)]
        if parts.get("eval_dataset") and run.recipe.data.patience
        else []
    )
    checkpoint = runs.last_checkpoint(run.out) if resume else None
    if checkpoint is not None:
        runs.keep_log_until(run.out, runs.step_of(checkpoint))
    encoder, frozen = model[0].auto_model, run.recipe.model.frozen_layers
    with ended_by_signals(callback.stop), kept(encoder, frozen, states), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        trainer = kind(callbacks=[callback, *stops, *run.hooks.callbacks], **parts)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.max_seq_length = reads
    state = trainer.state
    if callback.stopped:
        raise StoppedError(run.out, state.global_step)
    return _metrics(state, run)


def _metrics(state: Any, run: Ready) -> dict[str, float]:
    points = [
        {key: value for key, value in one.items() if isinstance(value, (int, float))} for one in state.log_history
    ]
    write_curve(points, run.out)
    best = best_step(points)
    found: dict[str, float] = {"steps": float(state.global_step)}
    for point in points:
        for name in ("loss", "train_loss", "eval_loss"):
            if name in point and (name != "eval_loss" or point["step"] == best):
                found[name] = float(point[name])
    return found | ({} if best is None else {"best_step": float(best)})
