"""The names of training arguments, read from the installed libraries' sources: importing those would load torch."""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from finetune.ppo_settings import PpoSettings
from finetune.schemas import Method
from ingest.errors import SettingsError

_CONFIG: dict[Method, str] = {
    "sft": "SFTConfig",
    "dpo": "DPOConfig",
    "kto": "KTOConfig",
    "reward": "RewardConfig",
    "grpo": "GRPOConfig",
}


@cache
def training_names(method: Method) -> frozenset[str]:
    """Of transformers' TrainingArguments and of TRL's for the method; of PPO, which TRL lacks, our own. Raises SettingsError."""
    if method == "ppo":
        return frozenset(PpoSettings.model_fields)
    names = _fields(_package("transformers") / "training_args.py", "TrainingArguments")
    trainer = _package("trl") / "trainer"
    return frozenset(
        [
            *names,
            *_fields(trainer / "base_config.py", "_BaseConfig"),
            *_fields(trainer / f"{method}_config.py", _CONFIG[method]),
        ]
    )


@cache
def encoder_training_names() -> frozenset[str]:
    """Of transformers' TrainingArguments and of sentence-transformers'. Raises SettingsError."""
    names = _fields(_package("transformers") / "training_args.py", "TrainingArguments")
    own = _package("sentence_transformers") / "base" / "training_args.py"
    return frozenset([*names, *_fields(own, "BaseTrainingArguments")])


def _fields(file: Path, name: str) -> list[str]:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return [
                one.target.id
                for one in node.body
                if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
            ]
    return []


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SettingsError(f"{name} is not installed: `make train` adds what training needs")
    return Path(spec.origin).parent
