"""attend.h and kv_cache.h on every level of this host, against float64."""

from __future__ import annotations

import ctypes
import functools

import ml_dtypes
import numpy as np
import pytest

from onelaunch.ir.limits import PAGE_RUN
from onelaunch.tests.native import build, host_levels

LOG2E = 1.4426950408889634
CONTEXT = 701  # odd: the last pair of V has an unused slot
DIMS = [64, 80, 96, 128, 256, 72]  # 72 is padded to 80
KINDS = ["bf16", "f32"]

each_level = pytest.mark.parametrize("level", host_levels())
each_kind = pytest.mark.parametrize("kind", KINDS)


class KvHead(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("run_stride", ctypes.c_size_t),
        ("head_dim", ctypes.c_int),
        ("soft_cap", ctypes.c_float),
        ("after", ctypes.c_void_p),
    )


class Query(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("lo", ctypes.c_int),
        ("hi", ctypes.c_int),
        ("sinks", ctypes.c_int),
    )


def aligned(size: int, dtype: type = np.uint8) -> np.ndarray:
    """`size` items that start on a 64-byte line."""
    raw = np.zeros(size * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size * np.dtype(dtype).itemsize].view(dtype)


class Cache:
    """One kv head's cache on one level: tokens 0..CONTEXT-1, unused slots full of huge finite numbers.

    `ring` pages are used in turn, in shuffled order, the first `pinned` only once; None: a page for each 64 tokens.
    """

    def __init__(
        self, level: int, kind: str, dim: int, ring: int | None = None, context: int = CONTEXT, pinned: int = 0
    ) -> None:
        rng = np.random.default_rng(dim)
        self.lib, self.f32, self.dim = build("attend_harness.cpp", level), int(kind == "f32"), dim
        self.lib.harness_tile_bytes.restype = ctypes.c_size_t
        self.k, self.v = rng.normal(size=(2, context, dim)).astype(np.float32)
        self.tile = self.lib.harness_tile_bytes(self.f32, dim)
        pages = -(-context // 64)
        order = rng.permutation(ring or pages).astype(np.int32)
        at = np.arange(pages)
        self.table = order[np.where(at < pinned, at, pinned + (at - pinned) % (len(order) - pinned))].copy()
        stride = PAGE_RUN * self.tile + 64  # not dense: the stride is the caller's
        self.memory = aligned(stride * -(-len(order) // PAGE_RUN))
        self.memory[:] = 0x7F
        self.head = KvHead(self.memory.ctypes.data, self.table.ctypes.data, stride, dim, 0.0, None)
        for token in range(context):
            run, place = divmod(int(self.table[token // 64]), PAGE_RUN)
            tile = self.memory.ctypes.data + stride * run + self.tile * place
            k, v = self.k[token].ctypes.data, self.v[token].ctypes.data
            self.lib.harness_append(
                self.f32, ctypes.c_void_p(tile), token % 64, ctypes.c_void_p(k), ctypes.c_void_p(v), dim
            )

    def scaled(self, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x * np.float32(self.dim**-0.5 * LOG2E), np.float32)

    def partials(
        self, x: np.ndarray, ranges: list[tuple[int, int]], splits: tuple[int, int], sinks: int = 0
    ) -> np.ndarray:
        """Partials [n, floats] of queries x [n, dim] (unscaled) in one call, over splits begin..end-1."""
        scaled = self.scaled(x)
        out = aligned(len(x) * self.lib.harness_partial_floats(self.dim), np.float32).reshape(len(x), -1)
        queries = (Query * len(x))()
        for i, (lo, hi) in enumerate(ranges):
            self.lib.harness_begin(ctypes.c_void_p(out[i].ctypes.data), self.dim)
            queries[i] = Query(scaled[i].ctypes.data, out[i].ctypes.data, lo, hi, min(sinks, lo))
        self.lib.harness_attend(self.f32, ctypes.byref(self.head), queries, len(x), *splits)
        return out

    def finish(self, partials: np.ndarray) -> np.ndarray:
        out = np.empty((len(partials), self.dim), np.float32)
        for i, partial in enumerate(partials):
            self.lib.harness_finish(ctypes.c_void_p(out[i].ctypes.data), ctypes.c_void_p(partial.ctypes.data), self.dim)
        return out

    def attend(self, x: np.ndarray, ranges: list[tuple[int, int]], sinks: int = 0) -> np.ndarray:
        last = max(hi for _, hi in ranges)
        return self.finish(self.partials(x, ranges, (0, -(-last // 256)), sinks))

    def exact(
        self, x: np.ndarray, lo: int, hi: int, cap: float = 0.0, sink: float = -np.inf, sinks: int = 0
    ) -> np.ndarray:
        """The same in float64, from the query and the cache as they are rounded."""
        at = np.r_[0 : min(sinks, lo), lo:hi]
        k, v, x = self.k[at], self.v[at], self.scaled(x)
        if not self.f32:
            k, v, x = (a.astype(ml_dtypes.bfloat16).astype(np.float64) for a in (k, v, x))
        score = k.astype(np.float64) @ x.astype(np.float64) / LOG2E
        if cap:
            score = cap * np.tanh(score / cap)
        top = max(score.max(), sink)
        p = np.exp(score - top)
        return p @ v.astype(np.float64) / (p.sum() + np.exp(sink - top))


@functools.cache
def cache(level: int, kind: str, dim: int) -> Cache:
    return Cache(level, kind, dim)


def random_queries(rng: np.random.Generator, n: int, dim: int) -> np.ndarray:
    return (rng.normal(size=(n, dim)) * rng.choice([0.5, 2, 6])).astype(np.float32)


def rows_of(group: int, rows: int, position: int, window: int) -> list[tuple[int, int]]:
    """Visible ranges of `rows` consecutive positions that end at `position`, `group` heads each."""
    ends = [p + 1 for p in range(position - rows + 1, position + 1)]
    return [(max(0, end - window) if window else 0, end) for end in ends for _ in range(group)]


def tolerance(kind: str) -> float:
    return 2e-5 if kind == "f32" else 8e-3  # bf16: each probability is off by up to 1/512 of itself


@each_level
@each_kind
@pytest.mark.parametrize("dim", DIMS)
def test_attention_equals_float64(level, kind, dim):
    rng = np.random.default_rng(dim)
    c = cache(level, kind, dim)
    contexts = [1, 2, 15, 16, 17, 63, 64, 65, 128, 255, 256, 257, 511, 640, CONTEXT]
    for context in contexts + list(rng.integers(1, CONTEXT, 10)):
        group, window = int(rng.choice([1, 2, 3, 4, 7])), int(rng.choice([0, 0, 1, 30, 64, 300]))
        ranges = rows_of(group, min(int(rng.integers(1, 4)), context), context - 1, window)
        x = random_queries(rng, len(ranges), dim)
        got = c.attend(x, ranges)
        for i, (lo, hi) in enumerate(ranges):
            assert np.abs(got[i] - c.exact(x[i], lo, hi)).max() < tolerance(kind), (context, group, window)


@each_level
@each_kind
def test_every_context_length(level, kind):
    c = cache(level, kind, 64)
    x = random_queries(np.random.default_rng(3), CONTEXT, 64)
    for context in range(1, CONTEXT + 1):
        got = c.attend(x[context - 1 : context], [(0, context)])[0]
        assert np.abs(got - c.exact(x[context - 1], 0, context)).max() < tolerance(kind), context


@each_level
@each_kind
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_result_does_not_depend_on_the_group(level, kind, cap):
    rng = np.random.default_rng(11)
    for dim in (80, 128, 256):
        c = cache(level, kind, dim)
        c.head.soft_cap = cap
        for shape in [(1, 9, 70, 0), (2, 3, 300, 0), (7, 2, 513, 0), (3, 4, 650, 100)]:
            ranges = rows_of(*shape)
            x = random_queries(rng, len(ranges), dim)
            together = c.attend(x, ranges)
            for i in range(len(x)):
                assert c.attend(x[i : i + 1], ranges[i : i + 1])[0].tobytes() == together[i].tobytes()
            for size in (2, 3, 4, 5):
                pick = np.sort(rng.permutation(len(x))[:size])
                assert (c.attend(x[pick], [ranges[i] for i in pick]) == together[pick]).all()
        c.head.soft_cap = 0.0


@each_level
@each_kind
def test_folding_splits_later_gives_the_same_bits(level, kind):
    c = cache(level, kind, 128)
    ranges = [*rows_of(2, 3, CONTEXT - 1, 0), (300, 301), (0, 3), (200, 600)]
    x = random_queries(np.random.default_rng(5), len(ranges), 128)
    at_once = c.partials(x, ranges, (0, 3))
    folded = c.partials(x, ranges, (0, 0))
    for split in range(3):
        part = c.partials(x, ranges, (split, split + 1))
        for i in range(len(x)):
            into, one = (ctypes.c_void_p(a[i].ctypes.data) for a in (folded, part))
            c.lib.harness_fold(into, one, 128)
    assert folded.tobytes() == at_once.tobytes()


@each_level
@each_kind
def test_a_tile_that_a_query_does_not_see_leaves_it_untouched(level, kind):
    c = cache(level, kind, 128)
    ranges = [(0, 64), (0, 256), (70, 130), (128, 192)]
    x = random_queries(np.random.default_rng(6), len(ranges), 128)
    together = c.partials(x, ranges, (0, 1))
    for i in range(len(x)):
        assert c.partials(x[i : i + 1], ranges[i : i + 1], (0, 1))[0].tobytes() == together[i].tobytes()
    nothing = c.partials(x[:2], [(300, 400), (0, 256)], (0, 1))
    assert nothing[0].tobytes() == c.partials(x[:1], ranges[:1], (0, 0))[0].tobytes()


@each_level
@each_kind
def test_ring_of_pages_serves_a_window(level, kind):
    c = Cache(level, kind, 96, ring=4)
    window = 130  # with 3 rows: at most 4 pages at once
    ranges = rows_of(4, 3, CONTEXT - 1, window)
    x = random_queries(np.random.default_rng(8), len(ranges), 96)
    got = c.attend(x, ranges)
    for i, (lo, hi) in enumerate(ranges):
        assert np.abs(got[i] - c.exact(x[i], lo, hi)).max() < tolerance(kind)


@each_level
@each_kind
@pytest.mark.parametrize("sinks", [1, 16, 64])
def test_the_first_tokens_stay_seen_when_a_window_has_left_them(level, kind, sinks):
    """In one pass or apart, whatever splits they begin in, where the window has just left them and in a ring."""
    c = Cache(level, kind, 96, ring=5, pinned=1)
    window, c.head.soft_cap = 130, 4.0
    ranges = rows_of(2, 4, CONTEXT - 1, window)
    x = random_queries(np.random.default_rng(sinks), len(ranges), 96)
    together = c.attend(x, ranges, sinks)
    for i, (lo, hi) in enumerate(ranges):
        assert np.abs(together[i] - c.exact(x[i], lo, hi, 4.0, sinks=sinks)).max() < tolerance(kind)
        assert c.attend(x[i : i + 1], [(lo, hi)], sinks).tobytes() == together[i].tobytes()
    c = cache(level, kind, 64)
    ranges = [(0, 30), (1, 31), (5, 200), (63, 100), (64, 70), (255, 300), (256, 300), (257, 600)]
    x = random_queries(np.random.default_rng(sinks), len(ranges), 64)
    together = c.attend(x, ranges, sinks)
    for i, (lo, hi) in enumerate(ranges):
        assert np.abs(together[i] - c.exact(x[i], lo, hi, sinks=sinks)).max() < tolerance(kind), (lo, hi)
        assert c.attend(x[i : i + 1], [(lo, hi)], sinks).tobytes() == together[i].tobytes()
    folded = c.partials(x, ranges, (0, 0), sinks)
    for split in range(3):
        part = c.partials(x, ranges, (split, split + 1), sinks)
        for into, one in zip(folded, part, strict=True):
            c.lib.harness_fold(*(ctypes.c_void_p(a.ctypes.data) for a in (into, one)), 64)
    assert c.finish(folded).tobytes() == together.tobytes()


@each_level
@each_kind
def test_soft_cap_and_sink(level, kind):
    c = cache(level, kind, 64)
    x = random_queries(np.random.default_rng(9), 4, 64) * 3
    c.head.soft_cap = 4.0
    partials = c.partials(x, [(0, 500)] * 4, (0, 2))
    c.head.soft_cap = 0.0
    for partial in partials:
        c.lib.harness_sink(ctypes.c_void_p(partial.ctypes.data), ctypes.c_float(3.0), 64)
    for query, out in zip(x, c.finish(partials), strict=True):
        assert np.abs(out - c.exact(query, 0, 500, cap=4.0, sink=3.0)).max() < tolerance(kind)


@each_level
@pytest.mark.parametrize("dim", [64, 80, 72])
def test_append_writes_the_layout_of_the_contract(level, dim):
    padded = -(-dim // 16) * 16
    for kind in KINDS:
        c = Cache(level, kind, dim, context=64)
        x = c.memory[: c.tile]
        if kind == "f32":
            k = x.view(np.float32)[: padded * 64].reshape(padded, 64).T
            v = x.view(np.float32)[padded * 64 :].reshape(64, padded)
            want_k, want_v = c.k, c.v
        else:
            k, v = np.split(x.view(ml_dtypes.bfloat16), 2)
            k = k.reshape(padded // 2, 64, 2).transpose(1, 0, 2).reshape(64, padded)
            v = v.reshape(32, padded, 2).transpose(0, 2, 1).reshape(64, padded)
            want_k, want_v = c.k.astype(ml_dtypes.bfloat16), c.v.astype(ml_dtypes.bfloat16)
        for got, want in ((k, want_k), (v, want_v)):
            assert (got[:, :dim] == want).all()
            assert (got[:, dim:] == 0).all()
