"""A small Hugging Face checkpoint with a byte tokenizer, and one artifact of it that the command line tests share."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from onelaunch.compiler.build import find_compiler
from onelaunch.models.importer import family_text
from onelaunch.models.random import random_checkpoint

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 260,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
    "rope_theta": 10000.0, "torch_dtype": "float32", "eos_token_id": 259,
}  # fmt: skip
GPU_LIMITS = {"rows": 16, "slots": 2, "context": 256, "outputs": 4}
SPECIAL = ["<|start|>", "<|end|>", "<|spare|>", "<|eos|>"]
TEMPLATE = "{% for m in messages %}<|start|>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}<|start|>assistant:"


def write_model(folder: Path, seed: int = 0) -> Path:
    """A llama of two layers with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    made = random_checkpoint(family_text("llama"), {"vocab": 260}, seed)
    save_file({name: made.read(name) for name in made.tensors}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|eos|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@cache
def place() -> Path:
    """A folder for this test run; also where the commands keep their cache."""
    folder = Path(tempfile.mkdtemp(prefix="onelaunch-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def model() -> Path:
    return write_model(place() / "small")


@cache
def artifact() -> Path:
    """The model compiled by the command line, as anybody would."""
    path = place() / "small.ola"
    done = command("compile", model(), "-o", path, "--threads", "1,2", "--rows", "24", "--quant", "int8")
    assert done.returncode == 0, done.stderr
    return path


@cache
def quick_compiler() -> Path:
    """A C++ compiler command that optimises little: these tests compile often and run short."""
    path = place() / "quick-c++"
    path.write_text(f'#!/bin/sh\nexec {" ".join(find_compiler())} "$@" -O1\n')
    path.chmod(0o755)
    return path


def changes() -> dict[str, str]:
    """What the commands see of the environment besides what is there."""
    return {"ONELAUNCH_CACHE": str(place() / "cache"), "CXX": str(quick_compiler())}


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **changes()}


def command(*words: object, text: str = "") -> subprocess.CompletedProcess[str]:
    """`python -m onelaunch` in a process of its own."""
    full = [sys.executable, "-m", "onelaunch", *map(str, words)]
    return subprocess.run(full, input=text, capture_output=True, text=True, env=environment(), timeout=120)
