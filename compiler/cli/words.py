"""What the commands share: how numbers are written on the command line, progress lines, and JSON."""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Annotated, Any, TypeAlias

import typer

FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def human_int(text: str) -> int:
    """`4096`, `4K`, `1m`: k and m are powers of 1024, as context lengths are."""
    found = re.fullmatch(r"(\d+)([kKmM]?)", str(text).strip())
    if not found:
        raise typer.BadParameter(f"expected a number like 4096, 4K or 1M, got `{text}`")
    return int(found[1]) * FACTORS[found[2].lower()]


def positive(text: str) -> int:
    value = human_int(text)
    if value < 1:
        raise typer.BadParameter(f"expected at least 1, got `{text}`")
    return value


def int_list(text: str) -> tuple[int, ...]:
    """`0,2K,4096`"""
    return tuple(human_int(part) for part in str(text).split(","))


def thread_list(text: str) -> tuple[int, ...]:
    counts = int_list(text)
    if not all(1 <= n <= 256 for n in counts):
        raise typer.BadParameter(f"expected 1 to 256, got `{text}`")
    return counts


Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON on stdout")]
Context: TypeAlias = Annotated[
    int | None,
    typer.Option(parser=positive, metavar="N", help="Context to compile for when MODEL is not compiled yet",
                 show_default="4K or the model's own"),
]  # fmt: skip
Threads: TypeAlias = Annotated[
    int | None, typer.Option(help="Worker threads, one of the compiled counts", show_default="one per core")
]
Segments: TypeAlias = Annotated[
    str, typer.Option(metavar="mega|per-phase", help="On a GPU: a step as one launch, or as one for each phase")
]
MODEL_HELP = "A .gguf file, a Hugging Face folder, or a name: smollm2-135m-instruct, gemma3-270m"


def note(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    """As JSON on stdout; numbers that are not finite become null, which JSON has a word for."""
    print(json.dumps(_plain(document), indent=2, ensure_ascii=False))


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None
    if hasattr(x, "item"):
        return _plain(x.item())
    return x


class PassLines:
    """Progress of a compilation: `[ 3/12] fuse  24 ops, 9 phases  0.01 s`, on stderr.

    On a terminal it also says what is being worked on, in a line the next one replaces.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done, self.live = total, 0, sys.stderr.isatty()

    def __call__(self, name: str, seconds: float, detail: str) -> None:
        self.done += 1
        if self.live:
            sys.stderr.write("\r\x1b[K")
        note(f"[{self.done:2d}/{self.total}] {name:12s}  {detail}  {seconds:.2f} s")
        if self.live and self.done < self.total:
            sys.stderr.write(f"[{self.done + 1:2d}/{self.total}] ...")
            sys.stderr.flush()
