"""Random-weight GGUF files of known model shapes, so that two engines can be timed on the same bytes.

Blocks are drawn directly in their stored form (uniform codes, scales of the right size) instead of being
quantised from floats: `gguf.quants` cannot quantise Q6_K, and drawing bytes takes seconds, not minutes.
Scales have random signs, so weights have no common mean; every matrix has rms 1/sqrt(fan in), the two that
write the residual are smaller (see `matrices`), and norms are near 1: logits then have rms 1 and greedy
decoding does not just repeat one token. The vocabulary is synthetic: every byte, then every longer string in
counting order, each with the merge that makes it, and three control tokens.

    python tests/bench/shapes.py qwen3-0.6b --format q4_0 -o qwen3-0.6b-q4_0.gguf

A new shape is a line of SHAPES, a new storage a line of FORMATS. Same name, format and seed: same bytes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, TokenType

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True)
class Shape:
    """A decoder of the Qwen3 architecture, dense or with experts in every layer (`ffn` is then an expert's)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int = 40960
    rope_theta: float = 1e6
    eps: float = 1e-6
    tied: bool = True  # the head is the embedding
    experts: int = 0
    chosen: int = 0  # experts of a row


SHAPES = {
    "qwen3-tiny": Shape(256, 4, 4, 2, 64, 768, 2048, context=4096),
    "qwen3-0.6b": Shape(1024, 28, 16, 8, 128, 3072, 151936),
    "qwen3-1.7b": Shape(2048, 28, 16, 8, 128, 6144, 151936),
    "qwen3-moe": Shape(1024, 24, 16, 8, 128, 512, 151936, experts=32, chosen=4),
    "qwen3-8b": Shape(4096, 36, 32, 8, 128, 12288, 151936, tied=False),
}


@dataclass(frozen=True)
class Storage:
    """How a file stores linears, the embedding and head, and experts where it has any."""

    linear: Kind
    head: Kind
    experts: Kind


# `llama-quantize` pairs q4_0 with a q6_k head, and mxfp4 experts with q8_0 for all else.
FORMATS = {
    "q4_0": Storage(Kind.Q4_0, Kind.Q6_K, Kind.Q4_0),
    "q4_0pure": Storage(Kind.Q4_0, Kind.Q4_0, Kind.Q4_0),
    "q8_0": Storage(Kind.Q8_0, Kind.Q8_0, Kind.Q8_0),
    "mxfp4": Storage(Kind.Q8_0, Kind.Q8_0, Kind.MXFP4),
    "bf16": Storage(Kind.BF16, Kind.BF16, Kind.BF16),
}


def random_bytes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def random_scales(rng: np.random.Generator, count: int, size: float) -> np.ndarray:
    """`count` f16 of random sign and rms near `size`, as bytes [count, 2]."""
    scales = size * rng.uniform(0.75, 1.25, count) * rng.choice([-1, 1], count)
    return scales.astype(np.float16).view(np.uint8).reshape(count, 2)


def q4_0(rng: np.random.Generator, rows: int, cols: int, rms: float) -> np.ndarray:
    count = rows * cols // 32
    blocks = random_bytes(rng, count, 18)  # f16 d, 16 bytes of nibbles; value = d * (q - 8)
    blocks[:, :2] = random_scales(rng, count, rms / 4.64)  # 4.64: rms of -8..7
    return blocks.reshape(rows, -1)


def q8_0(rng: np.random.Generator, rows: int, cols: int, rms: float) -> np.ndarray:
    count = rows * cols // 32
    codes = rng.integers(-127, 128, (count, 32), dtype=np.int8)  # -128 is never written by a quantiser
    scales = random_scales(rng, count, rms / 73.3)  # 73.3: rms of -127..127
    return np.concatenate([scales, codes.view(np.uint8)], axis=1).reshape(rows, -1)


def q6_k(rng: np.random.Generator, rows: int, cols: int, rms: float) -> np.ndarray:
    count = rows * cols // 256
    blocks = random_bytes(rng, count, 210)  # 128 low nibbles, 64 high pairs, 16 i8 scales, f16 d
    scales = rng.integers(48, 80, (count, 16), dtype=np.int8)
    scales[rng.random((count, 16)) < 0.5] *= -1
    blocks[:, 192:208] = scales.view(np.uint8)
    blocks[:, 208:] = random_scales(rng, count, rms / (18.5 * 64))  # 18.5: rms of -32..31;  64: mean scale
    return blocks.reshape(rows, -1)


def bf16(rng: np.random.Generator, rows: int, cols: int, rms: float) -> np.ndarray:
    bound = rms * math.sqrt(3)  # uniform in +-bound has this rms
    values = np.linspace(-bound, bound, 1 << 16, dtype=np.float32)
    table = (values.view(np.uint32) >> 16).astype(np.uint16)  # truncation keeps signs symmetric
    return table[rng.integers(0, 1 << 16, (rows, cols), dtype=np.uint16)].view(np.uint8)


def mxfp4(rng: np.random.Generator, rows: int, cols: int, rms: float) -> np.ndarray:
    count = rows * cols // 32
    blocks = random_bytes(rng, count, 17)  # power of two, biased by 127, then 16 bytes of E2M1 codes
    blocks[:, 0] = round(math.log2(rms / 2.93)) + 127 - rng.integers(0, 2, count)  # 2.93: rms of E2M1's values
    return blocks.reshape(rows, -1)


BUILDERS: dict[Kind, Callable[[np.random.Generator, int, int, float], np.ndarray]] = {
    Kind.Q4_0: q4_0,
    Kind.Q8_0: q8_0,
    Kind.Q6_K: q6_k,
    Kind.MXFP4: mxfp4,
    Kind.BF16: bf16,
}


@dataclass(frozen=True)
class Matrix:
    """One matrix of a layer, or `experts` of them; rms of its values: gain over 1/sqrt(cols)."""

    name: str
    rows: int
    cols: int
    gain: float = 1.0
    experts: int = 0


def matrices(shape: Shape) -> Iterator[Matrix]:
    """Every matrix but the embedding and routers."""
    q, kv, n = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.experts
    residual = 1 / math.sqrt(shape.layers)
    mixing = residual / 4  # attention over random keys averages: louder, it would make all positions alike
    kind = "_exps" if n else ""
    for layer in range(shape.layers):
        at = f"blk.{layer}"
        yield Matrix(f"{at}.attn_q.weight", q, shape.hidden)
        yield Matrix(f"{at}.attn_k.weight", kv, shape.hidden)
        yield Matrix(f"{at}.attn_v.weight", kv, shape.hidden)
        yield Matrix(f"{at}.attn_output.weight", shape.hidden, q, mixing)
        yield Matrix(f"{at}.ffn_gate{kind}.weight", shape.ffn, shape.hidden, experts=n)
        yield Matrix(f"{at}.ffn_up{kind}.weight", shape.ffn, shape.hidden, experts=n)
        yield Matrix(f"{at}.ffn_down{kind}.weight", shape.hidden, shape.ffn, residual, n)


def norms(shape: Shape) -> Iterator[tuple[str, int]]:
    for layer in range(shape.layers):
        for name, dim in (
            ("attn_norm", shape.hidden),
            ("attn_q_norm", shape.head_dim),
            ("attn_k_norm", shape.head_dim),
            ("ffn_norm", shape.hidden),
        ):
            yield f"blk.{layer}.{name}.weight", dim
    yield "output_norm.weight", shape.hidden


def byte_symbols() -> list[str]:
    """GPT-2's printable character of each byte, as byte-level BPE vocabularies spell them."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def synthetic_vocab(size: int) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE: token 256 + i joins token i // 256 and byte i % 256."""
    tokens = byte_symbols()
    merges = []
    for i in range(size - 256 - len(CONTROL_TOKENS)):
        left, right = tokens[i // 256], tokens[i % 256]
        merges.append(f"{left} {right}")
        tokens.append(left + right)
    return tokens + CONTROL_TOKENS, merges


def add_header(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocab)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.chosen)
        writer.add_expert_feed_forward_length(shape.ffn)


def add_tokenizer(writer: GGUFWriter, vocab: int) -> None:
    tokens, merges = synthetic_vocab(vocab)
    plain = vocab - len(CONTROL_TOKENS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * plain + [TokenType.CONTROL] * len(CONTROL_TOKENS))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(plain)
    writer.add_pad_token_id(plain)
    writer.add_eos_token_id(vocab - 1)
    writer.add_add_bos_token(False)


def write_gguf(path: Path, name: str, format_name: str, seed: int = 0, layers: int = 0) -> None:
    """Write shape `name` in storage `format_name`, cut to `layers` if not 0.

    About 3 s and twice the file's size in memory at 0.6B.
    """
    shape, storage = SHAPES[name], FORMATS[format_name]
    shape = replace(shape, layers=layers or shape.layers)
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, "qwen3moe" if shape.experts else "qwen3")
    writer.add_name(f"{name} random weights, {format_name}, seed {seed}")
    add_header(writer, shape)
    add_tokenizer(writer, shape.vocab)

    def add(matrix: Matrix, kind: Kind) -> None:
        count = max(matrix.experts, 1)
        data = BUILDERS[kind](rng, count * matrix.rows, matrix.cols, matrix.gain / math.sqrt(matrix.cols))
        whole = data.reshape(count, matrix.rows, -1) if matrix.experts else data
        writer.add_tensor(matrix.name, whole, raw_dtype=kind)

    for tensor in ["token_embd.weight"] if shape.tied else ["token_embd.weight", "output.weight"]:
        add(Matrix(tensor, shape.vocab, shape.hidden), storage.head)
    for matrix in matrices(shape):
        add(matrix, storage.experts if matrix.experts else storage.linear)
    for layer in range(shape.layers if shape.experts else 0):
        router = rng.standard_normal((shape.experts, shape.hidden), np.float32) / math.sqrt(shape.hidden)
        writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", router)
    for tensor, dim in norms(shape):
        writer.add_tensor(tensor, rng.normal(1.0, 0.05, dim).astype(np.float32))

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random-weight GGUF of a known shape")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--format", choices=FORMATS, default="q4_0", help="storage [default: q4_0]")
    parser.add_argument("-o", "--output", type=Path, help="file to write [default: SHAPE-FORMAT.gguf]")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has [default: all]")
    parser.add_argument("--seed", type=int, default=0, help="of the weights [default: 0]")
    args = parser.parse_args()
    path = args.output or Path(f"{args.shape}-{args.format}.gguf")
    write_gguf(path, args.shape, args.format, args.seed, args.layers)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
