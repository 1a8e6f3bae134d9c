"""A recipe as a TOML file, as `graft tune FILE.toml` takes it."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.recipe import Recipe

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def recipe_toml(recipe: Recipe, comments: Sequence[str] = ()) -> str:
    """With what the recipe sets, not with what it leaves to defaults."""
    content = recipe.model_dump(mode="json", exclude_unset=True)
    plain = {key: value for key, value in content.items() if not isinstance(value, dict)}
    sections = {key: value for key, value in content.items() if isinstance(value, dict) and value}
    lines = [f"# {' '.join(one.split())}" for one in comments]
    lines += _pairs(plain)
    for name, fields in sections.items():
        lines += ["", f"[{name}]", *_pairs(fields)]
    return "\n".join(lines) + "\n"


def toml_of(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(_pairs(value)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_of(one) for one in value) + "]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's


def _pairs(fields: Mapping[str, Any]) -> list[str]:
    """Without nulls, which TOML has not."""
    return [
        f"{key if _BARE.fullmatch(key) else json.dumps(key)} = {toml_of(value)}"
        for key, value in fields.items()
        if value is not None
    ]
