from __future__ import annotations

from typing import Annotated

import typer

from . import _benchmark, _model, _planning

app = typer.Typer(
    help="Predict how single cells respond to perturbations, and say how sure it is.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from gpjepa import __version__

        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


for name, command in {**_model.COMMANDS, **_planning.COMMANDS, **_benchmark.COMMANDS}.items():
    app.command(name)(command)
