// What attention knows of a query after some splits of its context: the maximum of its scores, the sum of
// 2^(score - maximum), and the outputs not yet divided by that sum.
#pragma once
#include "kv_cache.h"

constexpr float LOG2E = 1.44269504088896341f;
constexpr float EMPTY = -1e30f;  // the maximum of no scores
constexpr int PARTIAL_M = 0, PARTIAL_L = 1, PARTIAL_O = 16;  // o starts on a line of its own

inline int partial_floats(int head_dim) { return PARTIAL_O + padded_dim(head_dim); }

inline void begin(float* partial, int head_dim) {
  for (int i = 0; i < partial_floats(head_dim); ++i) partial[i] = 0;
  partial[PARTIAL_M] = EMPTY;
}

inline float exp2_1(float x) { return f_hmax(f_exp2(f_set1(x))); }

// Fold the next split's partial into the running one. Fold in split order.
inline void fold(float* into, const float* next, int head_dim) {
  const float a = into[PARTIAL_M], b = next[PARTIAL_M], m = a > b ? a : b;
  if (b == EMPTY) return;
  const float keep = a == EMPTY ? 0 : exp2_1(a - m), take = exp2_1(b - m);
  into[PARTIAL_M] = m;
  into[PARTIAL_L] = into[PARTIAL_L] * keep + next[PARTIAL_L] * take;
  for (int i = PARTIAL_O; i < partial_floats(head_dim); i += 16) {
    F old = f_mul(f_load(into + i), f_set1(keep));
    f_store(into + i, f_fma(f_load(next + i), f_set1(take), old));
  }
}

// A learned score without a value, after the last fold: it only takes part of the probability.
inline void add_sink(float* partial, float sink, int head_dim) {
  const float a = partial[PARTIAL_M], b = sink * LOG2E, m = a > b ? a : b, keep = exp2_1(a - m);
  partial[PARTIAL_M] = m;
  partial[PARTIAL_L] = partial[PARTIAL_L] * keep + exp2_1(b - m);
  for (int i = PARTIAL_O; i < partial_floats(head_dim); ++i) partial[i] *= keep;
}

// out [head_dim]. Adding 0 turns -0 into 0: the sign of a zero may depend on the neighbours in a pass.
inline void finish(float* out, const float* partial, int head_dim) {
  const float l = partial[PARTIAL_L], scale = l == 0 ? 0 : 1 / l;
  for (int d = 0; d < head_dim; ++d) out[d] = partial[PARTIAL_O + d] * scale + 0.0f;
}
