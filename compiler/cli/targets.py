"""`onelaunch targets`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .tables import table as print_table
from .words import Json, print_json

COLUMNS = ("name", "arch", "sms", "boost_mhz", "memory_gb", "bandwidth_gb_s", "issue_4bit", "ms_per_gb", "title")


def command(
    name: Annotated[
        str | None, typer.Argument(help="A machine or an architecture, to see every figure and its source")
    ] = None,
    target_file: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A TOML file, or a folder, with machines of your own")
    ] = None,
    json: Json = False,
) -> None:
    """List the GPUs we have data for: names that `compile --target` takes"""
    from ..gpu.machines import details, machine_for, machines, table

    known = machines(tuple(target_file or ()))
    rows = details(machine_for(name, known)) if name else table(known)
    if json:
        print_json(rows)
        return
    columns = tuple(rows[0]) if name else COLUMNS
    sides = [(c, "right" if isinstance(rows[0][c], int | float) else "left") for c in columns]
    print_table("", sides, [[_shown(row[column]) for column in columns] for row in rows])


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
