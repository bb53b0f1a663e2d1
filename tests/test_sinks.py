"""First tokens kept under a window: what a row sees is transformers' attention under that mask, whatever else happens.

One artifact has all that touches them: layers without a window beside windowed ones, two splits of 256 tokens, rings
that wrap many times, drafts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compiled_kernels import checkpoint, group, limits

from onelaunch.compiler.driver import Request, compile_model
from onelaunch.compiler.reports.artifact import overview, summary_lines
from onelaunch.ir.errors import UsageError
from onelaunch.ir.limits import Limits
from onelaunch.ir.schedule import BUCKETS
from onelaunch.ir.text import parse, show
from onelaunch.ir.types import CacheType
from onelaunch.ir.validate import validate
from onelaunch.models.drafter import as_drafter
from onelaunch.models.window import with_window
from onelaunch.runtime import Model, load
from onelaunch.runtime.artifact import Artifact
from onelaunch.tests.checkpoints import save_random
from onelaunch.tests.compiled import ArtifactCache, all_logits, relative_errors
from onelaunch.tests.test_vm import GREEDY, Pair
from onelaunch.tests.tiny import tiny

WINDOW, SINKS, LENGTH = 33, 5, 440
THREADS = (1, 2, 4)
LIMITS: dict[str, Any] = {"rows": 48, "slots": 3, "context": 512, "outputs": 48, "kv_dtype": "f32", "drafts": 2}
CONFIG = {
    "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 64,
    "head_dim": 32, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 2, "tie_word_embeddings": False,
}  # fmt: skip
PLAIN = ("llama", 5, 3)  # a family of compiled_kernels.py, the window it is given and sinks
pytestmark = group(PLAIN[0])  # whose CPU target test_triton_sinks.py needs too


def mask(n: int, window: int, sinks: int) -> torch.Tensor:
    """What is added to the scores of n rows, [1, 1, n, n]: written down from the definition of what they see."""
    row, key = torch.arange(n)[:, None], torch.arange(n)[None]
    seen = (key <= row) & ((key > row - (window or n)) | (key < sinks))
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


@dataclasses.dataclass(frozen=True)
class Case:
    """A compiled model, its checkpoint in transformers, and the sizes of its windowed layers."""

    artifact: Path
    model: Model
    hf: torch.nn.Module
    prompt: list[int]
    window: int
    sinks: int

    @torch.no_grad()
    def expected(self, tokens: list[int]) -> np.ndarray:
        own, n = mask(len(tokens), self.window, self.sinks), len(tokens)
        some = self.hf.config.model_type == "gemma3_text"
        seen: Any = {"sliding_attention": own, "full_attention": mask(n, 0, 0)} if some else own
        return self.hf(torch.tensor([tokens]), attention_mask=seen).logits[0].numpy()


@pytest.fixture(scope="module")
def case(compiled: ArtifactCache, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("checkpoint")
    hf = save_random(folder, "gemma3_text", **CONFIG)
    artifact = compiled(folder, workers=THREADS, limits=LIMITS, sinks=SINKS)
    prompt = np.random.default_rng(1).integers(0, hf.config.vocab_size, LENGTH).tolist()
    with load(artifact, threads=2) as model:
        yield Case(artifact, model, hf, prompt, WINDOW, SINKS)


def test_logits_are_those_of_transformers_under_the_mask(case: Case) -> None:
    got, expected = all_logits(case.model, case.prompt, LIMITS["rows"]), case.expected(case.prompt)
    assert relative_errors(got, expected).max() <= 2e-3
    without = dataclasses.replace(case, sinks=0).expected(case.prompt)  # a mask that is not looked at shows nothing
    assert relative_errors(without, expected)[-1] > 0.02


def worst(model: Model, prompt: list[int], most: int, expected: Callable[[list[int]], np.ndarray]) -> float:
    """By how much a token of the greedy text is not the best of the expected logits, over the largest of them."""
    tokens = model.generate(prompt, max_new_tokens=most, stop_tokens=[]).tokens
    assert len(set(tokens)) >= 8, "a text that repeats itself shows little"
    logits = expected(prompt + tokens)[len(prompt) - 1 : -1]
    return float((logits.max(-1) - logits[np.arange(len(tokens)), tokens]).max() / np.abs(logits).max())


@pytest.mark.parametrize("speculate", ["off", "auto"])
def test_a_long_text_is_that_of_transformers_under_the_mask(case: Case, speculate: str) -> None:
    """With and without guesses: from a short prompt to where the ring has wrapped again and again."""
    with load(case.artifact, threads=1, speculate=speculate) as model:
        assert worst(model, case.prompt[:20], LENGTH - 20, case.expected) <= 1e-3


def test_a_model_without_a_window_is_given_one(compiled: ArtifactCache) -> None:
    """--window 5 --sinks 3 of a llama, whose matrices and so activations are bf16."""
    family, window, sinks = PLAIN
    folder = checkpoint(family)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with load(compiled(folder, limits=limits(family).as_dict(), window=window, sinks=sinks)) as model:
        made = Case(folder, model, hf.eval(), [], window, sinks)
        assert worst(model, list(range(7, 27)), 340, made.expected) <= 0.01
        assert worst(model, list(range(7, 27)), 340, dataclasses.replace(made, sinks=0).expected) > 0.2


def test_rows_have_the_same_bits_in_any_company(case: Case) -> None:
    expected = all_logits(case.model, case.prompt, LIMITS["rows"])
    for chunk in (1, 7, 33):
        assert (all_logits(case.model, case.prompt, chunk).view(np.int32) == expected.view(np.int32)).all(), chunk
    for threads in THREADS:
        with load(case.artifact, threads=threads) as model:
            got = all_logits(model, case.prompt[:300], 9, slot=1)
        assert (got.view(np.int32) == expected[:300].view(np.int32)).all(), threads
    case.model.reset()
    for at in range(0, LENGTH - 40, 16):  # three slots at once, 20 tokens apart
        rows = [(slot, p) for slot in range(3) for p in range(at, at + 16)]
        tokens = [case.prompt[p] for _, p in rows]
        got = case.model.step(tokens, *zip(*rows, strict=True), range(len(rows)))
        assert (got.view(np.int32) == np.tile(expected[at : at + 16], (3, 1)).view(np.int32)).all(), at


def test_prefixes_are_reused_and_evicted_without_a_word_changed(case: Case) -> None:
    prompts = [[*case.prompt[:cut], 7, other] for cut in (420, 300, 200, 130, 64) for other in (1, 2)]
    with load(case.artifact, threads=2, prefix_cache=False) as model:
        expected = [model.generate(p, max_new_tokens=40, stop_tokens=[]).tokens for p in prompts]
    with load(case.artifact, threads=2, kv_tokens=512) as model:
        for order in (range(10), range(9, -1, -1), (0, 5, 1, 6)):
            for at, wanted in zip(range(0, len(order), 2), [expected[i] for i in order[::2]], strict=True):
                result = model.generate(prompts[order[at]], max_new_tokens=40, stop_tokens=[])
                assert result.tokens == wanted
        again = model.generate(prompts[order[at]], max_new_tokens=40, stop_tokens=[])
        assert (again.tokens, again.reused_tokens) == (wanted, len(prompts[order[at]]) // 64 * 64)


def test_memory_and_bytes_stop_growing_at_window_and_sinks(case: Case) -> None:
    kept = next(g for g in case.model.manifest.caches if g.window)
    assert (kept.window, kept.sinks) == (case.window, case.sinks)
    lines = summary_lines(overview(Artifact.open(case.artifact), 1.0))
    assert "windows    33 tokens and the first 5 in 1 of 2 layers" in lines
    assert kept.ring_pages == -(-(case.window + LIMITS["rows"]) // 64) + 2
    whole = sum(g.token_bytes() for g in case.model.manifest.caches if not g.window)
    counted = [case.model.bytes_per_token(depth) - whole * (depth + 1) for depth in range(512)]
    read = kept.token_bytes() * np.minimum(np.arange(512) + 1, case.window + case.sinks)
    assert np.allclose(counted, case.model.bytes_per_token(0) - whole - kept.token_bytes() + read)


def test_positions_may_be_stepped_back_while_their_window_is_cached(case: Case) -> None:
    expected = all_logits(case.model, case.prompt, LIMITS["rows"])
    with pytest.raises(UsageError, match="its window cached"):
        case.model.step(case.prompt[150:151], [0], [150], [0])
    for at in (LENGTH - 3, 0):
        got = case.model.step(case.prompt[at : at + 1], [0], [at], [0])
        assert (got.view(np.int32) == expected[at].view(np.int32)).all()


# ---- the reference, the VM, the validator -------------------------------------------------------


def test_the_virtual_machine_says_what_the_reference_says() -> None:
    """Past several splits and a ring, prompt and decoding; the schedules are valid."""
    model = tiny("gemma3", window=270, layer_kinds=("local", "global"))
    model = dataclasses.replace(model, program=with_window(model.program, 0, 64))
    room = Limits(rows=32, slots=1, context=640, outputs=2, few_rows=4, kv_dtype="f32")
    for bucket in BUCKETS:
        validate(model.schedule(bucket, 3, room))
    pair = Pair(model, 3, limits=room)
    rows = pair.start(0, np.random.default_rng(0).integers(0, 96, 580).tolist(), GREEDY, limit=640)
    for at in range(0, len(rows), 32):
        pair.step(rows[at : at + 32], [len(rows[at : at + 32]) - 1])
    pair.decode(4)


def test_a_cache_with_sinks_prints_and_reads_back() -> None:
    program = with_window(tiny("gemma3").program, 0, 7)
    assert "kv[2, 16, 24, 7]" in show(program)
    assert parse(show(program)) == program
    kinds = {graph.cache.cache for graph in program.graphs if graph.cache is not None}
    assert kinds == {CacheType(2, 16, 24, 7), CacheType(2, 16, 0)}  # what sees everything has no use for them


def test_a_model_that_drafts_gets_the_same_bounds() -> None:
    program = dataclasses.replace(tiny("llama").program, drafter=as_drafter(tiny("gemma3").program), passes=2)
    bounded = with_window(program, 40, 7)
    kinds = [graph.cache.cache for graph in bounded.graphs if graph.cache is not None]
    assert set(kinds) == {CacheType(2, 16, 24, 7), CacheType(2, 16, 40, 7)}
    assert len(kinds) == 4


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "sinks", "reason"),
    [(0, 4, "expected a layer with a window, got `llama`"), (8, 65, "--sinks: expected 0 to 64 tokens")],
)
def test_sizes_that_no_layer_can_have_are_refused(window: int, sinks: int, reason: str, tmp_path: Path) -> None:
    save_random(tmp_path, "llama")
    with pytest.raises(UsageError, match=reason):
        compile_model(Request(tmp_path, tmp_path / "out", fit_context=True, window=window, sinks=sinks, pack=False))
