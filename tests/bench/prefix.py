"""How much sooner a prompt starts whose beginning was read before.

    python prefix.py --artifact FILE --threads 2

Each round: a random prefix cold, the same prompt again, the same prefix with another question. The text of the
second must be the first's. Prints one JSON object, seconds to the first token per round.
"""

from __future__ import annotations

import argparse
import json
import random
from statistics import median
from typing import Any

QUESTION = 20  # tokens after the prefix


def measure(model: Any, prefix: int, rounds: int) -> dict[str, Any]:
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {"cold": [], "again": [], "other_question": []}
    for _ in range(rounds):
        stem, one, other = ([rng.randrange(model.vocab) for _ in range(n)] for n in (prefix, QUESTION, QUESTION))
        prompts = {"cold": stem + one, "again": stem + one, "other_question": stem + other}
        results = {n: model.generate(p, max_new_tokens=24, stop_tokens=[]) for n, p in prompts.items()}
        if results["cold"].tokens != results["again"].tokens:
            raise SystemExit("the same prompt had another text the second time")
        for name, result in results.items():
            seconds[name].append(result.timings.prompt)
    sooner = {
        name: median(c / s for c, s in zip(seconds["cold"], seconds[name], strict=True))
        for name in ("again", "other_question")
    }
    return {
        "model": model.name, "target": model.target, "threads": model.threads, "prefix": prefix,
        "reused": results["again"].reused_tokens, "seconds": seconds, "sooner": sooner,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure prefix reuse")
    parser.add_argument("--artifact", required=True, help="written by `onelaunch compile --context 4K --slots 4`")
    parser.add_argument("--threads", type=int, default=2, help="[default: 2]")
    parser.add_argument("--prefix", type=int, default=1500, help="tokens [default: 1500]")
    parser.add_argument("--rounds", type=int, default=7, help="[default: 7]")
    args = parser.parse_args()
    import onelaunch

    with onelaunch.load(args.artifact, threads=args.threads) as model:
        model.generate([1] * 300, max_new_tokens=4)  # touches memory, starts clocks
        print(json.dumps(measure(model, args.prefix, args.rounds)))


if __name__ == "__main__":
    main()
