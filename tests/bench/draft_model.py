"""Greedy text of a real model that another drafts for, against the same without drafts: equal, and how fast.

    python draft_model.py --layers 10 --threads 2

The drafter is the model's own first layers (`--layers 30`: the model itself), so its guesses are worth something and
no second checkpoint is needed. 2,000 tokens at least, prompts one by one and four side by side. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from onelaunch.compiler.driver import Request, compile_imported
from onelaunch.ir.limits import Limits
from onelaunch.models.checkpoint import Checkpoint
from onelaunch.models.drafter import with_drafter
from onelaunch.models.fetch import fetch
from onelaunch.models.importer import import_checkpoint
from onelaunch.models.open import open_checkpoint
from onelaunch.runtime import load
from onelaunch.tests.bench.speculate_prompts import COPY, PROSE


def first_layers(checkpoint: Checkpoint, count: int) -> Checkpoint:
    """A GGUF checkpoint without the layers behind the first `count`."""
    number = re.compile(r"blk\.(\d+)\.")
    kept = {n: t for n, t in checkpoint.tensors.items() if not (m := number.match(n)) or int(m[1]) < count}
    hyper = checkpoint.hyper | {"layers": count, "layer_kinds": checkpoint.hyper["layer_kinds"][:count]}
    return dataclasses.replace(checkpoint, hyper=hyper, tensors=kept)


def compile_pair(path: Path, layers: int, drafts: int, output: Path, threads: int) -> Path:
    """The model at `path`, its first layers drafting for it."""
    checkpoint = open_checkpoint(path)
    draft = import_checkpoint(first_layers(checkpoint, layers))
    limits = Limits(rows=128, slots=4, context=1024, outputs=12, drafts=drafts, drafter="model")
    imported = with_drafter(import_checkpoint(checkpoint), draft, drafts)
    made = compile_imported(imported, Request(path, output, "cpu", limits, (threads,)))
    assert made is not None
    return made


def run(model: Any, prompts: list[str], tokens: int) -> tuple[list[Any], float]:
    """Results of prompts side by side, and the seconds from the first one's start to the last one's end."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    start = time.perf_counter()
    results = model.generate(chats, chat=True, max_new_tokens=tokens, stop_tokens=[])
    return results, time.perf_counter() - start


def compare(drafting: Any, plain: Any, prompts: list[str], rows: int, tokens: int) -> dict[str, Any]:
    """All prompts, `rows` at a time, each group with and without drafts in turns: the same text, or SystemExit."""
    results, gains = [], []
    for i in range(0, len(prompts), rows):
        (got, with_drafts), (expected, without) = (run(m, prompts[i : i + rows], tokens) for m in (drafting, plain))
        if [r.tokens for r in got] != [r.tokens for r in expected]:
            raise SystemExit(f"{rows} side by side: another text with drafts than without")
        results += got
        gains.append(without / with_drafts)
    found = [r.speculation for r in results]
    return {
        "equal tokens": sum(len(r.tokens) for r in results), "gain": [round(g, 2) for g in gains],
        "median gain": round(median(gains), 3), "tokens per step": [round(s.tokens_per_step, 2) for s in found],
        "drafted": [sum(n) for n in zip(*(s.drafted for s in found), strict=True)],
        "accepted": [sum(n) for n in zip(*(s.accepted for s in found), strict=True)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Check and measure drafts by a model")
    parser.add_argument("--layers", type=int, default=10, help="of the model that drafts [default: 10]")
    parser.add_argument("--drafts", type=int, default=4, help="[default: 4]")
    parser.add_argument("--tokens", type=int, default=250, help="of an answer [default: 250]")
    parser.add_argument("--threads", type=int, default=2, help="[default: 2]")
    args = parser.parse_args()
    prompts = [*COPY.values(), *PROSE.values()][:8]
    found: dict[str, Any] = vars(args) | {"prompts": len(prompts)}
    with tempfile.TemporaryDirectory() as folder:
        made = compile_pair(fetch("smollm2-135m-instruct"), args.layers, args.drafts, Path(folder) / "a", args.threads)
        with load(made, threads=args.threads) as drafting, load(made, threads=args.threads, speculate="off") as plain:
            for rows in (1, 4):
                found[f"rows {rows}"] = compare(drafting, plain, prompts, rows, args.tokens)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
