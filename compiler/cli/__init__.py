"""The command line: `onelaunch compile | run | chat | inspect | targets | verify | eval | bench | doctor`.

stdout is data (JSON with --json), stderr is progress. Exit codes: 0 ok, 2 usage, 3 unsupported or unloadable,
4 verification failed, 5 environment, 70 a bug of ours, 130 interrupted. One file per group of commands; a
command imports what it needs when it runs, so that `--help` needs neither numpy nor torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ... import __version__
from . import autotune, bench, check, compile, evaluate, inspect, talk, targets
from .failure import report

app = typer.Typer(
    name="onelaunch",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compile the decode step of a language model, ahead of time, into one kernel launch",
    epilog="Exit codes: 0 ok, 2 usage, 3 unsupported, 4 verification failed, 5 environment",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"onelaunch {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    pass


app.command("compile", rich_help_panel="Make")(compile.command)
app.command("autotune", rich_help_panel="Make")(autotune.command)
app.command("run", rich_help_panel="Use")(talk.run)
app.command("chat", rich_help_panel="Use")(talk.chat)
app.command("inspect", rich_help_panel="Look inside")(inspect.command)
app.command("targets", rich_help_panel="Look inside")(targets.command)
app.command("verify", rich_help_panel="Check and measure")(check.verify)
app.command("eval", rich_help_panel="Check and measure")(evaluate.command)
app.command("bench", rich_help_panel="Check and measure")(bench.command)
app.command("doctor", rich_help_panel="Check and measure")(check.doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, whatever happens."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # text a terminal cannot show is no reason to stop
    try:
        code = app(args=arguments, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BaseException as error:
        return report(error)
