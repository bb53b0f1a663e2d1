"""A model of your own: its text, random weights, one artifact, and the reference it must agree with.

The block is not one of ours: attention and the feed-forward read the same norm side by side, and the
feed-forward squares a ReLU's smoother cousin. Only the text below says so; nothing else had to be written.
"""

import tempfile
from pathlib import Path

import numpy as np

from onelaunch.compiler.check.reference_weights import ReferenceWeights
from onelaunch.compiler.check.verify import closeness
from onelaunch.compiler.driver import Request, compile_imported
from onelaunch.ir.limits import Limits
from onelaunch.ir.model_text import parse_model
from onelaunch.ir.reference import ReferenceModel, RowBatch
from onelaunch.models.importer import import_checkpoint
from onelaunch.models.random import random_checkpoint
from onelaunch.runtime import load

TEXT = """
model sideways

weights {
  embed: [vocab, hidden] = hf "embed"
  norm: [hidden] = hf "norm"
  inv_freq: [head_dim / 2] = constant inv_freq
}

weights layer {
  mix_norm: [hidden] = hf "{i}.norm"
  q: [heads * head_dim, hidden] = hf "{i}.q"
  k: [kv_heads * head_dim, hidden] = hf "{i}.k"
  v: [kv_heads * head_dim, hidden] = hf "{i}.v"
  o: [hidden, heads * head_dim] = hf "{i}.o"
  up: [ffn, hidden] = hf "{i}.up"
  down: [hidden, ffn] = hf "{i}.down"
}

block layer(x, angles) {
  h = rms_norm(x, w.mix_norm, eps=eps)
  q = rope(linear(h, w.q), angles)
  k = rope(linear(h, w.k), angles)
  kv = append(cache(kv_heads, head_dim, 0), k, linear(h, w.v), rows)
  g = silu(linear(h, w.up))
  x = add(x, linear(attend(q, kv, rows, scale=query_scale), w.o))
  x = add(x, linear(mul(g, g), w.down))
}

step {
  x = embed(rows, w.embed)
  angles = rope_angles(rows, w.inv_freq, factor=rope_factor)
  layers layer_kinds { global: layer(x, angles) }
  h = rms_norm(select(x, rows), w.norm, eps=eps)
  logits = linear(h, w.embed)
  token = sample(logits, rows, slots)
  slots = commit(token, rows, slots)
}
"""
TOKENS = [3, 141, 59, 26, 53, 58]


def main() -> None:
    text = parse_model(TEXT, "sideways.ol")
    imported = import_checkpoint(random_checkpoint(text, {"layers": 3}, seed=1), text)
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder, "sideways")
        limits = Limits(rows=16, slots=2, context=128, kv_dtype="f32")
        compile_imported(imported, Request(Path("sideways"), artifact, limits=limits, workers=(1, 2)))
        with load(artifact) as model:
            logits = model.step(TOKENS)
            generated = model.generate(TOKENS, max_new_tokens=8).tokens
    reference = ReferenceModel(imported.program, ReferenceWeights(imported, imported.program), positions=128)
    expected = reference.step(RowBatch.of([(t, 0, i) for i, t in enumerate(TOKENS)], [len(TOKENS) - 1])).logits
    print("generated", generated)
    print("against the reference:", closeness(logits, expected.numpy()))
    assert np.allclose(logits, expected.numpy(), atol=1e-3), "the compiled step and the reference differ"


if __name__ == "__main__":
    main()
