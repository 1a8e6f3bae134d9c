"""A recipe's `training` as the trainer's own arguments, by the same names, and what is set where it says nothing."""

import difflib
import importlib.util
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from finetune import runs
from finetune.recipe import BY_REWARD, SECTIONS, Recipe
from finetune.run import Run
from finetune.training_names import training_names
from ingest.errors import InvalidError, SettingsError

PER_RUN = 0.1  # of the steps between two evaluations, each with a checkpoint
# Arguments that are settled elsewhere, and where.
ELSEWHERE = {
    "output_dir": "give --out DIR",
    "bf16": "set model.dtype",
    "fp16": "set model.dtype",
    "bf16_full_eval": "set model.dtype",
    "fp16_full_eval": "set model.dtype",
    "use_cpu": "set CUDA_VISIBLE_DEVICES to nothing",
    "report_to": "set FINETUNE_TRACKERS",
    "load_best_model_at_end": "set data.held_out",
    "resume_from_checkpoint": "give the same command again",
    "restore_callback_states_from_checkpoint": "a run always goes on as it was",
    "metric_for_best_model": "the best is the lowest loss on the held-out rows",
    "greater_is_better": "the best is the lowest loss on the held-out rows",
    "include_num_input_tokens_seen": "tokens are always counted",
    "push_to_hub": "nothing is uploaded",
    **dict.fromkeys(
        ("assistant_only_loss", "completion_only_loss", "chat_template_path", "dataset_text_field", "dataset_kwargs",
         "eos_token", "pad_token", "remove_unused_columns", "truncation_mode"),
        "rows are laid out by the base's own chat template, and their answers alone are learned",
    ),
    "reward_weights": "set rewards, each with its weight",
    "chat_template_kwargs": "prompts are laid out as serving lays them out",
    "model_init_kwargs": "set model.dtype or model.attn_implementation",
    "trust_remote_code": "no code that comes with a model is run",
}  # fmt: skip


def arguments(kind: type[Any], run: Run) -> Any:
    """-> a `kind` (TRL's configuration of a method). Raises InvalidError for values that do not fit, SettingsError."""
    given = {name: typed(kind, name, value) for name, value in run.recipe.training.items()}
    try:
        return kind(**_defaults(run, given) | given | _settled(run))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InvalidError(f"recipe {run.recipe.name!r} does not fit: {error}") from error
    except ImportError as error:
        raise SettingsError(f"recipe {run.recipe.name!r} needs a package that is not installed: {error}") from error


def refuse_unknown(recipe: Recipe) -> None:
    """By name, with what is near. Loads no training stack. Raises InvalidError."""
    known = training_names(recipe.method) - ELSEWHERE.keys()
    for name in recipe.training:
        if name in ELSEWHERE:
            raise InvalidError(f"training argument {name!r} cannot be set: {ELSEWHERE[name]}")
        if name in known:
            continue
        section = next((one for one, fields in SECTIONS.items() if name in fields.model_fields), None)
        near = difflib.get_close_matches(name, sorted(known), 3, 0.6)
        advice = f"it belongs to [{section}]" if section else f"did you mean {' or '.join(near)}?" if near else ""
        advice = advice or f"{recipe.method} takes those of transformers' TrainingArguments and of TRL's trainer"
        raise InvalidError(f"unknown training argument {name!r}: {advice}")


def typed(kind: type[Any], name: str, value: Any) -> Any:
    """-> the value as the argument's type has it."""
    try:
        return TypeAdapter(typing.get_type_hints(kind)[name]).validate_python(value)
    except ValidationError as error:
        said = error.errors()[0]["msg"]
        raise InvalidError(f"training argument {name} = {value!r} does not fit: {said}") from error
    except (PydanticUserError, NameError):  # a type that only the trainer knows
        return value


def _defaults(run: Run, given: dict[str, Any]) -> dict[str, Any]:
    """What the recipe may set otherwise."""
    import torch

    defaults: dict[str, Any] = {
        "run_name": run.recipe.name,
        "seed": run.recipe.seed,
        "data_seed": run.recipe.seed,
        "gradient_checkpointing": False,  # TRL's own default is True: a fifth slower, for memory that small models have
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a loss that is no number is told, and ends the run
        "save_total_limit": 2,  # the best and the last
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "per_device_eval_batch_size": given.get("per_device_train_batch_size", 8),
    }
    if run.recipe.method == "grpo":  # which are all the answers to some prompts
        answers = given.get("num_generations_eval") or given.get("num_generations") or 8  # TRL's own
        size = defaults["per_device_eval_batch_size"]
        defaults["per_device_eval_batch_size"] = max(size // answers, 1) * answers
    if run.recipe.trained.weights == "qlora" and torch.cuda.is_available():
        defaults["optim"] = "paged_adamw_32bit"
    if run.held_out.rows:
        defaults |= {"eval_strategy": "steps", "eval_steps": PER_RUN}
        defaults["save_strategy"] = given.get("eval_strategy", "steps")
        defaults["save_steps"] = given.get("eval_steps", PER_RUN)
    else:
        defaults |= {"save_strategy": "steps", "save_steps": PER_RUN}
    return defaults


def _settled(run: Run) -> dict[str, Any]:
    """What a recipe cannot set: see ELSEWHERE."""
    import torch

    settled: dict[str, Any] = {
        "output_dir": str(run.checkpoints),
        "bf16": run.dtype == "bfloat16",
        "fp16": run.dtype == "float16",
        "use_cpu": not torch.cuda.is_available(),
        "report_to": [one for one in run.trackers if one != "tensorboard"] or "none",
        "restore_callback_states_from_checkpoint": True,  # how long early stopping has been waiting
        # A packed sequence has no padding, but ends of turns that may be the padding token.
        "include_num_input_tokens_seen": "all" if run.recipe.training.get("packing") else "non_padding",
        "push_to_hub": False,
    }
    if run.held_out.rows:
        by_reward = run.recipe.method in BY_REWARD  # whose loss says nothing
        return settled | {
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_reward" if by_reward else "eval_loss",
            "greater_is_better": by_reward,
        }
    return settled | {"eval_strategy": "no"}


def refuse_early(run: Run) -> None:
    """What can be known to fail before anything is loaded. Raises InvalidError, SettingsError."""
    import torch

    refuse_here(run.trackers)
    given = run.recipe.training
    optim = str(given.get("optim", ""))
    if optim.startswith("paged") and not torch.cuda.is_available():
        raise InvalidError(f"optim = {optim!r} needs a GPU: leave it out, and a CPU's is taken")
    if run.dtype == "float16" and not torch.cuda.is_available():
        raise InvalidError("model.dtype = 'float16' trains on a GPU only: leave it at 'auto'")


def refuse_here(trackers: Sequence[str]) -> None:
    """Where no recipe can train, whatever it sets. Raises SettingsError."""
    import torch

    if torch.cuda.device_count() > 1 and runs.processes() == 1:
        raise SettingsError(
            "several GPUs are visible to one process: start it with `accelerate launch $(which graft) tune ...`, or name one in "
            "CUDA_VISIBLE_DEVICES"
        )
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise SettingsError(
                f"FINETUNE_TRACKERS names {tracker!r}, which is not installed: install it into .venv, or leave it out"
            )
