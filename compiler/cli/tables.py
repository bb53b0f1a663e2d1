"""What the views of `inspect` share: what was asked of them, tables and texts on stdout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .words import print_json


@dataclass(frozen=True)
class Asked:
    """Options of a view. gbps: bandwidth that times are for, None = the machine's own."""

    worker: int
    depth: int
    gbps: float | None
    file: Path | None
    json: bool


def table(title: str, columns: list[tuple[str, str]], rows: list[list[str]]) -> None:
    """Print a table; columns are (name, left or right). Plain text where stdout is no terminal."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=SIMPLE, show_edge=False, pad_edge=False)
    for name, justify in columns:
        made.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        made.add_row(*row)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=400)  # a pipe has no width to fit into
    console.print(made)


def texts(found: list[tuple[str, str]], json: bool) -> None:
    """(file name, text) pairs one after the other, or as JSON."""
    if json:
        print_json([{"file": name, "text": text} for name, text in found])
        return
    for _, text in found:
        print(text, end="")
