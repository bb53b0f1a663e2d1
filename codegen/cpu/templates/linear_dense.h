// How dense formats lie in their tiles, and how large the tiles of all formats are.
#pragma once
#include "linear_formats.h"

// Dense formats. A struct says how to read one step of STEP_K values of k for the 16 rows of a half:
//   load(step, half)            the weights, in whatever form mac() wants
//   mac(sum, weights, x, m, M)  sum + weights * activations of row m of M; x is the panel at this step
//   value(step, half, i)        the weights of the step's i-th k as f32
//   SCALE_EVERY                 if not 0: a tile ends with scales, SCALE_BYTES of 32 rows for so many k each
//   scale(scales, half)         16 of them

struct F32 {
  static constexpr Act ACT = Act::F32;
  static constexpr int STEP_K = 1, STEP_BYTES = 128, SCALE_EVERY = 0;
  static constexpr bool ROW_SCALE = false;
  OL_INLINE F load(const uint8_t* step, int half) { return f_load((const float*)step + 16 * half); }
  OL_INLINE F mac(F sum, F w, const uint8_t* x, int m, int) {
    return f_fma(w, f_set1(((const float*)x)[m]), sum);
  }
  OL_INLINE F value(const uint8_t* step, int half, int) { return load(step, half); }
};

struct F16 : F32 {
  static constexpr int STEP_BYTES = 64;
  OL_INLINE F load(const uint8_t* step, int half) { return half_row16(step, half); }
  OL_INLINE F value(const uint8_t* step, int half, int) { return load(step, half); }
};

struct BF16 {
  static constexpr Act ACT = OL_LEVEL == 2 ? Act::BF16 : Act::F32;
  static constexpr int STEP_K = 2, STEP_BYTES = 128, SCALE_EVERY = 0;
  static constexpr bool ROW_SCALE = false;
  OL_INLINE I load(const uint8_t* step, int half) { return i_load(step + 64 * half); }
  OL_INLINE F mac(F sum, I w, const uint8_t* x, int m, int M) {
    if (ACT == Act::BF16) return f_bfdot(sum, w, i_bcast(x + 4 * m));
    const float* row = (const float*)x + m;
    return f_fma(f_bf16_odd(w), f_set1(row[M]), f_fma(f_bf16_even(w), f_set1(row[0]), sum));
  }
  OL_INLINE F value(const uint8_t* step, int half, int i) {
    return i ? f_bf16_odd(load(step, half)) : f_bf16_even(load(step, half));
  }
};

// Elements of less than 16 bits, a step's K of a row in one 32-bit lane, against float32 activations.
template <int K>
struct Elements {
  static constexpr Act ACT = Act::F32;
  static constexpr int STEP_K = K, STEP_BYTES = 128, SCALE_EVERY = 0;
  static constexpr bool ROW_SCALE = false;
  struct Step {
    F v[K];
  };
  OL_INLINE F mac(F sum, const Step& w, const uint8_t* x, int m, int M) {
    OL_UNROLL for (int i = 0; i < K; ++i) sum = f_fma(w.v[i], f_set1(((const float*)x)[i * M + m]), sum);
    return sum;
  }
};

// A byte's sign, exponent and fraction go to their places in a float32, whose exponents are 120 larger. A subnormal is
// one there too, which a processor may take long over; of weights scaled to their largest hardly one is.
struct E4M3 : Elements<4> {
  OL_INLINE Step load(const uint8_t* step, int half) {
    I four = i_load(step + 64 * half);
    Step w;
    OL_UNROLL for (int i = 0; i < 4; ++i) {
      I placed = i_and(i_sra32(i_sll32(four, 24 - 8 * i), 4), i_set1(int32_t(0x87f00000)));
      w.v[i] = f_mul(f_bits(placed), f_set1(0x1p120f));
    }
    return w;
  }
  OL_INLINE F value(const uint8_t* step, int half, int i) { return load(step, half).v[i]; }
};

template <class Element, int EVERY>
struct Scaled : Element {
  static constexpr int SCALE_EVERY = EVERY, SCALE_BYTES = 128;
  OL_INLINE F scale(const uint8_t* scales, int half) { return f_load((const float*)scales + 16 * half); }
};
struct FP8 : E4M3 {
  static constexpr bool ROW_SCALE = true;
};
struct FP8_128 : Scaled<E4M3, 128> {};
struct FP8_32 : Scaled<E4M3, 32> {};
struct MXFP8 : E4M3 {
  static constexpr int SCALE_EVERY = 32, SCALE_BYTES = 32;
  OL_INLINE F scale(const uint8_t* scales, int half) { return e8m0_row16(scales, half); }
};

// Of a byte's two codes the high one is the first.
struct NF4 : Scaled<Elements<8>, 64> {
  OL_INLINE Step load(const uint8_t* step, int half) {
    static const float quantiles[16] = {
        -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
        -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
        0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
        0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f
    };
    I eight = i_load(step + 64 * half);
    Step w;
    OL_UNROLL for (int i = 0; i < 8; ++i) w.v[i] = f_lookup16(quantiles, i_srl32(eight, 4 * (i ^ 1)));
    return w;
  }
  OL_INLINE F value(const uint8_t* step, int half, int i) { return load(step, half).v[i]; }
};

// Bytes of one tile before its trailer; K padded to 32 (a multiple of 256 for formats with superblocks).
template <class Fmt>
constexpr size_t body_bytes(int K) {
  if constexpr (Fmt::ACT == Act::Q8)
    return size_t(K) / (BLOCK_K * Fmt::BLOCKS) * (Fmt::BLOCKS * Fmt::BLOCK_BYTES + Fmt::LEAD_BYTES);
  else
    return size_t(K) / Fmt::STEP_K * Fmt::STEP_BYTES;
}

template <class Fmt>
constexpr size_t tile_bytes(int K) {
  if constexpr (Fmt::ROW_SCALE) return body_bytes<Fmt>(K) + TILE_ROWS * sizeof(float);
  if constexpr (Fmt::SCALE_EVERY > 0) {
    const size_t scales = size_t(K + Fmt::SCALE_EVERY - 1) / Fmt::SCALE_EVERY * Fmt::SCALE_BYTES;
    return body_bytes<Fmt>(K) + (scales + 63) / 64 * 64;
  }
  return body_bytes<Fmt>(K);
}
