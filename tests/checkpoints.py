"""Tiny checkpoints of both kinds for the reader tests, written by transformers and by the gguf library."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

torch.set_num_threads(1)  # tiny tensors: more threads only cost
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def save_hf(directory: Path, model_type: str = "llama", dtype=torch.bfloat16, shard: str = "5GB", **config):
    """A random model of this type, saved by transformers."""
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(model_type, **{**SIZES, **config})
    model = transformers.AutoModelForCausalLM.from_config(made).to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    return model


def edit_config(directory: Path, remove: tuple[str, ...] = (), **changes):
    path = directory / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in remove}
    path.write_text(json.dumps(config | changes))


def save_gguf(path: Path, arch: str = "llama", change=None, tokens: bool = True, **keys) -> Path:
    """A tiny GGUF written by the gguf library; `keys` with None are left out."""
    writer = gguf.GGUFWriter(path, arch)
    values = {
        "block_count": 2,
        "context_length": 512,
        "embedding_length": 256,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
    } | keys
    for key, value in values.items():
        if value is not None:
            add_key(
                writer,
                key if key.startswith(("general.", "split.", "tokenizer.")) else f"{arch}.{key}",
                value,
            )
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["a", "b", "c", "ab", "<|im_end|>"])
        writer.add_token_types([1, 1, 1, 1, 3])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(4)
    rng = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", rng.standard_normal((5, 256), np.float32))
    writer.add_tensor(
        "blk.0.attn_q.weight",
        rng.integers(0, 255, (64, 144), np.uint8),
        raw_dtype=gguf.GGMLQuantizationType.Q4_K,
    )
    writer.add_tensor(
        "blk.0.attn_k.weight",
        rng.integers(0, 255, (32, 160), np.uint8),
        raw_dtype=gguf.GGMLQuantizationType.Q4_1,
    )
    writer.add_tensor("blk.0.attn_norm.weight", rng.standard_normal(256).astype(np.float16))
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_key(writer, key, value):
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def patch_entry(raw: bytes, name: bytes, **fields: int) -> bytes:
    """Overwrite parts of a two-dimensional tensor record."""
    at = raw.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    layout = {"rank": ("<I", 0), "k": ("<Q", 4), "n": ("<Q", 12), "type": ("<I", 20), "offset": ("<Q", 24)}
    data = bytearray(raw)
    for field, value in fields.items():
        code, shift = layout[field]
        struct.pack_into(code, data, at + shift, value)
    return bytes(data)


def save_random(directory: Path, model_type: str, dtype=torch.float32, seed: int = 0, gain: float = 2.0, **config):
    """A model whose parameters are all random, biases and norms too; greedy text of it does not settle."""
    made = transformers.AutoConfig.for_model(model_type, **{**SIZES, "eos_token_id": None, **config})
    made._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if name.endswith("norm.weight") and not model_type.startswith("gemma") else 0.0
            spread = 0.2 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
            spread *= gain if name.endswith(("proj.weight", "up_proj", "down_proj")) else 1.0
            parameter.copy_(around + spread * torch.randn(parameter.shape, generator=random))
    model.to(dtype).save_pretrained(directory)
    return model
