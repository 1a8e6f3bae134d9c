"""The commands of training: mounted into `graft` by an entry point. Each loads the training stack when it runs, not before."""

import typer

from finetune import (
    cli_align,
    cli_check,
    cli_dataset,
    cli_export,
    cli_raft,
    cli_reward,
    cli_sweep,
    cli_tune,
    cli_worker,
)


def mount(command: typer.Typer) -> None:
    """Into the `graft` command."""
    command.command()(cli_tune.tune)
    command.command()(cli_align.align)
    command.command()(cli_sweep.sweep)
    for one in (cli_raft.split, cli_raft.raft, cli_raft.preferences, cli_reward.citation_pairs):
        cli_dataset.app.command()(one)
    command.add_typer(cli_dataset.app, name="dataset")
    command.command()(cli_export.export)
    command.command()(cli_check.check)
    command.command()(cli_reward.score)
    command.command()(cli_worker.worker)
