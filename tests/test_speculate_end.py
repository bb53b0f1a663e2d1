"""Native sampling and commit of drafted rows: the reference's bits on random steps, and the right distribution."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from onelaunch.codegen.cpu import render
from onelaunch.ir.sampling import Sampling, kept, sample, weights
from onelaunch.ir.vm.commit import run_commit
from onelaunch.tests.checkpoints import save_hf
from onelaunch.tests.compiled import ArtifactCache
from onelaunch.tests.end_of_step import EndOfStep
from onelaunch.tests.test_speculate_model import CONFIG, LIMITS

pytestmark = pytest.mark.xdist_group("drafts")
VOCAB = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_hf(folder, "gemma3_text", torch.bfloat16, **CONFIG)
    return folder


@pytest.fixture(scope="module")
def end(checkpoint: Path, compiled: ArtifactCache) -> EndOfStep:
    return EndOfStep(compiled(checkpoint, workers=(1,), limits=LIMITS))


# ---- the reference's bits ---------------------------------------------------------------------------


def random_step(end: EndOfStep, rng: random.Random) -> np.ndarray:
    """Slots anywhere in their texts, with drafts of which some hold; the logits of the step."""
    state, rows, outputs, words = end.state, [], [], rng.choice([3, VOCAB])
    noise = np.random.default_rng(rng.randrange(2**32))
    state.slot_history[:] = noise.integers(0, rng.choice([3, VOCAB]), state.slot_history.shape)
    state.slot_seen[:] = noise.integers(0, 2**32, state.slot_seen.shape, np.uint32) * (noise.random() < 0.5)
    for slot in range(rng.randint(1, 4)):
        how = Sampling(rng.choice([0, 0.8]), repetition_penalty=rng.choice([1, 1.5]), seed=rng.randrange(99))
        stop = rng.sample(range(VOCAB), rng.choice([0, 8]))
        end.start(slot, how, rng.choice([512, 40, 10]), stop, rng.choice([0, 1, 4]))
        state.slot_drafts[slot] = rng.randint(0, int(state.slot_drafts_most[slot]))
        if rng.random() < 0.2:  # a prompt chunk, its last row wants a token
            rows += [(rng.randrange(words), slot, i, 0) for i in range(5)]
            outputs.append(len(rows) - 1)
            continue
        first = rng.randint(5, 8)
        for i in range(1 + rng.randint(0, min(4, 11 - len(outputs) - (3 - slot)))):
            outputs.append(len(rows))
            rows.append((rng.randrange(words), slot, first + i, i))
    logits = noise.normal(0, 2, (len(outputs), VOCAB)).astype(np.float32)
    for j, row in enumerate(outputs[:-1]):  # what the next row guesses is likely
        logits[j, rows[row + 1][0]] += rng.choice([0, 3, 9]) if row + 1 < len(rows) else 0
    if rng.random() < 0.5:
        logits[:, :3] += 6
    if rng.random() < 0.1:
        logits[rng.randrange(len(logits)), rng.randrange(VOCAB)] = np.nan
    end.put(rows, outputs)
    return logits


def test_random_steps_end_as_the_reference_says(end: EndOfStep) -> None:
    seen_ends, held = set(), 0
    for seed in range(1500):
        rng = random.Random(seed)
        logits = random_step(end, rng)
        expected = SimpleNamespace(**end.fields())
        held -= int(expected.slot_accepted.sum())
        tokens = end.run(logits)
        for j, row in enumerate(expected.output_row[: len(logits)]):
            expected.output_token[j] = reference_token(expected, int(row), logits[j])
        run_commit(expected, end.limits)
        assert tokens == expected.output_token[: len(tokens)].tolist(), seed
        for name, value in vars(expected).items():
            assert (getattr(end.state, name) == value).all(), (seed, name)
        seen_ends |= set(expected.slot_finished.tolist())
        held += int(expected.slot_accepted.sum())
    assert seen_ends == {0, 1, 2, 3}
    assert held > 800


def reference_token(state: SimpleNamespace, row: int, logits: np.ndarray) -> int:
    slot = int(state.row_slot[row])
    seen = np.unpackbits(state.slot_seen[slot].view(np.uint8), bitorder="little")[:VOCAB].astype(bool)
    seen[state.row_token[row - int(state.row_draft[row]) + 1 : row + 1]] = True
    how = Sampling(
        float(state.slot_temperature[slot]), seed=int(state.slot_seed[slot]),
        repetition_penalty=float(state.slot_penalty[slot]),
    )  # fmt: skip
    return sample(logits, how, seen, int(state.row_position[row]))


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3])
def test_a_stop_token_inside_a_draft_ends_the_text_there(end: EndOfStep, stop_at: int) -> None:
    said = [11, 12, 13, 14, 15]
    end.start(0, Sampling(), 512, [said[stop_at]], 4)
    end.put([(10, 0, 20, 0), *((said[i], 0, 21 + i, i + 1) for i in range(4))], range(5))
    end.run(np.eye(VOCAB, dtype=np.float32)[said])
    assert end.state.slot_tokens[0, : end.state.slot_count[0]].tolist() == said[: stop_at + 1]
    assert (end.state.slot_finished[0], end.state.n_rows[0]) == (1, 0)


@pytest.mark.parametrize("limit", [21, 22, 24, 25])
def test_a_limit_inside_a_draft_ends_the_text_there(end: EndOfStep, limit: int) -> None:
    """The row at position p may be the last: it chooses the token of p + 1, which is not computed."""
    said = [11, 12, 13, 14, 15]
    end.start(0, Sampling(), limit, [], 4)
    end.put([(10, 0, 20, 0), *((said[i], 0, 21 + i, i + 1) for i in range(4))], range(5))
    end.run(np.eye(VOCAB, dtype=np.float32)[said])
    assert end.state.slot_tokens[0, : end.state.slot_count[0]].tolist() == said[: limit - 20]
    assert (end.state.slot_finished[0], end.state.n_rows[0]) == (2, 0)


@pytest.mark.parametrize("chosen", [11, 12])
def test_a_guess_without_finite_logits_ends_its_slot(end: EndOfStep, chosen: int) -> None:
    """Accepted or not: its keys and values are in the cache, where they would poison sums of others."""
    end.start(0, Sampling(), 512, [], 4)
    end.put([(10, 0, 20, 0), (11, 0, 21, 1)], [0, 1])
    end.run(np.stack([np.eye(VOCAB, dtype=np.float32)[chosen], np.full(VOCAB, np.nan, np.float32)]))
    assert end.state.slot_tokens[0, : end.state.slot_count[0]].tolist() == [chosen]
    assert (end.state.slot_finished[0], end.state.n_rows[0]) == (3, 0)


# ---- the distribution ----------------------------------------------------------------------------------

DRAWS = 52_000  # of each vocabulary, in steps of three rows of three slots
# Guesses that a biased rule would let through or keep out: the likeliest token, the least likely, one that cannot be
# drawn, one of the middle, one that changes every time.
KINDS = ("likeliest", "least likely", "impossible", "middle", "any")


def guesses(kind: str, p: np.ndarray, step: int) -> int:
    likely = np.argsort(-p, kind="stable")
    possible = likely[: np.count_nonzero(p)]
    return int({
        "likeliest": likely[0], "least likely": possible[-1], "impossible": likely[-1],
        "middle": possible[len(possible) // 2], "any": possible[step * 7 % len(possible)],
    }[kind])  # fmt: skip


def committed(end: EndOfStep, logits: np.ndarray, how: Sampling, p: np.ndarray, draws: int) -> dict[str, np.ndarray]:
    """How often each token was committed [vocab] after each kind of guess, first and later ones of a run alike."""
    state, counts = end.state, {kind: np.zeros(VOCAB, np.int64) for kind in KINDS}
    for slot in range(3):
        end.start(slot, how, 1 << 30, [], 0)
    steps = -(-draws // (3 * len(KINDS)))
    for kind in KINDS:
        for step in range(steps):
            guess, at = guesses(kind, p, step), 3 * step
            end.put([(guess, slot, at + i, i) for slot in range(3) for i in range(3)], range(9))
            state.slot_count[:] = 0
            state.slot_stream[:3] = np.arange(3) + 3 * KINDS.index(kind)
            end.run(np.broadcast_to(logits, (9, VOCAB)))
            for slot in range(3):
                np.add.at(counts[kind], state.slot_tokens[slot, : state.slot_count[slot]], 1)
    return counts


def p_value(counts: np.ndarray, p: np.ndarray) -> float:
    """Of a chi-square test that `counts` are draws from p; tokens that cannot be drawn must not have been."""
    live = p > 0
    assert counts[~live].sum() == 0
    expected = p[live] * counts.sum()
    chi2 = ((counts[live] - expected) ** 2 / expected).sum()
    half = torch.tensor([(live.sum() - 1) / 2, chi2 / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


CASES = {
    8: Sampling(temperature=1.0, seed=1),
    23: Sampling(temperature=0.7, top_k=15, seed=2),
    64: Sampling(temperature=1.3, top_p=0.9, seed=3),
}


def distribution(vocab: int) -> tuple[np.ndarray, Sampling, np.ndarray]:
    """Logits of which only the first `vocab` can be drawn, and the exact share of each token."""
    how = CASES[vocab]
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[:vocab] = np.random.default_rng(vocab).normal(0, 1, vocab)
    weight, rank = weights(logits, how.temperature), np.argsort(-logits, kind="stable")
    weight[rank[kept(weight[rank], how) :]] = 0
    return logits, how, weight / weight.sum()


@pytest.mark.parametrize("vocab", CASES)
def test_what_is_committed_is_distributed_as_without_drafts(end: EndOfStep, vocab: int) -> None:
    logits, how, p = distribution(vocab)
    counts = committed(end, logits, how, p, DRAWS)
    assert sum(c.sum() for c in counts.values()) >= 50_000
    values = {kind: p_value(c, p) for kind, c in counts.items()}
    values["all"] = p_value(sum(counts.values()), p)
    print(vocab, {kind: round(value, 4) for kind, value in values.items()})
    assert min(values.values()) > 0.001


def test_a_biased_rule_is_noticed(
    checkpoint: Path, compiled: ArtifactCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess that is accepted where the token chosen is only a neighbour of it."""
    templates = tmp_path / "templates"
    shutil.copytree(render.TEMPLATES, templates)
    path = templates / "commit.cpp.j2"
    right = "finished = commit(slot, position, token);\n      if (finished || j + held + 1 == end || "
    text = path.read_text()
    assert right in text
    wrong = f"""if (j + held + 1 < end && (token ^ state.row_token()[first + held + 1]) == 1)
        token = state.row_token()[first + held + 1];
      {right}"""
    path.write_text(text.replace(right, wrong))
    monkeypatch.setattr(render, "TEMPLATES", templates)
    biased = EndOfStep(compiled(checkpoint, workers=(1,), limits=LIMITS | {"rows": 81}))
    logits, how, p = distribution(8)
    values = {kind: p_value(c, p) for kind, c in committed(biased, logits, how, p, 6000).items()}
    print({kind: f"{value:.1e}" for kind, value in values.items()})
    assert max(values["likeliest"], values["middle"], values["any"]) < 1e-6
