// One token from a row of logits, without sorting the vocabulary.
//
// The meaning, in order; `ir/sampling.py` is the same in numpy, token for token:
//   1. repetition penalty: a seen token's logit becomes logit / penalty if above 0, else logit * penalty
//   2. tokens are ranked by logit, ties by lower index; temperature 0 takes the first
//   3. a token weighs round(2^30 * exp((logit - largest) / temperature)): a whole number, so that sums are
//      exact in any order. What weighs less than 2^-31 of the best token is never drawn.
//   4. top_k keeps the first k by rank; top_p then keeps the shortest run of ranks that holds top_p of their
//      weight; min_p keeps weights from min_p of the largest
//   5. draw: one of the kept tokens in *index* order, where the running weight passes uniform * total
// The uniform is 64 bits of Philox4x32-10 (Salmon et al., SC'11): key = seed, counter = (position, stream, 0, 0).
//
// Steps 2-5 skip tiles of 32 logits by their maxima. A tile with a NaN has the maximum NaN (`tile_max`).
#pragma once
#include <cmath>

#include "simd.h"

constexpr int LOGIT_TILE = 32, LOGIT_BLOCK = 256;

struct Sampling {
  float temperature;  // 0: greedy
  int32_t top_k;      // 0: off
  float top_p;        // 1: off
  float min_p;        // 0: off
  float repetition_penalty;  // 1: off
  uint32_t stream;
  uint64_t seed;
};

// 0 in lanes that hold a number, NaN in lanes that hold none.
OL_INLINE F nan_lanes(F x) {
  x = f_gt_blend(x, f_set1(-INFINITY), f_zero(), x);
  return f_gt_blend(f_set1(-1), x, f_zero(), x);
}

// Largest of x [n <= 32], NaN if one of them is.
inline float tile_max(const float* x, int n) {
  if (n == LOGIT_TILE) {
    F a = f_load(x), b = f_load(x + 16);
    return f_hmax(f_max(a, b)) + f_sum(f_add(nan_lanes(a), nan_lanes(b)));
  }
  float top = x[0];
  for (int i = 1; i < n; ++i) top = x[i] > top || x[i] != x[i] ? x[i] : top;
  return top;
}

// Largest of x [n], NaN if one of them is.
float largest(const float* x, int n);

// Lowest index whose logit is `top`, the largest.
int first_equal(const float* logits, const float* maxima, float top);

// The next token, or -1 when a logit is NaN or the largest is infinite.
// logits [vocab] and maxima [ceil(vocab / 32)] are changed by the penalty; seen may be null without one.
int sample(float* logits, float* maxima, int vocab, const Sampling& how, const uint32_t* seen, uint32_t position,
           void* scratch);
