"""Perplexity of a GGUF file by onelaunch's compiled step and by llama.cpp, on the same tokens by the same rule.

    python tests/bench/perplexity.py --gguf FILE --text FILE --llama-python PATH [--chunks N] [--save]

llama-python: the Python that has `llama-cpp-python`. The text is tokenised by both, and both must agree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onelaunch.compiler.quality.evaluate import Asked, evaluate
from onelaunch.compiler.quality.text_file import checkpoint_tokenizer, read_text
from onelaunch.models.open import open_checkpoint

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Pair:
    """Both perplexities of one file."""

    ours: dict[str, Any]
    llama: dict[str, Any]

    @property
    def apart(self) -> float:
        """Ours over llama.cpp's, less one."""
        return self.ours["formats"][0]["perplexity"] / self.llama["perplexity"] - 1


def compare(gguf: Path, text: Path, python: str, chunks: int, threads: int) -> Pair:
    command = [python, HERE / "perplexity_peer.py", "--gguf", gguf, "--text", text, "--chunks", chunks,
               "--threads", threads]  # fmt: skip
    peer = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(peer.stdout)
    tokens = checkpoint_tokenizer(open_checkpoint(gguf)).encode(read_text(text, "--text"))
    if hashlib.sha256(json.dumps(tokens).encode()).hexdigest() != found["sha256"]:
        raise SystemExit(f"error: expected the same tokens of both, got {len(tokens)} and {found['tokens']}")
    return Pair(evaluate(Asked(gguf, text, chunks=chunks, threads=threads), lambda line: None), found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity beside llama.cpp's")
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--llama-python", required=True, help="a Python with llama-cpp-python")
    parser.add_argument("--chunks", type=int, default=24, help="of 512 tokens, 0 is all [default: 24]")
    parser.add_argument("--threads", type=int, default=1, help="[default: 1]")
    parser.add_argument("--save", action="store_true", help="write tests/bench/results/perplexity-NAME.json")
    args = parser.parse_args()
    pair = compare(args.gguf, args.text, args.llama_python, args.chunks, args.threads)
    ours = pair.ours["formats"][0]["perplexity"]
    print(f"{args.gguf.stem}: onelaunch {ours:.4f}, llama.cpp {pair.llama['perplexity']:.4f}, {pair.apart:+.2%}")
    if args.save:
        path = HERE / "results" / f"perplexity-{args.gguf.stem}.json"
        document = {"apart": pair.apart, "onelaunch": pair.ours, "llama": pair.llama}
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
