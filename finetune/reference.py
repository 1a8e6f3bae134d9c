"""Training against what the model was: by the same weights with the adapter off, by the adapter that the run goes on from, or
by a second, frozen copy of the base where whole weights train. Imports the training stack when it is called.
"""

from typing import Any

from finetune import methods
from finetune.run import Run, trainer_of


def trained_beside_reference(kind: type[Any], run: Run, args: Any, learn: Any, held_out: Any | None) -> Any:
    """-> a trainer of TRL's `kind` that has trained. Raises InvalidError."""
    trained, attention = run.recipe.trained, run.recipe.model.attn_implementation
    model = methods.apply(methods.load_base(run.base, trained, run.dtype, attention), trained)
    reference = None
    if not hasattr(model, "peft_config"):
        reference = methods.load_base(run.base, trained, run.dtype, attention).requires_grad_(False).eval()
    trainer = trainer_of(
        kind, run, model=model, ref_model=reference, args=args, train_dataset=learn, eval_dataset=held_out
    )
    if reference is None and trained.parent is None:
        model.delete_adapter("ref")  # TRL's copy of a new adapter: with the adapter off, the base says the same
    trainer.train(resume_from_checkpoint=str(run.resume_from) if run.resume_from else None)
    if reference is None and trained.parent is not None:
        model.delete_adapter("ref")
    return trainer
