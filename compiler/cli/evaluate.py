"""`onelaunch eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...ir.errors import UsageError, nearest
from .words import Device, Json, note, positive, print_json

if TYPE_CHECKING:
    from ..quality.evaluate import Asked

RULE, SENSITIVITY = "Rule", "Sensitivity"
BY = ("tensor", "name", "layer")


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint, a name, or an artifact")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="A text, UTF-8")],
    quant: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|FILE,..", help="Also compile it so, as `compile --quant`; may be repeated"),
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The text that gptq-.. chooses weights by, another than --text")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What to compare predictions with",
                                 show_default="the checkpoint as stored")
    ] = None,
    chunk: Annotated[
        int, typer.Option(parser=positive, metavar="N", help="Tokens of a sequence; the second half of each is scored",
                          rich_help_panel=RULE)
    ] = 512,
    chunks: Annotated[
        int | None, typer.Option(parser=positive, metavar="N", help="Sequences at most",
                                 show_default="all of the text, 1 with --sensitivity", rich_help_panel=RULE)
    ] = None,
    stride: Annotated[
        int | None, typer.Option(parser=positive, metavar="N", rich_help_panel=RULE,
                                 help="Begin a sequence every N tokens and score the last N of each",
                                 show_default="no overlap")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Worker threads", show_default="one per core")] = None,
    device: Device = "auto",
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Rank matrices by what quantizing each alone costs",
                           rich_help_panel=SENSITIVITY)
    ] = False,
    by: Annotated[
        str, typer.Option(metavar="|".join(BY), help="What is quantized together", rich_help_panel=SENSITIVITY)
    ] = "tensor",
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a policy for `--quant`, the costliest in --better",
                                  rich_help_panel=SENSITIVITY)
    ] = None,
    better: Annotated[
        str, typer.Option(metavar="NAME", help="What the policy gives matrices that make up half of the cost",
                          rich_help_panel=SENSITIVITY)
    ] = "int8",
    json: Json = False,
) -> None:  # fmt: skip
    """Perplexity on a text, and divergence from the unquantized model, by format"""
    from ..ondemand import find_model
    from ..quality.evaluate import Asked

    quants = tuple(name for given in quant or () for name in given.split(",") if name)
    reference = find_model(against) if against else None
    asked = Asked(find_model(model), text, quants, calibrate, reference, chunk, chunks or 0, stride or 0, threads,
                  device)  # fmt: skip
    if sensitivity:
        _sensitivity(asked, by, policy, better, json)
    elif policy is not None or by != "tensor":
        raise UsageError(f"{'--policy' if policy else '--by'}: expected --sensitivity with it, got none")
    else:
        _evaluate(asked, json)


def _evaluate(asked: Asked, json: bool) -> None:
    from ..quality.evaluate import evaluate

    found = evaluate(asked, note)
    if json:
        print_json(found)
        return
    print("| format | bytes/weight | weights MB | file MB | perplexity | +- | KL mean | KL 99 % | same top |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for r in found["formats"]:
        against = ["", "", ""] if r["kl"] is None else [f"{r['kl']:.5f}", f"{r['kl_99']:.4f}", f"{r['same_top']:.2%}"]
        cells = [r["format"], f"{r['bytes_per_weight']:.3f}", f"{r['weights_bytes'] / 1e6:.1f}",
                 f"{r['file_bytes'] / 1e6:.1f}", f"{r['perplexity']:.4f}", f"{r['error']:.4f}", *against]  # fmt: skip
        print(f"| {' | '.join(cells)} |")
    rule = found["rule"]
    scored = f"the last {rule['stride']} tokens" if rule["stride"] else "the second half"
    print(f"\n{rule['scored']} tokens scored: {scored} of {rule['chunks']} sequences of {rule['chunk']}"
          f"{', each from the begin token on' if rule['bos'] else ''}")  # fmt: skip
    if found["reference"]:
        print(f"KL in nats, same top: of predictions, against `{found['reference']}`")


def _sensitivity(asked: Asked, by: str, policy: Path | None, better: str, json: bool) -> None:
    from ..quality.evaluate import rank
    from ..quality.sensitivity import policy_text

    if by not in BY:
        raise UsageError(f"--by: expected one of {', '.join(BY)}, got `{by}`", hint=nearest(by, BY))
    if asked.against is not None:
        raise UsageError("--against: expected no other reference with --sensitivity, got one",
                         hint="each matrix is compared with the model as stored")  # fmt: skip
    rows = rank(asked, by, better, note)
    if policy is not None:
        policy.write_text(policy_text(rows, asked.quants[0], better))
        note(f"wrote {policy}")
    if json:
        print_json([_plain(r) for r in rows])
        return
    print("| pattern | matrices | KL mean | KL 99 % | same top | perplexity | MB saved | KL per MB |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for r in rows:
        print(f"| {r.pattern} | {r.matrices} | {r.kl:.2e} | {r.kl_99:.2e} | {r.same_top:.2%} | {r.perplexity:.4f} | "
              f"{r.bytes_saved / 1e6:.2f} | {r.kl_per_mb:.2e} |")  # fmt: skip


def _plain(row: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(row), "kl_per_mb": row.kl_per_mb}
