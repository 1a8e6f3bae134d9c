"""`graft eval`: mounted into the command by its entry point."""

import typer

from eval import cli_answers, cli_flip, cli_retrieval, cli_search

app = typer.Typer(no_args_is_help=True, help="Measures retrieval and answers.")
app.command()(cli_retrieval.retrieval)
app.command()(cli_retrieval.compare)
app.command()(cli_flip.flip)
app.command()(cli_answers.answers)
app.command()(cli_answers.report)
app.command()(cli_search.sweep)
app.command()(cli_search.probe)
app.command()(cli_search.calibrate)
app.command()(cli_search.weights)


def mount(command: typer.Typer) -> None:
    """Into the `graft` command."""
    command.add_typer(app, name="eval")
