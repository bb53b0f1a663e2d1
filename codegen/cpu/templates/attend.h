// Attention of one kv head over its paged cache: one split of a few queries, fold, finish.
//
// In a cache tile scores and outputs are the same walk: step down the rows of a part and multiply each row by
// one broadcast lane, of the query in K (lanes are tokens), of the probabilities in V (lanes are dims).
//
// Softmax is online and in base 2: queries arrive multiplied by softmax_scale * log2(e). A split is SPLIT_TOKENS
// at a multiple of SPLIT_TOKENS; each split starts afresh and is folded into the query's partial from left
// to right. No result depends on which queries share a pass, nor on which worker computes which split
// (build with -ffp-contract=off).
//
//   for each query: begin(partial); attend_row_group(kv, queries, n, 0, splits); finish(out, partial)
#pragma once
#include <type_traits>

#include "attend_query.h"

constexpr int PAGE_BLOCKS = PAGE_TOKENS / 16;
constexpr int QUERIES_MAX = OL_LEVEL == 2 ? 6 : OL_LEVEL == 1 ? 4 : 2;  // queries of one pass

// ---- one pass: NQ queries over the tiles of one split -------------------------------------------

// Rows of one part of a tile, and where the stream goes on behind them.
struct Rows {
  const uint8_t* first;
  size_t pitch;
  int count;
  const uint8_t* next;
};

// Blocks of 16 lanes per strip, and queries beside each other: as many sums as the registers hold. Strips are as wide
// as a row where they can be, so that the first queries read a part in the order in which it lies (linear_formats.h
// says why); the others find it in L1.
constexpr int STRIP = OL_LEVEL == 2 ? 8 : OL_LEVEL == 1 ? 4 : 1;
constexpr int TOGETHER = OL_LEVEL == 2 ? 3 : 2;

// Cut N queries into groups of up to TOGETHER: body(integral_constant count, integral_constant first).
template <int N, int FIRST = 0, class Body>
OL_INLINE void for_queries(Body body) {
  if constexpr (FIRST < N) {
    constexpr int groups = (N - FIRST + TOGETHER - 1) / TOGETHER, count = (N - FIRST + groups - 1) / groups;
    body(std::integral_constant<int, count>(), std::integral_constant<int, FIRST>());
    for_queries<N, FIRST + count>(body);
  }
}

// Cut blocks first..last-1 into strips of B blocks, then B/2 ..: body(integral_constant B, first block).
template <int B, class Body>
OL_INLINE void for_strips(int first, int last, Body body) {
  for (; last - first >= B; first += B) body(std::integral_constant<int, B>(), first);
  if constexpr (B > 1) for_strips<B / 2>(first, last, body);
}

// acc[q][b] += rows[i][16 lanes of block b] * x[q][STEP * i], over all rows i in order. With PAIR the second
// half of the blocks takes x[q][STEP * i + 1]. Fetches ahead, or, if the rows are not COLD any more, what comes next.
template <class KV, int STEP, bool PAIR, bool COLD, int NQ, int B>
OL_INLINE void multiply(F (&acc)[NQ][B], Rows rows, int block, const uint32_t* x, int x_pitch) {
  const uint8_t *row = rows.first + 64 * block, *ahead = COLD ? row + AHEAD : rows.next + 64 * block;
  const int near = AHEAD / int(rows.pitch), turn = rows.count > near ? rows.count - near : 0;
  const ptrdiff_t jump = rows.next - (rows.first + rows.pitch * rows.count);
  for (int i = 0; i < rows.count; ++i, row += rows.pitch, ahead += rows.pitch) {
    if (COLD && i == turn) ahead += jump;
    I lane[1 + PAIR][NQ];
    for (int half = 0; half <= PAIR; ++half)
      for (int q = 0; q < NQ; ++q) lane[half][q] = i_bcast(x + x_pitch * q + STEP * i + half);
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      if (b % 2 == 0) prefetch_l2(ahead + 64 * b);
      I cache = i_load(row + 64 * b);
#pragma GCC unroll 8
      for (int q = 0; q < NQ; ++q) acc[q][b] = KV::mac(acc[q][b], cache, lane[PAIR && b >= B / 2][q]);
    }
  }
}

OL_INLINE F soft_cap(F score, float cap) {
  F e = f_exp2(f_mul(f_abs(score), f_set1(-2 / cap)));  // tanh(y) = (1 - e) / (1 + e), e = exp(-2y)
  F t = f_div(f_sub(f_set1(1), e), f_add(f_set1(1), e));
  return f_mul(f_gt_blend(score, f_zero(), t, f_neg(t)), f_set1(cap * LOG2E));
}

// Part of a tile that a query sees: tokens lo..hi-1 of 0..64; none when lo >= hi.
struct Seen {
  int lo, hi;
  bool any() const { return lo < hi; }
  bool all() const { return lo == 0 && hi == PAGE_TOKENS; }
};

inline Seen seen_by(const Query& q, int first_token) {
  const int lo = q.lo - first_token, hi = q.hi - first_token;
  return {lo > 0 ? lo : 0, hi < PAGE_TOKENS ? hi : PAGE_TOKENS};
}

// A query's sinks are the first that it sees, in the split it begins in: so it has no more splits than without.
inline Seen sinks_of(const Query& q, int split) { return {0, q.lo / SPLIT_TOKENS == split ? q.sinks : 0}; }

// The lanes of x that are seen; `other` in the rest.
OL_INLINE F select(Seen seen, int block, F x, float other) {
  static const float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  F token = f_add(f_load(lanes), f_set1(float(16 * block)));
  x = f_gt_blend(f_set1(float(seen.lo)), token, f_set1(other), x);
  return f_gt_blend(f_set1(float(seen.hi)), token, x, f_set1(other));
}

template <class KV, int NQ>
struct Pass {
  const KvHead& kv;
  const Query* queries;
  const int dim = padded_dim(kv.head_dim);
  alignas(64) uint32_t x[NQ][HEAD_DIM_MAX], p[NQ][PAGE_TOKENS] = {};
  alignas(64) float score[NQ][PAGE_TOKENS], o[NQ][HEAD_DIM_MAX];
  F l[NQ], keep[NQ];
  float m[NQ];
  Seen seen[NQ];

  Pass(const KvHead& kv, const Query* queries) : kv(kv), queries(queries) {
    for (int q = 0; q < NQ; ++q) {
      to_lanes<KV>(queries[q].x, kv.head_dim, x[q]);
      for (int d = 0; d < dim; d += 16) f_store(o[q] + d, f_zero());
      l[q] = f_zero(), m[q] = EMPTY;
    }
  }

  const uint8_t* tile(int page) const {
    return kv_page<KV>(kv, page);
  }

  // Scores of blocks first..last-1 of 16 tokens. A score is the sum over even rows of K plus the sum over odd
  // rows: a single sum would wait for its own latency. So two rows are one row of eight blocks here.
  OL_METHOD void scores(Rows k, int first, int last) {
    for_queries<NQ>([&](auto count, auto start) {
      constexpr int N = count, Q = start;
      if (STRIP == 2 * PAGE_BLOCKS && last - first == PAGE_BLOCKS) {
        F acc[N][2 * PAGE_BLOCKS] = {};
        multiply<KV, 2, true, Q == 0>(acc, k, 0, x[Q], HEAD_DIM_MAX);
        for (int q = 0; q < N; ++q)
          for (int b = 0; b < PAGE_BLOCKS; ++b)
            f_store(score[Q + q] + 16 * b, f_add(acc[q][b], acc[q][b + PAGE_BLOCKS]));
        return;
      }
      constexpr int strip = STRIP < PAGE_BLOCKS ? STRIP : PAGE_BLOCKS;
      for (int odd = 0; odd < 2; ++odd)
        for_strips<strip>(first, last, [&](auto width, int block) {
          F acc[N][width] = {};
          multiply<KV, 2, false, Q == 0>(acc, k, block + PAGE_BLOCKS * odd, x[Q] + odd, HEAD_DIM_MAX);
          for (int q = 0; q < N; ++q)
            for (int b = 0; b < width; ++b) {
              float* s = score[Q + q] + 16 * (block + b);
              f_store(s, odd ? f_add(f_load(s), acc[q][b]) : acc[q][b]);
            }
        });
    });
  }

  // Scores to probabilities; may raise the maximum, and then says by how much older sums shrink. A branch, as
  // the maximum rarely grows: predicted, it lets the exponentials start before the new maximum is known.
  OL_METHOD void soften(int q, int first, int last) {
    F top = f_set1(EMPTY);
    for (int b = first; b < last; ++b) {
      F s = f_load(score[q] + 16 * b);
      if (kv.soft_cap > 0) s = soft_cap(s, kv.soft_cap);
      if (!seen[q].all()) s = select(seen[q], b, s, EMPTY);
      f_store(score[q] + 16 * b, s);
      top = f_max(top, s);
    }
    const float best = f_hmax(top), old = m[q];
    if (best > old) {
      m[q] = best;
      keep[q] = f_exp2(f_set1(old - best));
      l[q] = f_mul(l[q], keep[q]);
    }
    for (int b = first; b < last; ++b) {
      F e = f_exp2(f_sub(f_load(score[q] + 16 * b), f_set1(m[q])));
      if (!seen[q].all()) e = select(seen[q], b, e, 0);
      l[q] = f_add(l[q], KV::put(p[q], 16 * b, e));
    }
  }

  // o = o * keep + probabilities * V. The sums of a query that sees nothing here are not written back.
  OL_METHOD void values(Rows v, int first_row) {
    for_queries<NQ>([&](auto count, auto start) {
      constexpr int N = count, Q = start;
      for_strips<STRIP>(0, dim / 16, [&](auto width, int block) {
        F acc[N][width];
        for (int q = 0; q < N; ++q)
          for (int b = 0; b < width; ++b) acc[q][b] = f_mul(f_load(o[Q + q] + 16 * (block + b)), keep[Q + q]);
        multiply<KV, 1, false, Q == 0>(acc, v, block, p[Q] + first_row, PAGE_TOKENS);
        for (int q = 0; q < N; ++q)
          for (int b = 0; b < width && seen[Q + q].any(); ++b) f_store(o[Q + q] + 16 * (block + b), acc[q][b]);
      });
    });
  }

  // One tile, of which a query sees what `see` says; `next` is read after it.
  template <class See>
  void attend(const uint8_t* k, const uint8_t* next, See see) {
    int lo = PAGE_TOKENS, hi = 0;
    for (int q = 0; q < NQ; ++q) {
      seen[q] = see(queries[q]);
      if (!seen[q].any()) continue;
      lo = seen[q].lo < lo ? seen[q].lo : lo;
      hi = seen[q].hi > hi ? seen[q].hi : hi;
    }
    if (lo >= hi) return;
    const int first = lo / 16, last = (hi + 15) / 16, per = KV::per_lane;
    const int first_row = lo / per, last_row = (hi + per - 1) / per;
    const size_t pitch = size_t(4) * dim;
    const uint8_t* v = k + size_t(4 * PAGE_TOKENS / per) * dim + pitch * first_row;
    scores({k, 8 * PAGE_TOKENS, dim / per / 2, v}, first, last);
    for (int q = 0; q < NQ; ++q) {
      keep[q] = f_set1(1);
      if (!seen[q].any()) continue;
      if (last - first == PAGE_BLOCKS) soften(q, 0, PAGE_BLOCKS);  // the usual case, unrolled
      else soften(q, first, last);
    }
    values({v, pitch, last_row - first_row, next}, first_row);
  }

  void result(int q, float* partial) const {
    begin(partial, kv.head_dim);
    partial[PARTIAL_M] = m[q];
    partial[PARTIAL_L] = f_sum(l[q]);
    std::memcpy(partial + PARTIAL_O, o[q], sizeof(float) * dim);
  }
};

// NQ queries over one split, each folded into its partial; `after` is read next, if not null.
template <class KV, int NQ>
__attribute__((noinline)) void attend_split(const KvHead& kv, const Query* queries, int split, const uint8_t* after) {
  int lo = queries[0].lo, hi = queries[0].hi;
  for (int q = 1; q < NQ; ++q) {
    lo = queries[q].lo < lo ? queries[q].lo : lo;
    hi = queries[q].hi > hi ? queries[q].hi : hi;
  }
  constexpr int pages = SPLIT_TOKENS / PAGE_TOKENS;
  const int page_end = (hi + PAGE_TOKENS - 1) / PAGE_TOKENS;
  const int from = lo / PAGE_TOKENS > pages * split ? lo / PAGE_TOKENS : pages * split;
  const int to = page_end < pages * (split + 1) ? page_end : pages * (split + 1);
  bool sinks = false;
  for (int q = 0; q < NQ; ++q) sinks = sinks || sinks_of(queries[q], split).any();
  Pass<KV, NQ> pass(kv, queries);
  for (int page = from - sinks; page < to; ++page) {
    const bool first = page < from;  // the page of the sinks
    const uint8_t *here = pass.tile(first ? 0 : page), *last = after ? after : here;
    pass.attend(here, page + 1 < to ? pass.tile(page + 1) : last, [&](const Query& q) {
      return first ? sinks_of(q, split) : seen_by(q, PAGE_TOKENS * page);
    });
  }
  alignas(64) float partial[PARTIAL_O + HEAD_DIM_MAX];
  for (int q = 0; q < NQ; ++q) {
    pass.result(q, partial);
    fold(queries[q].partial, partial, kv.head_dim);
  }
}

// `n` queries, at most NQ, as one pass.
template <class KV, int NQ>
void attend_some(const KvHead& kv, const Query* queries, int n, int split, const uint8_t* after) {
  if (n == NQ) attend_split<KV, NQ>(kv, queries, split, after);
  else if constexpr (NQ > 1) attend_some<KV, NQ - 1>(kv, queries, n, split, after);
}

template <class KV>
void attend_row_group(const KvHead& kv, const Query* queries, int n, int split_begin, int split_end) {
  const int passes = (n + QUERIES_MAX - 1) / QUERIES_MAX;
  for (int split = split_begin; split < split_end; ++split) {
    const int next = (split + 1) * (SPLIT_TOKENS / PAGE_TOKENS);
    const uint8_t* after = split + 1 < split_end ? kv_page<KV>(kv, next) : kv.after;
    for (int i = 0; i < passes; ++i) {
      const int from = n * i / passes, count = n * (i + 1) / passes - from;
      attend_some<KV, QUERIES_MAX>(kv, queries + from, count, split, i + 1 < passes ? nullptr : after);
    }
  }
}

inline int split_first(const Query& q) { return q.lo / SPLIT_TOKENS; }
inline int split_end(const Query& q) { return (q.hi + SPLIT_TOKENS - 1) / SPLIT_TOKENS; }
