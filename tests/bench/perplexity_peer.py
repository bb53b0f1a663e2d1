"""llama.cpp's perplexity of token sequences; run it with the Python that has `llama-cpp-python`.

    python perplexity_peer.py --gguf FILE --text FILE [--tokens TOKENS.json]

The rule is `llama-perplexity`'s, over llama.cpp's own tokens of the text, or over those in TOKENS.json, a list. On
stdout: JSON with the tokens' number, their sha256 and the perplexity after every chunk.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp as ll  # type: ignore[import-not-found, import-untyped, unused-ignore]
import numpy as np
from llama_peer import LlamaPeer, quiet


def tokenize(model: Any, text: str) -> list[int]:
    vocab, raw = ll.llama_model_get_vocab(model), text.encode()
    room = (ll.llama_token * (len(raw) + 8))()
    count = ll.llama_tokenize(vocab, raw, len(raw), room, len(room), True, True)
    if count < 0:
        raise SystemExit(f"error: expected at most {len(room)} tokens, got {-count}")
    return list(room[:count])


def chunk_losses(peer: LlamaPeer, tokens: list[int]) -> np.ndarray:
    """-log p of the tokens behind the middle of one chunk, float64."""
    first, size = len(tokens) // 2, len(tokens)
    peer.drop_from(0)
    batch = peer.batch
    batch.n_tokens = size
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
        batch.logits[i] = first <= i < size - 1
    if ll.llama_decode(peer.context, batch) != 0:
        raise SystemExit("error: llama_decode failed")
    peer.filled = size
    losses = []
    for i in range(first, size - 1):
        row = np.ctypeslib.as_array(ll.llama_get_logits_ith(peer.context, i), (peer.vocab,)).astype(np.float64)
        top = row.max()
        losses.append(top + np.log(np.exp(row - top).sum()) - row[tokens[i + 1]])
    return np.array(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of a GGUF file by llama.cpp")
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, help="token ids to take instead of llama.cpp's own")
    parser.add_argument("--chunk", type=int, default=512, help="at most llama_peer.BATCH [default: 512]")
    parser.add_argument("--chunks", type=int, default=0, help="chunks at most [default: all]")
    parser.add_argument("--threads", type=int, default=1, help="[default: 1]")
    args = parser.parse_args()
    ll.llama_log_set(quiet, ctypes.c_void_p(0))
    peer = LlamaPeer(args.gguf, args.threads, flash_attention=False, context=args.chunk)
    tokens = json.loads(args.tokens.read_text()) if args.tokens else tokenize(peer.model, args.text.read_text())
    vocab = ll.llama_model_get_vocab(peer.model)
    bos = ll.llama_vocab_bos(vocab) if ll.llama_vocab_get_add_bos(vocab) else -1
    losses, running = [], []
    count = len(tokens) // args.chunk
    for start in range(0, min(count, args.chunks or count) * args.chunk, args.chunk):
        piece = tokens[start : start + args.chunk]
        losses.append(chunk_losses(peer, [bos, *piece[1:]] if bos >= 0 else piece))
        running.append(float(np.exp(np.concatenate(losses).mean())))
        print(f"chunk {len(running)} of {count}, perplexity {running[-1]:.4f}", file=sys.stderr, flush=True)
    digest = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
    facts = {**peer.facts(), "tokens": len(tokens), "sha256": digest, "bos": bos >= 0, "running": running}
    print(json.dumps({**facts, "perplexity": running[-1]}))


if __name__ == "__main__":
    main()
