"""The generated GPU kernel, compiled to PTX and emulated: the CPU target's tokens, no race, every byte once.

Nothing here ran on a GPU. The emulator executes the compiled PTX of a grid of persistent CTAs under several
interleavings, with a happens-before race detector.
"""

import ast
import re

import numpy as np
import pytest
import torch
from checkpoints import save_random
from emulated import EmulatedStep, emulator, save_mixed

from onelaunch.codegen.triton.formats import READERS, reader, tile_words
from onelaunch.ir.errors import CompileError
from onelaunch.ir.formats import FORMATS, packed_bytes
from onelaunch.ir.limits import Limits
from onelaunch.ir.table import FIELDS
from onelaunch.runtime import load

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 300, "max_position_embeddings": 512,
}  # fmt: skip
PROMPT = [5, 17, 200, 33, 8, 91, 4, 250, 77, 12, 100, 60]  # twelve rows: the first step takes the `many` bucket
CASES = {  # family or `mixed`, --quant, type of the checkpoint, of the cache, architecture
    "llama bf16": ("llama", "", torch.bfloat16, "f32", 90),
    "qwen2 q8_0": ("qwen2", "int8", torch.float32, "f32", 80),
    "qwen3 q4_0": ("qwen3", "int4", torch.float32, "bf16", 90),
    "gemma3 f32": ("gemma3_text", "", torch.float32, "f32", 80),
    "llama every block format and f16": ("mixed", "", torch.float32, "f32", 90),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, compiled, tmp_path_factory):
    """A tiny model compiled for both targets: the emulated GPU step and the CPU artifact."""
    emulator()
    family, quant, dtype, kv_dtype, arch = CASES[request.param]
    model = tmp_path_factory.mktemp("triton") / "model"
    if family == "mixed":
        model = save_mixed(model.with_suffix(".gguf"))
    else:
        save_random(model, family, dtype, **SIZES)
    limits = {"rows": 16, "slots": 2, "context": 384, "outputs": 4, "kv_dtype": kv_dtype}
    return EmulatedStep(model, Limits(**limits), quant, arch), compiled(model, quant=quant, limits=limits)


def test_tokens_are_the_cpu_targets_and_no_interleaving_races(pair):
    gpu, artifact = pair
    with load(artifact) as cpu:
        expected = cpu.generate(PROMPT, max_new_tokens=5, stop_tokens=[]).tokens
    tokens, reports = gpu.generate(PROMPT, 5)  # seeds 0..4: fair and starving interleavings
    assert tokens == expected
    for report in reports:
        assert report.races == []
    assert not any(control[8] for control in gpu.control.values())


def test_each_word_of_codes_is_read_exactly_once_per_decode_step(pair):
    gpu, _ = pair
    gpu.prompt(PROMPT[:1])
    report = gpu.run(7)
    reads = next(s.reads for s in report.memory.slots.values() if s.name == "weights")  # per word of 4 bytes
    embedded = {v.name[2:] for v in gpu.schedules["few"].program.entry.weights}
    for weight in gpu.packed:
        if weight.is_vector or weight.key in embedded:
            continue  # vectors are read by every worker; one row of the embedding twice where the head is tied
        fmt, blocks = reader(weight.type.dtype), -(-weight.type.width // 32)
        units = -(-weight.type.shape[0] // weight.unit) * weight.unit_rows
        words = units // 32 * tile_words(fmt, blocks)
        first = gpu.plan.offsets[weight.key] // 4
        read = reads[first : first + words]
        if not getattr(fmt, "tail_words", 0):
            assert (read == 1).all(), weight.key
            continue
        read = read.reshape(-1, fmt.super_words)
        assert (read[:, : -fmt.tail_words] == 1).all(), weight.key
        assert (read >= 1).all(), weight.key  # eight blocks share a tail


@pytest.mark.parametrize("fault", range(3))
def test_a_dropped_wait_of_a_matrix_is_noticed_within_a_few_interleavings(pair, fault):
    gpu, _ = pair
    wait, step = FIELDS.index("wait0"), FIELDS.index("step")
    table = gpu.tables["few"].copy()
    # Not worker 0: with one row it did itself what drains share out, so it may know without waiting.
    waiting = np.argwhere((table[1:, :, wait] >= 0) & (table[1:, :, step] == 1))
    worker, record = waiting[len(waiting) * (2 * fault + 1) // 6]
    table[1 + worker, record, wait] = -1
    assert any(_notices(gpu, table, seed) for seed in range(6))


def test_a_target_one_too_low_is_noticed(pair):
    gpu, _ = pair
    wait, target, step = (FIELDS.index(name) for name in ("wait0", "target0", "step"))
    table = gpu.tables["few"]
    waiting = np.argwhere((table[1:, :, wait] >= 0) & (table[1:, :, target] > 1) & (table[1:, :, step] == 1))
    low = table.copy()
    for worker, record in waiting:
        low[1 + worker, record, target] -= 1
    assert any(_notices(gpu, low, seed) for seed in range(8))


PTX_FAULTS = {
    "relaxed signal": lambda ptx: _edited(ptx, r"red\.global\.gpu\.release\.add", "red.global.gpu.relaxed.add"),
    "relaxed wait": lambda ptx: _edited(ptx, r"ld\.acquire\.gpu", "ld.relaxed.gpu"),
}


@pytest.mark.parametrize("fault", PTX_FAULTS)
def test_weaker_synchronisation_in_the_compiled_kernel_is_noticed(pair, fault):
    gpu, _ = pair
    runs = [(bucket, seed) for bucket in ("few", "many") for seed in range(4)]
    assert any(_notices(gpu, gpu.tables[b], seed, PTX_FAULTS[fault], b) for b, seed in runs)


def _edited(ptx, pattern, replacement):
    changed, count = re.subn(pattern, replacement, ptx)
    assert count
    return changed


def _notices(gpu, table, seed, change=str, bucket="few"):
    gpu.prompt(PROMPT[:1] if bucket == "few" else PROMPT)
    gpu.workspace[:] = np.nan
    gpu.control[bucket][:] = 0  # whatever the run before left there
    try:
        return bool(gpu.run(seed, table, change).races) or gpu.state["output_token"][0] < 0
    except emulator().PTXError:
        return True
    finally:
        gpu.control[bucket][:] = 0


def test_the_generated_module_reads_as_python_and_names_no_machine(pair):
    gpu, _ = pair
    tree = ast.parse(gpu.source.text)
    functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    assert {"step_few", "step_many"} <= set(functions)
    assert len(functions) == len(set(functions))


@pytest.mark.parametrize("name", READERS)
def test_a_reader_covers_the_packed_blocks_of_its_format(name):
    fmt, ours = FORMATS[name], reader(name)
    assert 4 * tile_words(ours, 8) == packed_bytes(fmt, 32, 256)


def test_a_format_without_a_reader_is_refused_by_name():
    with pytest.raises(CompileError, match="`q2_k` is not supported on GPU targets"):
        reader("q2_k")
