"""Writers of quantised Hugging Face checkpoints, each from its layout's description alone, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import edit_config, save_hf
from safetensors.torch import load_file, save_file

from onelaunch.ir.records import NF4

E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "tie_word_embeddings": True,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Scales that all of a matrix is proportional to, or inversely so: a power of two changes them exactly.
WHOLE = ("weight_global_scale", "weight_scale_2", "weight_scale", "weight_scale_inv", "scales", "SCB", "weight.absmax")
Tensors = dict[str, torch.Tensor]
Meaning = dict[str, np.ndarray]
Write = Callable[[np.random.Generator, int, int], tuple[Tensors, np.ndarray]]


@dataclass(frozen=True)
class Layout:
    """`write` gives the tensors of a random matrix [N, K] by leaf, and the matrix. `exact`: to the bit."""

    write: Write
    config: dict[str, Any]
    exact: bool = True


def save_quantised(folder: Path, layout: Layout, seed: int = 0, **config: Any) -> Meaning:
    """A tiny Llama whose projections have this layout; what they mean, by name."""
    save_hf(folder, **{**SIZES, **config})
    return put_quantised(folder, layout, seed)


def put_quantised(folder: Path, layout: Layout, seed: int = 0, others: dict[str, Layout] | None = None) -> Meaning:
    """The same of a checkpoint that is there; weights about 1 / sqrt(K). `others`: projections of other layouts."""
    path = folder / "model.safetensors"
    tensors, meaning = load_file(path), {}
    rng = np.random.default_rng(seed)
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        n, k = tensors.pop(name).shape
        own = (others or {}).get(name.split(".")[-2].removesuffix("_proj"), layout)
        leaves, weight = own.write(rng, n, k)
        factor = np.float32(2.0 ** np.round(np.log2(k**-0.5 / weight.std())))
        meaning[name] = weight * factor
        for leaf in [leaf for leaf in WHOLE if leaf in leaves and leaves[leaf].dtype in FLOATS][:1]:
            leaves[leaf] = leaves[leaf] / factor if leaf == "weight_global_scale" else leaves[leaf] * factor
        tensors |= {name.removesuffix("weight") + leaf: t.contiguous() for leaf, t in leaves.items()}
    save_file(tensors, path)
    edit_config(folder, quantization_config=layout.config)
    return meaning


def change_tensors(folder: Path, change: Callable[[Tensors], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def words(codes: np.ndarray) -> torch.Tensor:
    """Codes of four bits [.., n] in int32 [.., n / 8], the first in the lowest bits."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    packed = (codes.reshape(*codes.shape[:-1], -1, 8).astype(np.uint32) << shifts).sum(axis=-1, dtype=np.uint32)
    return torch.from_numpy(packed.view(np.int32))


def floats(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, np.ndarray]:
    kept = torch.from_numpy(rng.uniform(0.001, 0.02, shape).astype(np.float32)).to(dtype)
    return kept, kept.float().numpy()


def e4m3(rng: np.random.Generator, shape: tuple[int, ...], least: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Any numbers of the type; `least` 0 from the smallest, negative ones too, 1 positive ones."""
    codes = rng.integers(0, 0x7F, shape, np.uint8)
    codes |= np.uint8(0x80) * rng.integers(0, 2, shape, np.uint8) if least == 0 else np.uint8(0)
    kept = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    return kept, kept.float().numpy()


def fp4_bytes(codes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4)


def nvfp4_ct(rng, n, k):
    codes = rng.integers(0, 16, (n, k), np.uint8)
    scale, values = e4m3(rng, (n, k // 16), 1)
    divisor = np.float32(rng.uniform(100, 3000))
    weight = E2M1[codes] * np.repeat(values / divisor, 16, axis=1)
    leaves = {"weight_packed": fp4_bytes(codes), "weight_scale": scale, "weight_global_scale": torch.tensor([divisor])}
    return leaves | {"input_global_scale": torch.tensor([1.0])}, weight


def nvfp4_modelopt(rng, n, k):
    codes = rng.integers(0, 16, (n, k), np.uint8)
    scale, values = e4m3(rng, (n, k // 16), 1)
    factor = np.float32(rng.uniform(1e-4, 1e-2))
    weight = E2M1[codes] * np.repeat(values, 16, axis=1) * factor
    leaves = {"weight": fp4_bytes(codes), "weight_scale": scale, "weight_scale_2": torch.tensor(factor)}
    return leaves | {"input_scale": torch.tensor(0.5)}, weight


def mxfp4_ct(rng, n, k):
    codes = rng.integers(0, 16, (n, k), np.uint8)
    exponents = rng.integers(0, 130, (n, k // 32), np.uint8)
    powers = np.ldexp(np.float32(1), exponents.astype(int) - 127).astype(np.float32)
    weight = E2M1[codes] * np.repeat(powers, 32, axis=1)
    return {"weight_packed": fp4_bytes(codes), "weight_scale": torch.from_numpy(exponents)}, weight


def fp8(scale_leaf: str, shape: Callable[[int, int], tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Write:
    def write(rng, n, k):
        elements, values = e4m3(rng, (n, k))
        scale, factors = floats(rng, shape(n, k), dtype)
        return {"weight": elements, scale_leaf: scale}, values * factors

    return write


def fp8_blocks(leaf: str, rows: int, columns: int) -> Write:
    def write(rng, n, k):
        elements, values = e4m3(rng, (n, k))
        scale, factors = floats(rng, (-(-n // rows), -(-k // columns)), torch.float32)
        spread = np.repeat(np.repeat(factors, rows, axis=0)[:n], columns, axis=1)[:, :k]
        return {"weight": elements, leaf: scale}, values * spread

    return write


def mxfp8(rng, n, k):
    elements, values = e4m3(rng, (n, k))
    exponents = rng.integers(100, 130, (n, k // 32), np.uint8)
    weight = values * np.repeat(2.0 ** (exponents.astype(np.float32) - 127), 32, axis=1).astype(np.float32)
    return {"weight": elements, "weight_scale": torch.from_numpy(exponents)}, weight


def shuffled(groups: np.ndarray, order: bool) -> np.ndarray:
    """The group of each column; matrices that read the same have the same, as it comes from what they read."""
    return np.random.default_rng(len(groups)).permutation(groups) if order else groups


def packed_int4(group: int, zeros: bool = False, order: bool = False, dtype: torch.dtype = torch.bfloat16) -> Write:
    """compressed-tensors: stored codes are the signed ones plus 8, zero points are packed along the rows."""

    def write(rng, n, k):
        groups = k // (group or k)
        codes = rng.integers(0, 16, (n, k))
        zero = rng.integers(0, 16, (n, groups)) if zeros else np.full((n, groups), 8)
        scale, values = floats(rng, (n, groups), dtype)
        index = shuffled(np.arange(k) // (k // groups), order)
        weight = (codes - zero[:, index]).astype(np.float32) * values[:, index]
        leaves = {"weight_packed": words(codes), "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
        leaves |= {"weight_zero_point": words(zero.T).T} if zeros else {}
        return leaves | ({"weight_g_idx": torch.from_numpy(index.astype(np.int32))} if order else {}), weight

    return write


def gptq(group: int, stored: str, sym: bool = True, order: bool = False) -> Write:
    """`stored`: v1 has zero points less one, v2 as they are."""

    def write(rng, n, k):
        groups = k // group
        codes = rng.integers(0, 16, (k, n))
        zero = np.full((groups, n), 8) if sym else rng.integers(1, 17 if stored == "v1" else 16, (groups, n))
        scale, values = floats(rng, (groups, n), torch.float16)
        index = shuffled(np.arange(k) // group, order)
        weight = (codes - zero[index]).astype(np.float32) * values[index]
        return {
            "qweight": words(codes.T).T, "qzeros": words(zero - (stored == "v1")), "scales": scale,
            "g_idx": torch.from_numpy(index.astype(np.int32)),
        }, weight.T  # fmt: skip

    return write


def awq(rng, n, k):
    """Column 8c + j of a row of words is at nibble (0, 4, 1, 5, 2, 6, 3, 7)[j]."""
    nibble = [0, 4, 1, 5, 2, 6, 3, 7]

    def columns(codes):
        placed = np.empty_like(codes.reshape(len(codes), -1, 8))
        placed[:, :, nibble] = codes.reshape(len(codes), -1, 8)
        return words(placed.reshape(len(codes), -1))

    codes, zero = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (k // 64, n))
    scale, values = floats(rng, (k // 64, n), torch.float16)
    weight = (codes - np.repeat(zero, 64, axis=0)).astype(np.float32) * np.repeat(values, 64, axis=0)
    return {"qweight": columns(codes), "qzeros": columns(zero), "scales": scale}, weight.T


def w8a8(rng, n, k):
    codes = rng.integers(-128, 128, (n, k)).astype(np.int8)
    scale, values = floats(rng, (n, 1), torch.bfloat16)
    return {"weight": torch.from_numpy(codes), "weight_scale": scale}, codes.astype(np.float32) * values


def bnb_int8(rng, n, k):
    codes = rng.integers(-127, 128, (n, k)).astype(np.int8)
    scale, values = floats(rng, (n,), torch.float32)
    weight = codes.astype(np.float32) * values[:, None] / np.float32(127)
    form = torch.tensor(0, dtype=torch.uint8)
    return {"weight": torch.from_numpy(codes), "SCB": scale, "weight_format": form}, weight


def nf4(nested: bool, kind: str = "nf4") -> Write:
    def write(rng, n, k):
        codes = rng.integers(0, 16, (n, k), np.uint8)
        table, blocks = np.array(NF4, np.float32), n * k // 64
        state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [n, k]}
        scale, values = floats(rng, (blocks,), torch.float32)
        leaves = {"weight": torch.from_numpy((codes[:, 0::2] << 4 | codes[:, 1::2]).reshape(-1, 1))}
        if nested:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.03}
            inner = rng.integers(0, 256, blocks, np.uint8)
            outer, factors = floats(rng, (-(-blocks // 256),), torch.float32)
            map256 = np.linspace(-1, 1, 256).astype(np.float32)
            values = map256[inner] * np.repeat(factors, 256)[:blocks] + np.float32(0.03)
            scale = torch.from_numpy(inner)
            leaves |= {"weight.nested_absmax": outer, "weight.nested_quant_map": torch.from_numpy(map256)}
        text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        leaves |= {"weight.absmax": scale, "weight.quant_map": torch.from_numpy(table)}
        leaves[f"weight.quant_state.bitsandbytes__{kind}"] = text
        return leaves, (table[codes].reshape(-1, 64) * values[:, None]).reshape(n, k)

    return write


def ct(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "version": "0.15.0", "config_groups": groups,
            "ignore": ["lm_head"], "kv_cache_scheme": None}  # fmt: skip


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
LAYOUTS = {
    "nvfp4": Layout(nvfp4_ct, ct("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16), exact=False),
    "nvfp4 modelopt": Layout(nvfp4_modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "mxfp4": Layout(mxfp4_ct, ct("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32)),
    "fp8 tensor": Layout(fp8("weight_scale", lambda n, k: ()), {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "fp8 channel": Layout(fp8("weight_scale", lambda n, k: (n, 1), torch.bfloat16), ct("float-quantized", num_bits=8)),
    "fp8 blocks": Layout(fp8_blocks("weight_scale_inv", 128, 128), BLOCKS),
    "fp8 blocks, compressed-tensors": Layout(
        fp8_blocks("weight_scale", 128, 128), ct("float-quantized", strategy="block", block_structure=[128, 128])
    ),
    "fp8 small blocks": Layout(fp8_blocks("weight_scale_inv", 32, 32), BLOCKS | {"weight_block_size": [32, 32]}),
    "mxfp8": Layout(mxfp8, BLOCKS | {"weight_block_size": [1, 32]}),
    "int4 groups": Layout(packed_int4(64), ct("pack-quantized", num_bits=4, group_size=64)),
    "int4 rows, f16": Layout(packed_int4(0, dtype=torch.float16), ct("pack-quantized", num_bits=4, strategy="channel")),
    "int4 zero points": Layout(packed_int4(32, zeros=True), ct("pack-quantized", num_bits=4, group_size=32)),
    "int4 zero points, f16": Layout(
        packed_int4(32, zeros=True, dtype=torch.float16), ct("pack-quantized", num_bits=4, group_size=32)
    ),
    "gptq v1": Layout(gptq(32, "v1"), GPTQ),
    "gptq v2": Layout(gptq(32, "v2"), GPTQ | {"checkpoint_format": "gptq_v2"}),
    "gptq that says v1 and is v2": Layout(gptq(32, "v2"), GPTQ | {"checkpoint_format": "gptq"}),
    "gptq v1, zero points": Layout(gptq(64, "v1", sym=False), GPTQ | {"sym": False, "group_size": 64}),
    "gptq v2, zero points": Layout(gptq(64, "v2", sym=False), GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}),
    "awq": Layout(awq, AWQ),
    "w8a8": Layout(w8a8, ct("int-quantized", num_bits=8, type="int", strategy="channel")),
    "bnb int8": Layout(bnb_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, exact=False),
    "nf4": Layout(nf4(nested=False), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "nf4 nested": Layout(nf4(nested=True), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
}
ORDERED = {
    "int4 act-order": Layout(packed_int4(64, order=True), ct("pack-quantized", num_bits=4, actorder="group")),
    "gptq act-order": Layout(gptq(32, "v1", order=True), GPTQ | {"desc_act": True}),
}
