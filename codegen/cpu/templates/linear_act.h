// Activation rows on their way into a linear: RMS norm, then packing into panels.
//
// R rows are cut into panels of `panel_rows`; the panel of row r starts r * act_row_bytes after the first.
//   Q8    int8 q[K/4][M][4], f32 d[K/32][M], i32 s[K/32][2][M]: x = d * q, s the sum of q over each 16 k
//   BF16  [K/2][M][2]        F32  [K][M]
// K is padded to 32 with zeros. What becomes of a row depends on that row alone.
#pragma once
#include <cmath>

#include "linear_dense.h"
#include "tuning.h"

// Rows that the registers hold; on AVX2 more, as unpacking costs more there: 4 rows of Q4_0 37 ms, by twos 46.
constexpr int PANEL_USUAL = OL_LEVEL == 2 ? 6 : OL_LEVEL == 1 ? 4 : 2;
constexpr int PANEL_MAX = OL_PANEL > PANEL_USUAL ? OL_PANEL : PANEL_USUAL;
constexpr int PANEL_BODY = OL_PANEL ? OL_PANEL : OL_LEVEL > 0 ? 4 : 2;  // rows per panel once one is not enough

constexpr int pad_k(int K) { return (K + BLOCK_K - 1) / BLOCK_K * BLOCK_K; }

// Rows of the panel that starts at row r of R.
constexpr int panel_rows(int R, int r) {
  return R <= PANEL_MAX ? R : R - r < PANEL_BODY ? R - r : PANEL_BODY;
}

// Bytes of one row's share of a panel; K padded to 32.
constexpr size_t act_row_bytes(Act act, int K) {
  return act == Act::Q8 ? size_t(K) + K / BLOCK_K * 12 : size_t(K) * (act == Act::BF16 ? 2 : 4);
}

// out = x / sqrt(mean(x^2) + eps) * weight. `out` may be `x`.
static inline void rms_norm_row(const float* x, const float* weight, int K, float eps, float* out) {
  F even = f_zero(), odd = f_zero();
  for (int k = 0; k < K; k += 32) {
    F a = f_load_part(x + k, K - k), b = f_load_part(x + k + 16, K - k - 16);
    even = f_fma(a, a, even);
    odd = f_fma(b, b, odd);
  }
  const float scale = 1.0f / std::sqrt(f_sum(f_add(even, odd)) / float(K) + eps);
  int k = 0;
  for (; k + 16 <= K; k += 16)
    f_store(out + k, f_mul(f_mul(f_load(x + k), f_set1(scale)), f_load(weight + k)));
  for (; k < K; ++k) out[k] = x[k] * scale * weight[k];
}

// M rows of x [M][ldx] (K values each, K <= Kp) into one panel.
static inline void pack_q8(const float* x, size_t ldx, int K, int Kp, int M, uint8_t* panel) {
  constexpr float LEAST = 1e-30f;  // below it 127 / amax would overflow: such a block counts as zero
  float* d = (float*)(panel + size_t(Kp) * M);
  int32_t* s = (int32_t*)(d + Kp / BLOCK_K * M);
  for (int m = 0; m < M; ++m)
    for (int b = 0; b < Kp / BLOCK_K; ++b) {
      const int k = b * BLOCK_K;
      F v[2] = {f_load_part(x + m * ldx + k, K - k), f_load_part(x + m * ldx + k + 16, K - k - 16)};
      const float amax = f_hmax(f_max(f_abs(v[0]), f_abs(v[1])));
      d[b * M + m] = amax < LEAST ? 0.0f : amax / 127.0f;
      F inverse = f_set1(amax < LEAST ? 0.0f : 127.0f / amax);
      for (int part = 0; part < 2; ++part) {
        I q = f_round_i(f_mul(v[part], inverse));
        s[(2 * b + part) * M + m] = int32_t(f_sum(f_from_i(q)));
        int8_t bytes[16];
        i_store_s8(bytes, q);
        uint8_t* group = panel + 4 * (size_t(k / 4 + 4 * part) * M + m);
        for (int g = 0; g < 4; ++g, group += 4 * M) std::memcpy(group, bytes + 4 * g, 4);
      }
    }
}

static inline void pack_bf16(const float* x, size_t ldx, int K, int Kp, int M, uint8_t* panel) {
  for (int m = 0; m < M; ++m)
    for (int k = 0; k < Kp; k += 16) {
      uint16_t values[16];
      f_to_bf16(values, f_load_part(x + m * ldx + k, K - k));
      uint8_t* pair = panel + 4 * (size_t(k / 2) * M + m);
      for (int i = 0; i < 8; ++i, pair += 4 * M) std::memcpy(pair, values + 2 * i, 4);
    }
}

static inline void pack_f32(const float* x, size_t ldx, int K, int Kp, int M, uint8_t* panel) {
  float* out = (float*)panel;
  for (int m = 0; m < M; ++m)
    for (int k = 0; k < Kp; ++k) out[size_t(k) * M + m] = k < K ? x[m * ldx + k] : 0.0f;
}

// R rows into panels.
template <Act ACT>
void pack_act(const float* x, size_t ldx, int K, int R, uint8_t* act) {
  const int Kp = pad_k(K);
  for (int r = 0, rows; r < R; r += rows) {
    rows = panel_rows(R, r);
    uint8_t* panel = act + r * act_row_bytes(ACT, Kp);
    if (ACT == Act::Q8) pack_q8(x + r * ldx, ldx, K, Kp, rows, panel);
    if (ACT == Act::BF16) pack_bf16(x + r * ldx, ldx, K, Kp, rows, panel);
    if (ACT == Act::F32) pack_f32(x + r * ldx, ldx, K, Kp, rows, panel);
  }
}
