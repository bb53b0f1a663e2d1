"""llama.cpp as a benchmark worker; run it with the Python that has `llama-cpp-python`.

    python llama_peer.py --gguf FILE --threads 2 --flash-attention on

Timed is `llama_decode` plus `llama_synchronize`, nothing else: token ids are fixed, there is no sampling, and
batches are filled off the clock. The cache is f16, batches and micro-batches are 512 tokens, every other
parameter is the library's default, as in `llama-bench`. Decoding at depth d fills the cache to d once and
afterwards drops only the new tokens, so repeating a depth costs no prefill; `prefill` empties the cache.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from typing import Any

import llama_cpp as ll  # type: ignore[import-not-found, import-untyped, unused-ignore]
from worker import serve

LOG_ERROR = 4  # ggml.h: GGML_LOG_LEVEL_ERROR
BATCH = 512  # tokens per llama_decode when filling: llama-bench's n_ubatch
WARM_UP = 2  # steps before the clock starts: page faults, thread start, clock frequency


@ll.llama_log_callback
def quiet(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    if level == LOG_ERROR:
        sys.stderr.write(text.decode(errors="replace"))


class LlamaPeer:
    """One model and one context holding one sequence; `filled` tokens are in its cache."""

    def __init__(self, path: str, threads: int, flash_attention: bool, context: int):
        ll.llama_backend_init()
        self.model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"error: expected a GGUF that llama.cpp can load, got `{path}`")
        params = ll.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = (
            ll.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.context = ll.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"error: llama.cpp could not make a context of {context} tokens")
        self.batch = ll.llama_batch_init(BATCH, 0, 1)
        self.vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        self.filled = 0
        self.room = context

    def facts(self) -> dict[str, Any]:
        return {
            "engine": f"llama-cpp-python {ll.__version__}",
            "system": ll.llama_print_system_info().decode().strip(),
        }

    def decode(self, steps: int, depth: int, rows: int) -> list[float]:
        needed = depth + (steps + WARM_UP) * rows
        if needed > self.room:
            raise ValueError(f"expected at most {self.room} tokens, got {needed}; hint: raise --context")
        self.fill(depth)
        seconds = [self.push(rows, all_logits=True) for _ in range(WARM_UP + steps)]
        self.drop_from(depth)
        return seconds[WARM_UP:]

    def prefill(self, tokens: int) -> float:
        self.drop_from(0)
        seconds = self.fill(tokens)
        self.drop_from(0)
        return seconds

    def bytes_per_token(self, depth: int) -> int:
        """All weights once (an untied input table too, which a step hardly reads) and the cache so far.

        0, unknown, for a mixture of experts: a step reads some of them.
        """
        if self.has_experts():
            return 0
        self.fill(depth)
        cache = ll.llama_state_seq_get_size(self.context, 0) if depth else 0
        return ll.llama_model_size(self.model) + cache

    def has_experts(self) -> bool:
        text = ctypes.create_string_buffer(32)
        kind = ctypes.create_string_buffer(64)
        ll.llama_model_meta_val_str(self.model, b"general.architecture", kind, len(kind))
        return ll.llama_model_meta_val_str(self.model, kind.value + b".expert_count", text, len(text)) > 0

    def fill(self, depth: int) -> float:
        if self.filled > depth:
            self.drop_from(depth)
        seconds = 0.0
        while self.filled < depth:
            seconds += self.push(min(BATCH, depth - self.filled), all_logits=False)
        return seconds

    def push(self, count: int, all_logits: bool) -> float:
        """Append `count` fixed tokens; the last one's logits are always computed."""
        self.batch.n_tokens = count
        for i in range(count):
            position = self.filled + i
            self.batch.token[i] = (position * 7919 + 11) % self.vocab
            self.batch.pos[i] = position
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = 0
            self.batch.logits[i] = all_logits or i == count - 1
        start = time.perf_counter()
        status = ll.llama_decode(self.context, self.batch)
        ll.llama_synchronize(self.context)
        seconds = time.perf_counter() - start
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} at position {self.filled}")
        self.filled += count
        return seconds

    def drop_from(self, depth: int) -> None:
        ll.llama_memory_seq_rm(ll.llama_get_memory(self.context), 0, depth, -1)
        self.filled = depth


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve llama.cpp to the benchmark")
    parser.add_argument("--gguf", required=True, help="model file")
    parser.add_argument("--threads", type=int, default=1, help="[default: 1]")
    parser.add_argument("--flash-attention", choices=["on", "off"], default="off", help="[default: off]")
    parser.add_argument("--context", type=int, default=4096, help="tokens of cache [default: 4096]")
    parser.add_argument("--verbose", action="store_true", help="let llama.cpp log to stderr")
    args = parser.parse_args()
    if not args.verbose:
        ll.llama_log_set(quiet, ctypes.c_void_p(0))
    serve(LlamaPeer(args.gguf, args.threads, args.flash_attention == "on", args.context))


if __name__ == "__main__":
    main()
