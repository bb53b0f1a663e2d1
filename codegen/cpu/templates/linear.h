// Linear layers over packed weight tiles: y[m][r] = sum over k of x[m][k] * w[r][k].
//
// A tile is 32 output rows by all of K, read once, in order; rows are lanes, so nothing is summed across
// lanes. It meets M activation rows (a panel) at a time. A tile is two halves of 16 rows.
//
// Each weight format is one struct (linear_formats.h, linear_dense.h). Integer formats share `tile_q8`, dense ones
// `tile_dense`; both add the sum of each block of 32 k to the row's accumulator in order of k, so a row's
// bits never depend on M. A new format is a struct there and an entry in ir/records.py.
#pragma once
#include "linear_tile.h"

constexpr int LINE = 64;
constexpr int HALVES_AT_ONCE = OL_LEVEL == 2 ? 2 : 1;  // AVX2 has registers for one

// The same pointer, to a value the compiler knows nothing about.
OL_INLINE const uint8_t* opaque(const uint8_t* p) {
  asm("" : "+r"(p));
  return p;
}

// FETCH bytes behind what is read (ir/tuning.py). Every other line: a sign for the processor's own prefetcher, which
// brings the rest. Measured on Zen 4: all lines, into L1 or further ahead, are 10 to 40 % slower, none at all up to 10 %.
template <int BYTES, int FETCH>
OL_INLINE void prefetch_ahead(const uint8_t* w) {
  OL_UNROLL for (int line = 0; line < BYTES; line += 2 * LINE) prefetch_l2(w + FETCH + line);
}

// x times N: by shifts, as N has few bits.
template <int N>
OL_INLINE I times(I x) {
  constexpr int low = N & -N, bits = __builtin_ctz(low);
  if constexpr (N == low) return i_sll32(x, bits);
  else return i_add(i_sll32(x, bits), times<N - low>(x));
}

// M rows of int8 activations, with their scale per 32 k and their sums per 16 k.
template <int M>
struct Q8Panel {
  const int8_t* q;   // [K/4][M][4]
  const float* d;    // [K/32][M]
  const int32_t* s;  // [K/32][2][M]

  Q8Panel(const uint8_t* panel, int K)
      : q((const int8_t*)panel),
        d((const float*)(panel + size_t(K) * M)),
        s((const int32_t*)(d + K / BLOCK_K * M)) {}
  void next_block() {
    q += BLOCK_K * M;
    d += M;
    s += 2 * M;
  }
};

// sums[h][m] = codes * activations over one part of a block, for HALVES halves from `first` on.
template <class Fmt, int M, int HALVES>
OL_INLINE void dots_q8(const uint8_t* w, const Q8Panel<M>& x, int first, int part, I (*sums)[M]) {
  constexpr int GROUPS = 8 / Fmt::PARTS;
  I run[HALVES][M];
  OL_UNROLL for (int h = 0; h < HALVES; ++h)
    OL_UNROLL for (int m = 0; m < M; ++m) run[h][m] = i_dot_begin(sums[h][m]);
  OL_UNROLL for (int i = 0; i < GROUPS; ++i) {
    // A whole block takes both nibbles of a load one after the other.
    const int g = Fmt::PARTS == 2 ? GROUPS * part + i : Fmt::BITS == 8 ? i : i / 2 + i % 2 * 4;
    I codes[HALVES];
    OL_UNROLL for (int h = 0; h < HALVES; ++h) codes[h] = Fmt::codes(w, first + h, g);
    OL_UNROLL for (int m = 0; m < M; ++m) {
      I act = i_bcast(x.q + 4 * (g * M + m));
      OL_UNROLL for (int h = 0; h < HALVES; ++h) {
        if (Fmt::WIDE) {
          sums[h][m] = i_dot8(sums[h][m], codes[h], act);
        } else {
          run[h][m] = i_dot_add(run[h][m], codes[h], act);
          if ((i + 1) % Fmt::RUN == 0) {
            sums[h][m] = i_dot_end(run[h][m], sums[h][m]);
            run[h][m] = i_dot_begin(sums[h][m]);
          }
        }
      }
    }
  }
}

// Add one block to acc[.][m], for HALVES halves from `first` on.
template <class Fmt, int M, int HALVES>
OL_INLINE void block_q8(const uint8_t* w, const uint8_t* lead, int b, const Q8Panel<M>& x, int first, F (*acc)[M]) {
  OL_UNROLL for (int part = 0; part < Fmt::PARTS; ++part) {
    I sums[HALVES][M];
    OL_UNROLL for (int m = 0; m < M; ++m) {
      I x_sum = Fmt::PARTS == 2 ? i_set1(x.s[part * M + m]) : i_add(i_set1(x.s[m]), i_set1(x.s[M + m]));
      I start = Fmt::ZERO ? i_sub(i_zero(), times<Fmt::ZERO>(x_sum)) : i_zero();
      OL_UNROLL for (int h = 0; h < HALVES; ++h) sums[h][m] = start;
    }
    if (Fmt::PARTS == 2) w = opaque(w);  // else GCC keeps the first part's loads for the second, and spills
    dots_q8<Fmt, M, HALVES>(w, x, first, part, sums);
    OL_UNROLL for (int h = 0; h < HALVES; ++h) {
      F scale = scale_of<Fmt>(w, lead, b, first + h, part);
      OL_UNROLL for (int m = 0; m < M; ++m) {
        F& a = acc[first + h][m];
        a = f_fma(f_from_i(sums[h][m]), f_mul(scale, f_set1(x.d[m])), a);
      }
    }
  }
  if constexpr (Fmt::HAS_MIN)
    OL_UNROLL for (int part = 0; part < Fmt::PARTS; ++part)
      OL_UNROLL for (int h = 0; h < HALVES; ++h) {
        F min = Fmt::min(w, lead + b * Fmt::LEAD_STEP, first + h, part);
        OL_UNROLL for (int m = 0; m < M; ++m) {
          const int32_t whole = Fmt::PARTS == 2 ? x.s[part * M + m] : x.s[m] + x.s[M + m];
          acc[first + h][m] = f_fma(min, f_set1(x.d[m] * float(whole)), acc[first + h][m]);
        }
      }
}

template <class Fmt, int M, int FETCH>
OL_INLINE void tile_q8(const uint8_t* w, int K, const uint8_t* panel, F (*acc)[M]) {
  constexpr int SUPER_BYTES = Fmt::LEAD_BYTES + Fmt::BLOCKS * Fmt::BLOCK_BYTES;
  Q8Panel<M> x(panel, K);
  for (int k = 0; k < K; k += BLOCK_K * Fmt::BLOCKS, w += SUPER_BYTES) {
    for (int b = 0; b < Fmt::BLOCKS; ++b, x.next_block()) {
      const uint8_t* block = w + Fmt::LEAD_BYTES + b * Fmt::BLOCK_BYTES;
      prefetch_ahead<Fmt::BLOCK_BYTES, FETCH>(block);
      OL_UNROLL for (int first = 0; first < 2; first += HALVES_AT_ONCE)
        block_q8<Fmt, M, HALVES_AT_ONCE>(block, w, b, x, first, acc);
    }
  }
}

// Each block of 32 k has sums of its own: chains of additions that the processor overlaps.
template <class Fmt, int M, int FETCH>
OL_INLINE void tile_dense(const uint8_t* w, int K, const uint8_t* x, F (*acc)[M]) {
  constexpr int STEPS = BLOCK_K / Fmt::STEP_K, X_STEP = M * act_row_bytes(Fmt::ACT, Fmt::STEP_K);
  [[maybe_unused]] const uint8_t* scales = w + body_bytes<Fmt>(K);
  for (int k = 0; k < K; k += BLOCK_K) {
    F sum[2][M];
    OL_UNROLL for (int h = 0; h < 2; ++h)
      OL_UNROLL for (int m = 0; m < M; ++m) sum[h][m] = f_zero();
    OL_UNROLL for (int step = 0; step < STEPS; ++step, w += Fmt::STEP_BYTES, x += X_STEP) {
      prefetch_ahead<Fmt::STEP_BYTES, FETCH>(w);
      OL_UNROLL for (int h = 0; h < 2; ++h) {
        auto weights = Fmt::load(w, h);
        OL_UNROLL for (int m = 0; m < M; ++m) sum[h][m] = Fmt::mac(sum[h][m], weights, x, m, M);
      }
    }
    OL_UNROLL for (int h = 0; h < 2; ++h) {
      if constexpr (Fmt::SCALE_EVERY > 0) {
        F scale = Fmt::scale(scales + k / Fmt::SCALE_EVERY * Fmt::SCALE_BYTES, h);
        OL_UNROLL for (int m = 0; m < M; ++m) acc[h][m] = f_fma(sum[h][m], scale, acc[h][m]);
      } else {
        OL_UNROLL for (int m = 0; m < M; ++m) acc[h][m] = f_add(acc[h][m], sum[h][m]);
      }
    }
  }
}

// One tile against one panel of M rows: y[m * ldy + 0..31].
template <class Fmt, int M, int FETCH>
void tile_rows(const uint8_t* w, int K, const uint8_t* panel, float* y, size_t ldy) {
  F acc[2][M];
  OL_UNROLL for (int m = 0; m < M; ++m) acc[0][m] = acc[1][m] = f_zero();
  if constexpr (Fmt::ACT == Act::Q8)
    tile_q8<Fmt, M, FETCH>(w, K, panel, acc);
  else
    tile_dense<Fmt, M, FETCH>(w, K, panel, acc);
  if constexpr (Fmt::ROW_SCALE)
    OL_UNROLL for (int h = 0; h < 2; ++h) {
      F scale = f_load((const float*)(w + body_bytes<Fmt>(K)) + 16 * h);
      OL_UNROLL for (int m = 0; m < M; ++m) acc[h][m] = f_mul(acc[h][m], scale);
    }
  OL_UNROLL for (int m = 0; m < M; ++m) {
    f_store(y + m * ldy, acc[0][m]);
    f_store(y + m * ldy + 16, acc[1][m]);
  }
}

// The same for a panel of 1 <= rows <= M.
template <class Fmt, int FETCH, int M = PANEL_MAX>
OL_INLINE void tile_panel(int rows, const uint8_t* w, int K, const uint8_t* panel, float* y, size_t ldy) {
  if (rows == M) return tile_rows<Fmt, M, FETCH>(w, K, panel, y, ldy);
  if constexpr (M > 1) tile_panel<Fmt, FETCH, M - 1>(rows, w, K, panel, y, ldy);
}

template <class Fmt, int FETCH>
void tile(const uint8_t* w, int K, const uint8_t* act, int R, float* y, size_t ldy) {
  for (int r = 0, rows; r < R; r += rows) {
    rows = panel_rows(R, r);
    tile_panel<Fmt, FETCH>(rows, w, K, act + r * act_row_bytes(Fmt::ACT, K), y + r * ldy, ldy);
  }
}

OL_INLINE float f_lane(F a, int lane) {
  float lanes[16];
  f_store(lanes, a);
  return lanes[lane];
}

template <class Fmt>
OL_INLINE void decode_row_q8(const uint8_t* w, int K, int half, int lane, float* out) {
  for (int k = 0; k < K; k += BLOCK_K * Fmt::BLOCKS, w += body_bytes<Fmt>(BLOCK_K * Fmt::BLOCKS)) {
    const uint8_t* lead = w;
    for (int b = 0; b < Fmt::BLOCKS; ++b) {
      const uint8_t* block = w + Fmt::LEAD_BYTES + b * Fmt::BLOCK_BYTES;
      for (int g = 0; g < 8; ++g) {
        const int part = g * Fmt::PARTS / 8;
        float min = 0.0f;
        if constexpr (Fmt::HAS_MIN) min = f_lane(Fmt::min(block, lead + b * Fmt::LEAD_STEP, half, part), lane);
        uint8_t codes[64];
        i_store(codes, Fmt::codes(block, half, g));
        const float scale = f_lane(scale_of<Fmt>(block, lead, b, half, part), lane);
        for (int i = 0; i < 4; ++i, ++out) {
          *out = scale * float(codes[4 * lane + i] - Fmt::ZERO);
          if (Fmt::HAS_MIN) *out += min;
        }
      }
    }
  }
}

template <class Fmt>
OL_INLINE void decode_row_dense(const uint8_t* w, int K, int half, int lane, float* out) {
  for (int k = 0; k < K; ++k) {
    out[k] = f_lane(Fmt::value(w + size_t(k / Fmt::STEP_K) * Fmt::STEP_BYTES, half, k % Fmt::STEP_K), lane);
    if constexpr (Fmt::SCALE_EVERY > 0)
      out[k] *= f_lane(Fmt::scale(w + body_bytes<Fmt>(K) + k / Fmt::SCALE_EVERY * Fmt::SCALE_BYTES, half), lane);
  }
}

template <class Fmt>
void decode_row(const uint8_t* packed, int K, int row, float* out) {
  const int half = row % TILE_ROWS / 16, lane = row % 16;
  const uint8_t* w = packed + row / TILE_ROWS * tile_bytes<Fmt>(K);
  if constexpr (Fmt::ACT == Act::Q8)
    decode_row_q8<Fmt>(w, K, half, lane, out);
  else
    decode_row_dense<Fmt>(w, K, half, lane, out);
  if constexpr (Fmt::ROW_SCALE) {
    const float scale = ((const float*)(w + body_bytes<Fmt>(K)))[row % TILE_ROWS];
    for (int k = 0; k < K; ++k) out[k] *= scale;
  }
}
