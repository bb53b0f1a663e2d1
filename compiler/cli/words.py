"""What the commands share: how numbers are written on the command line, progress lines, and JSON."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, TypeAlias, get_type_hints

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


def device_name(text: str) -> str:
    if text not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"expected auto, cpu or cuda, got `{text}`")
    return text


def speculation(text: str) -> str:
    from ...runtime.speculate import parse_speculate

    parse_speculate(text)
    return text


Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON on stdout")]
Context: TypeAlias = Annotated[
    int | None,
    typer.Option(parser=positive, metavar="N", help="Context to compile for when MODEL is not compiled yet",
                 show_default="4K or the model's own"),
]  # fmt: skip
Threads: TypeAlias = Annotated[
    int | None, typer.Option(help="Worker threads, one of the compiled counts", show_default="one per core")
]
Device: TypeAlias = Annotated[
    str,
    typer.Option(parser=device_name, metavar="auto|cpu|cuda",
                 help="Where to run; auto takes an NVIDIA device if one here fits"),
]  # fmt: skip
Segments: TypeAlias = Annotated[
    str, typer.Option(metavar="NAME", help="On a GPU: mega, a step is one launch, or per-phase, one for each phase")
]
Speculate: TypeAlias = Annotated[
    str,
    typer.Option(parser=speculation, metavar="auto|ngram:K|draft:PATH:K|off",
                 help="Guess up to K tokens from the text so far, or by a second model; changes no text"),
]  # fmt: skip
MODEL_HELP = "A .gguf file, a Hugging Face folder, or a name: smollm2-135m-instruct, gemma3-270m"


def spread(options: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make the parameter `options` of a command the fields of a dataclass, each an option of its own.

    So commands share options: the fields are annotated and defaulted as parameters of a command are.
    """
    hints = get_type_hints(options, include_extras=True)
    shared = [Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
              for f in fields(options)]  # fmt: skip

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def spread_out(**given: Any) -> None:
            taken = {f.name: given.pop(f.name) for f in fields(options)}
            command(**given, options=options(**taken))

        own = signature(command, eval_str=True).parameters.values()
        kept = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in own if p.name != "options"]
        spread_out.__signature__ = Signature([*kept, *shared])  # type: ignore[attr-defined]
        return spread_out

    return decorate


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
