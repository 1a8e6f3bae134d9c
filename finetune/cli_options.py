"""What the commands of training share: their settings, and a recipe with what a command says beside it."""

from pathlib import Path

from pydantic import ValidationError

from finetune.recipe import Recipe
from finetune.settings import FinetuneSettings
from ingest.errors import SettingsError


def finetune_settings() -> FinetuneSettings:
    """Raises SettingsError."""
    try:
        return FinetuneSettings()
    except ValidationError as error:
        said = "; ".join(f"FINETUNE_{str(one['loc'][0]).upper()}: {one['msg']}" for one in error.errors())
        raise SettingsError(f"a setting does not fit: {said}; docs/settings.md lists them") from error


def with_rows(recipe: Recipe, data: Path | None, eval_data: Path | None, base: str) -> Recipe:
    """-> the recipe on this base, with the rows that are named."""
    given = {name: path for name, path in (("data", data), ("eval_data", eval_data)) if path is not None}
    rows, model = recipe.data.model_copy(update=given), recipe.model.model_copy(update={"base": base})
    return recipe.model_copy(update={"data": rows, "model": model})
