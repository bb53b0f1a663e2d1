"""`onelaunch verify` and `onelaunch doctor`: is it right, and will it run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .words import MODEL_HELP, Json, note, positive, print_json

PROMPT = "The quick brown fox jumps over the lazy dog. Once upon a time"
MARKS = {"ok": "ok", "note": "note", "missing": "MISSING"}


def verify(
    artifact: Annotated[str, typer.Argument(help="A .ola file or an artifact folder")],
    model: Annotated[str, typer.Argument(help=f"What it was compiled from: {MODEL_HELP[0].lower()}{MODEL_HELP[1:]}")],
    tokens: Annotated[int, typer.Option(parser=positive, metavar="N", help="Tokens to generate and compare")] = 32,  # type: ignore[assignment]
    prompt: Annotated[str, typer.Option(help="Text to start from")] = PROMPT,
    threads: Annotated[int | None, typer.Option(help="Worker threads", show_default="one per core")] = None,
    phases: Annotated[bool, typer.Option("--phases/--no-phases", help="Compare every phase of every layer too")] = True,
    draft: Annotated[
        str | None, typer.Option(metavar="PATH", help="The model that drafts, where one was compiled in")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The text its gptq-.. weights were chosen by")
    ] = None,
    json: Json = False,
) -> None:
    """Compare an artifact with the float32 reference over the same weights"""
    from ..check.verify import verify_artifact
    from ..ondemand import find_artifact, find_model

    paths = find_artifact(artifact, "verify"), find_model(model)
    drafter = find_model(draft) if draft else None
    found = verify_artifact(*paths, prompt, tokens, threads, phases, note, drafter, calibrate)
    print_json(found.as_dict()) if json else print("\n".join(found.lines()))
    if not found.passed:
        raise typer.Exit(4)


def doctor(
    artifact: Annotated[
        str | None, typer.Argument(help="An artifact: which of its targets would run here, and why not the others")
    ] = None,
    json: Json = False,
) -> None:
    """Look at this machine: what onelaunch finds on it, and what it misses"""
    from ..doctor import examine, examine_artifact
    from ..ondemand import find_artifact

    path = find_artifact(artifact, "doctor") if artifact else None
    findings = examine() + (examine_artifact(path) if path else [])
    missing = [f for f in findings if f.status == "missing"]
    if json:
        print_json({"ok": not missing, "findings": [f.as_dict() for f in findings]})
    else:
        for line in _lines(findings):
            print(line)
    if missing:
        raise typer.Exit(5)


def _lines(findings: list[Any]) -> list[str]:
    width = max(len(f.name) for f in findings)
    lines = []
    for f in findings:
        lines.append(f"{MARKS[f.status]:8s} {f.name:{width}s}  {f.value}")
        if f.hint:
            lines.append(f"{'':8s} {'':{width}s}  hint: {f.hint}")
    return lines
