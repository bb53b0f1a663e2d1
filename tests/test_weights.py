"""From checkpoint tensors to packed weights: order, layout, and what is refused."""

import numpy as np
import pytest
from checkpoints import save_random
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from onelaunch.compiler.weights import pack_one, packed_weights, weight_plan, write_weights
from onelaunch.ir.errors import LoadError
from onelaunch.ir.limits import ALIGN
from onelaunch.models.importer import import_checkpoint
from onelaunch.models.open import open_checkpoint
from onelaunch.passes import GRAPH_PASSES, Options

BROKEN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights")
    save_random(path, "llama", num_hidden_layers=2)
    return path


def lowered(folder):
    imported = import_checkpoint(open_checkpoint(folder))
    program = imported.program
    for _, change in GRAPH_PASSES:
        program = program.map(lambda g, c=change: c(g, Options("")))
    return imported, packed_weights(program)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(folder, tmp_path, value):
    tensors = load_file(folder / "model.safetensors")
    tensors[BROKEN] = tensors[BROKEN].copy()
    tensors[BROKEN][3, 5] = value
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    imported, weights = lowered(tmp_path)
    weight = next(w for w in weights if w.key == "1.down")
    with pytest.raises(LoadError, match=f"tensor `{BROKEN}` holds values that are not finite"):
        pack_one(weight, imported)


def test_the_weight_file_is_plain_safetensors_in_the_order_of_use(folder, tmp_path):
    imported, weights = lowered(folder)
    write_weights(tmp_path / "packed.safetensors", weights, imported, lambda done, total: None)
    plan = weight_plan(weights)
    with safe_open(tmp_path / "packed.safetensors", "np") as file:
        assert sorted(file.keys()) == sorted(w.key for w in weights)
        for weight in weights:
            assert plan.offsets[weight.key] % ALIGN == 0
            assert np.array_equal(file.get_tensor(weight.key), pack_one(weight, imported))
    layers = [w.key for w in weights if w.key.startswith("0.")]
    assert layers == ["0.q", "0.k", "0.v", "0.attn_norm", "0.o", "0.gate_up", "0.ffn_norm", "0.down"]
