"""`onelaunch bench`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ...ir.errors import UsageError
from .talk import HELP
from .words import (
    Context,
    Device,
    Json,
    PassLines,
    Segments,
    human_int,
    int_list,
    note,
    positive,
    print_json,
    speculation,
    thread_list,
)


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=HELP)],
    prompt_tokens: Annotated[
        int, typer.Option(parser=human_int, metavar="N", help="Tokens of the prompt to read, 0 skips it")
    ] = 512,  # type: ignore[assignment]
    tokens: Annotated[int, typer.Option(parser=positive, metavar="N", help="Tokens to generate in a round")] = 64,
    depth: Annotated[
        str, typer.Option(metavar="N,N,..", help="Cached tokens to start from", show_default="0,2048 where it fits")
    ] = "",
    rows: Annotated[int, typer.Option(parser=positive, metavar="N", help="Sequences decoded at the same time")] = 1,
    threads: Annotated[
        str, typer.Option(metavar="N,N,..", help="Worker threads, each measured", show_default="one per core")
    ] = "",
    rounds: Annotated[int, typer.Option(parser=positive, metavar="N", help="Repetitions, the median is reported")] = 5,
    segments: Segments = "mega",
    speculate: Annotated[
        str, typer.Option(parser=speculation, metavar="ngram:K",
                          help="Also decode a text that repeats itself, guessing up to K tokens a step",
                          show_default="no such test")
    ] = "off",
    context: Context = None,
    device: Device = "auto",
    format: Annotated[str, typer.Option(help="md or json")] = "md",
    json: Json = False,
) -> None:  # fmt: skip
    """Measure prompt and generation speed against this machine's read bandwidth"""
    if format not in ("md", "json"):
        raise UsageError(f"--format: expected md or json, got `{format}`")
    counts = thread_list(threads) if threads else (None,)
    depths = int_list(depth) if depth else None
    from ..bench import measure
    from ..ondemand import open_model

    found: list[dict[str, Any]] = []
    for count in counts:
        how: dict[str, Any] = {"threads": count, "context": context, "device": device, "segments": segments,
                               "speculate": speculate}
        with open_model(model, PassLines(12), all_slots=rows > 1, **how) as opened:
            found += measure(opened, prompt_tokens, tokens, depths, rows, rounds, note)
    if json or format == "json":
        print_json(found)
    else:
        _markdown(found)


def _markdown(found: list[dict[str, Any]]) -> None:
    print("| model | target | threads | test | tokens/s | min - max | MB/token | GB/s | read GB/s | of read |")
    print("|---|---|--:|---|--:|--:|--:|--:|--:|--:|")
    for r in found:
        traffic = ["", "", f"{r['read_gbps']:.1f}", ""]
        if r["gbps"]:
            traffic = [
                f"{r['bytes_per_token'] / 1e6:.1f}",
                f"{r['gbps']:.1f}",
                f"{r['read_gbps']:.1f}",
                f"{r['fraction']:.2f}",
            ]
        target = r["target"] if r["segments"] == "mega" else f"{r['target']} {r['segments']}"
        cells = [r["model"], target, str(r["threads"]), r["test"], f"{r['tokens_per_second']:.1f}",
                 f"{r['slowest']:.1f} - {r['fastest']:.1f}", *traffic]  # fmt: skip
        print(f"| {' | '.join(cells)} |")
    print("\nSpeed says nothing about the numbers: `onelaunch verify ARTIFACT MODEL` checks them")
