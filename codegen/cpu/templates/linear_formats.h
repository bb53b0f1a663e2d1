// How each weight format lies in its tile: what linear.h and decode_row need to read it, and nothing else.
// The layouts are written by pack.py; all are unsigned codes, so that one u8 x s8 dot serves every format.
#pragma once
#include "simd.h"

enum class Act { Q8, BF16, F32 };  // what the activation panel holds

constexpr int TILE_ROWS = 32;
constexpr int BLOCK_K = 32;

// Integer formats. A struct says how to read one block of 32 rows x 32 k:
//   codes(block, half, g)         unsigned codes of 16 rows, k 4g..4g+3
//   scale(block, lead, half, part)  one f32 per row; `lead` is what precedes the first block of a superblock
//   min(block, lead, half)        HAS_MIN: the value is scale * code + min
//   ZERO                          the value is scale * (code - ZERO)
//   LEAD_STEP                     bytes of the lead that are one block's own, if each has some
//   PARTS                         scales per block: 2 if each 16 k has its own
//   RUN                           AVX2 only: how many i_dot_add fit 16 bits
//
// A tile is read in the order in which it lies, line by line: a processor sees where a stream goes, and loses it
// when the lines of a block are visited out of turn. Measured on Zen 4 from memory, halves one after the other:
// Q8_0 at 55 % and Q6_K at 69 % of the speed of reading; in order both at 100 %.

// Four bits, after the UPPER bytes of bits that are used before: 4 groups of 64 B per half. Byte 4r + i of group j
// holds k 4j+i in its low and k 16+4j+i in its high nibble.
template <int UPPER>
struct NibblesAfter {
  static constexpr Act ACT = Act::Q8;
  static constexpr int BITS = 4, RUN = 8, PARTS = 1, BLOCKS = 1, LEAD_BYTES = 0, LEAD_STEP = 0, SCALES = 512;
  static constexpr bool HAS_MIN = false;

  OL_INLINE I codes(const uint8_t* block, int half, int g) {
    I v = i_load(block + UPPER + 128 * (g % 4) + 64 * half);
    return i_and(g < 4 ? v : i_srl16(v, 4), i_set1(0x0f0f0f0f));
  }
};

using Nibbles = NibblesAfter<0>;

// The fifth bits precede the nibbles: 64 B per half, bit g of byte 4r+i for k 4g+i.
struct FiveBits : NibblesAfter<128> {
  static constexpr int BITS = 5, RUN = 4, SCALES = 640;

  OL_INLINE I codes(const uint8_t* block, int half, int g) {
    I plane = i_load(block + 64 * half);
    I fifth = g < 4 ? i_sll16(plane, 4 - g) : i_srl16(plane, g - 4);
    return i_or(NibblesAfter::codes(block, half, g), i_and(fifth, i_set1(0x10101010)));
  }
};

// Bits 4 and 5, 64 B per half, at bit 2(g%4) of byte 4r+i: those of k 0-15 before the nibbles, of k 16-31 after.
struct SixBits : NibblesAfter<128> {
  static constexpr int BITS = 6, RUN = 2, PARTS = 2, SCALES = 768;

  OL_INLINE I codes(const uint8_t* block, int half, int g) {
    const int j = g % 4;
    I plane = i_load(block + 640 * (g / 4) + 64 * half);
    I high = j < 2 ? i_sll16(plane, 4 - 2 * j) : i_srl16(plane, 2 * j - 4);
    return i_or(NibblesAfter::codes(block, half, g), i_and(high, i_set1(0x30303030)));
  }
};

struct Bytes : Nibbles {
  static constexpr int BITS = 8, SCALES = 1024;
  OL_INLINE I codes(const uint8_t* block, int half, int g) { return i_load(block + 128 * g + 64 * half); }
};

OL_INLINE F half_row16(const uint8_t* p, int half) { return f_half((const uint16_t*)p + 16 * half); }

// After the codes, 32 f16 scales; after those, if WITH_MIN, 32 f16 mins.
template <class Code, int ZERO_POINT, bool WITH_MIN = false>
struct Block32 : Code {
  static constexpr int ZERO = ZERO_POINT, BLOCK_BYTES = Code::SCALES + (WITH_MIN ? 128 : 64);
  static constexpr bool HAS_MIN = WITH_MIN;
  OL_INLINE F scale(const uint8_t* block, const uint8_t*, int half, int) {
    return half_row16(block + Code::SCALES, half);
  }
  OL_INLINE F min(const uint8_t* block, const uint8_t*, int half) {
    return half_row16(block + Code::SCALES + 64, half);
  }
};
struct Q4_0 : Block32<Nibbles, 8> {};
struct Q4_1 : Block32<Nibbles, 0, true> {};
struct Q5_0 : Block32<FiveBits, 16> {};
struct Q8_0 : Block32<Bytes, 128> {};

// Before two blocks, 32 exponents of each. E2M1 codes are looked up as twice their value plus 12.
struct MXFP4 : Nibbles {
  static constexpr int RUN = 4, ZERO = 12, BLOCK_BYTES = SCALES, BLOCKS = 2, LEAD_BYTES = 64, LEAD_STEP = 32;
  OL_INLINE I codes(const uint8_t* block, int half, int g) {
    static const uint8_t twice[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    I v = i_load(block + 128 * (g % 4) + 64 * half);
    return i_lookup16(twice, g < 4 ? v : i_srl16(v, 4));
  }
  // Half of 2^(e - 127), e in the exponent's place but for e = 0, which is subnormal.
  OL_INLINE F scale(const uint8_t*, const uint8_t* lead, int half, int) {
    F power = f_bits(i_sll32(i_u8(lead + 16 * half), 23));
    return f_mul(f_max(power, f_bits(i_set1(0x00400000))), f_set1(0.5f));
  }
};

// Superblocks of 256 k: 32 f16 d and 32 f16 dmin lead, each block ends with 32 u8 scales and 32 u8 mins.
template <class Code>
struct Super45 : Code {
  static constexpr int ZERO = 0, BLOCK_BYTES = Code::SCALES + 64, BLOCKS = 8, LEAD_BYTES = 128;
  static constexpr bool HAS_MIN = true;
  OL_INLINE F scale(const uint8_t* block, const uint8_t* lead, int half, int) {
    return f_mul(f_from_i(i_u8(block + Code::SCALES + 16 * half)), half_row16(lead, half));
  }
  OL_INLINE F min(const uint8_t* block, const uint8_t* lead, int half) {
    return f_neg(f_mul(f_from_i(i_u8(block + Code::SCALES + 32 + 16 * half)), half_row16(lead + 64, half)));
  }
};
struct Q4_K : Super45<Nibbles> {};
struct Q5_K : Super45<FiveBits> {};

// Each block ends with i8 scales: 32 rows for k 0-15, 32 rows for k 16-31. 32 f16 d lead.
struct Q6_K : SixBits {
  static constexpr int ZERO = 32, BLOCK_BYTES = SCALES + 64, BLOCKS = 8, LEAD_BYTES = 64;
  OL_INLINE F scale(const uint8_t* block, const uint8_t* lead, int half, int part) {
    I sub = i_s8((const int8_t*)block + SCALES + 32 * part + 16 * half);
    return f_mul(f_from_i(sub), half_row16(lead, half));
  }
};

// Dense formats. A struct says how to read one step of STEP_K values of k for the 16 rows of a half:
//   load(step, half)            the weights, in whatever form mac() wants
//   mac(sum, weights, x, m, M)  sum + weights * activations of row m of M; x is the panel at this step
//   value(step, half, i)        the weights of the step's i-th k as f32

struct F32 {
  static constexpr Act ACT = Act::F32;
  static constexpr int STEP_K = 1, STEP_BYTES = 128;
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
  static constexpr int STEP_K = 2, STEP_BYTES = 128;
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

// Bytes of one tile; K padded to 32 (a multiple of 256 for formats with superblocks).
template <class Fmt>
constexpr size_t tile_bytes(int K) {
  if constexpr (Fmt::ACT == Act::Q8)
    return size_t(K) / (BLOCK_K * Fmt::BLOCKS) * (Fmt::BLOCKS * Fmt::BLOCK_BYTES + Fmt::LEAD_BYTES);
  else
    return size_t(K) / Fmt::STEP_K * Fmt::STEP_BYTES;
}
