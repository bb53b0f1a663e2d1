"""What guessing tokens brings: chat prompts whose answers copy from them, and prose, with and without it.

    python speculate.py --artifact FILE --threads 2

Rounds alternate; a pair of runs a round, speeds are of tokens after the first one, the gain is the median of the
rounds' ratios. Both must say the same. `--rows N` decodes N prompts of a kind side by side. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import geometric_mean, median
from typing import Any

from speculate_prompts import COPY, PROSE

HOW = {"copy": {}, "prose": {}, "prose, drawn": {"temperature": 0.8, "top_p": 0.95, "seed": 1}}


def chat(prompts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def run(model: Any, prompts: list[str], tokens: int, how: dict[str, Any]) -> tuple[float, list[Any]]:
    """Tokens a second after the first of each, of prompts side by side; their results."""
    results = model.generate(chat(prompts), chat=True, max_new_tokens=tokens, **how)
    if len(prompts) == 1:
        return results[0].timings.decode_per_second, results
    start = time.perf_counter()
    results = model.generate(chat(prompts), chat=True, max_new_tokens=tokens, **how)  # prompts are cached by now
    return sum(len(r.tokens) for r in results) / (time.perf_counter() - start), results


def measure(models: dict[str, Any], names: list[str], prompts: list[str], args: Any, how: Any) -> dict[str, Any]:
    """One group of prompts, `args.rounds` times each way."""
    speeds: dict[str, list[float]] = {word: [] for word in models}
    said: dict[str, list[Any]] = {}
    for _ in range(args.rounds):
        for word, model in models.items():
            speed, said[word] = run(model, prompts, args.tokens, how)
            speeds[word].append(speed)
    tokens = {word: [r.tokens for r in results] for word, results in said.items()}
    if tokens["plain"] != tokens["guessing"]:
        raise SystemExit(f"{names}: another text with guesses than without")
    found = [r.speculation for r in said["guessing"]]
    return {
        "prompts": names, "tokens": [len(t) for t in tokens["plain"]], "speeds": speeds,
        "gain": median(g / p for p, g in zip(speeds["plain"], speeds["guessing"], strict=True)),
        "tokens_per_step": [round(s.tokens_per_step, 3) for s in found],
        "acceptance": [[round(a, 3) for a in s.acceptance] for s in found],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure n-gram speculation")
    parser.add_argument("--artifact", required=True, help="written by `onelaunch compile --speculate ngram:K`")
    parser.add_argument("--threads", type=int, default=2, help="[default: 2]")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer at most [default: 200]")
    parser.add_argument("--rounds", type=int, default=3, help="[default: 3]")
    parser.add_argument("--rows", type=int, default=1, help="prompts side by side [default: 1]")
    parser.add_argument("--speculate", default="ngram", help="[default: ngram]")
    args = parser.parse_args()
    import onelaunch

    how = {"plain": "off", "guessing": args.speculate}
    models = {word: onelaunch.load(args.artifact, threads=args.threads, speculate=s) for word, s in how.items()}
    found: dict[str, Any] = {"rows": args.rows, "threads": args.threads, "speculate": args.speculate}
    for kind, settings in HOW.items():
        texts = COPY if kind == "copy" else PROSE
        names = list(texts)
        groups = [names[i : i + args.rows] for i in range(0, len(names) - args.rows + 1, args.rows)]
        each = [measure(models, group, [texts[n] for n in group], args, settings) for group in groups]
        gains = [one["gain"] for one in each]
        found[kind] = {
            "median": median(gains), "mean": geometric_mean(gains), "least": min(gains), "most": max(gains),
            "each": each,
        }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
