// How integer formats lie in their tiles: what linear.h and decode_row need to read them, and nothing else.
// The layouts are written by pack.py; all are unsigned codes, so that one u8 x s8 dot serves every format.
#pragma once
#include "simd.h"

// Loops over registers are unrolled in full: an array that a real loop indexes lives in memory.
// Level 0 has none to gain, and compiles twenty times slower unrolled.
#if OL_LEVEL > 0
#define OL_UNROLL _Pragma("GCC unroll 32")
#else
#define OL_UNROLL
#endif

enum class Act { Q8, BF16, F32 };  // what the activation panel holds

constexpr int TILE_ROWS = 32;
constexpr int BLOCK_K = 32;

// Integer formats. A struct says how to read one block of 32 rows x 32 k:
//   codes(block, half, g)         unsigned codes of 16 rows, k 4g..4g+3
//   scale(block, lead, half, part)  one f32 per row; `lead` is what precedes the first block of a superblock
//   min(block, lead, half, part)  HAS_MIN: the value is scale * code + min
//   ZERO                          the value is scale * (code - ZERO)
//   LEAD_STEP                     bytes of the lead that are one block's own, if each has some
//   SHARED                        where in such a lead the f16 lie that every block's scale is multiplied by
//   PARTS                         scales per block: 2 if each 16 k has its own
//   WIDE                          codes may be above 63
//   RUN                           AVX2 only, not WIDE: how many i_dot_add fit 16 bits
//   ROW_SCALE                     a tile ends with 32 f32 that multiply its rows
//
// A tile is read in the order in which it lies, line by line: a processor sees where a stream goes, and loses it
// when the lines of a block are visited out of turn. Measured on Zen 4 from memory, halves one after the other:
// Q8_0 at 55 % and Q6_K at 69 % of the speed of reading; in order both at 100 %.

// Four bits, after the UPPER bytes of bits that are used before: 4 groups of 64 B per half. Byte 4r + i of group j
// holds k 4j+i in its low and k 16+4j+i in its high nibble.
template <int UPPER>
struct NibblesAfter {
  static constexpr Act ACT = Act::Q8;
  static constexpr int BITS = 4, RUN = 8, PARTS = 1, BLOCKS = 1, LEAD_BYTES = 0, LEAD_STEP = 0, SHARED = 0;
  static constexpr int SCALES = 512, SCALE_EVERY = 0;
  static constexpr bool HAS_MIN = false, WIDE = false, ROW_SCALE = false;

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

// Two bits, after UPPER bytes: 64 B per half for k 0-15, then for k 16-31: bits 2(g%4) of byte 4r+i.
template <int UPPER>
struct PairsAfter : Nibbles {
  static constexpr int BITS = 2, RUN = 4, PARTS = 2, SCALES = 256;

  OL_INLINE I codes(const uint8_t* block, int half, int g) {
    return i_and(i_srl16(i_load(block + UPPER + 128 * (g / 4) + 64 * half), 2 * (g % 4)), i_set1(0x03030303));
  }
};

using TwoBits = PairsAfter<0>;

// The third bits precede them: 64 B per half, bit g of byte 4r+i for k 4g+i.
struct ThreeBits : PairsAfter<128> {
  static constexpr int BITS = 3, SCALES = 384;

  OL_INLINE I codes(const uint8_t* block, int half, int g) {
    I plane = i_load(block + 64 * half);
    I third = g < 2 ? i_sll16(plane, 2 - g) : i_srl16(plane, g - 2);
    return i_or(PairsAfter::codes(block, half, g), i_and(third, i_set1(0x04040404)));
  }
};

struct Bytes : Nibbles {
  static constexpr int BITS = 8, SCALES = 1024;
  static constexpr bool WIDE = true;
  OL_INLINE I codes(const uint8_t* block, int half, int g) { return i_load(block + 128 * g + 64 * half); }
};

OL_INLINE F half_row16(const uint8_t* p, int half) { return f_half((const uint16_t*)p + 16 * half); }

// Nibbles that a table of 16 gives a meaning: bytes, the zero point added.
struct E2M1 : Nibbles {  // twice the value plus 12
  static constexpr int RUN = 4, ZERO = 12;
  OL_INLINE I codes(const uint8_t* block, int half, int g) {
    static const uint8_t twice[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    I v = i_load(block + 128 * (g % 4) + 64 * half);
    return i_lookup16(twice, g < 4 ? v : i_srl16(v, 4));
  }
};
struct IQ4 : Nibbles {
  static constexpr int ZERO = 128;
  static constexpr bool WIDE = true;
  OL_INLINE I codes(const uint8_t* block, int half, int g) {
    static const uint8_t table[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
    I v = i_load(block + 128 * (g % 4) + 64 * half);
    return i_lookup16(table, g < 4 ? v : i_srl16(v, 4));
  }
};

template <bool BRAIN>
OL_INLINE F wide_row16(const uint8_t* p, int half) {
  return BRAIN ? f_bf16((const uint16_t*)p + 16 * half) : half_row16(p, half);
}

// After the codes, 32 f16 scales (or bf16); after those, if WITH_MIN, 32 f16 mins.
template <class Code, int ZERO_POINT, bool WITH_MIN = false, bool BRAIN = false>
struct Block32 : Code {
  static constexpr int ZERO = ZERO_POINT, BLOCK_BYTES = Code::SCALES + (WITH_MIN ? 128 : 64);
  static constexpr bool HAS_MIN = WITH_MIN;
  OL_INLINE F scale(const uint8_t* block, const uint8_t*, int half, int) {
    return wide_row16<BRAIN>(block + Code::SCALES, half);
  }
  OL_INLINE F min(const uint8_t* block, const uint8_t*, int half, int) {
    return half_row16(block + Code::SCALES + 64, half);
  }
};
struct Q4_0 : Block32<Nibbles, 8> {};
struct Q4_1 : Block32<Nibbles, 0, true> {};
struct Q5_0 : Block32<FiveBits, 16> {};
struct Q5_1 : Block32<FiveBits, 0, true> {};
struct Q8_0 : Block32<Bytes, 128> {};
struct IQ4_NL : Block32<IQ4, 128> {};
struct INT4 : Block32<Nibbles, 8, false, true> {};

// Zero points of their own: before two blocks, 32 u8 of each. The min is what they take from every product.
template <bool BRAIN>
struct ZeroPoints : Block32<Nibbles, 0, false, BRAIN> {
  static constexpr int BLOCKS = 2, LEAD_BYTES = 64, LEAD_STEP = 32;
  static constexpr bool HAS_MIN = true;
  OL_INLINE F min(const uint8_t* block, const uint8_t* lead, int half, int) {
    return f_neg(f_mul(f_from_i(i_u8(lead + 16 * half)), wide_row16<BRAIN>(block + Nibbles::SCALES, half)));
  }
};
struct INT4_Z : ZeroPoints<false> {};
struct INT4_BZ : ZeroPoints<true> {};

struct INT8 : Bytes {
  static constexpr int ZERO = 128, BLOCK_BYTES = SCALES;
  static constexpr bool ROW_SCALE = true;
  OL_INLINE F scale(const uint8_t*, const uint8_t*, int, int) { return f_set1(1.0f); }
};

// 2^(e - 127) of 16 bytes e: in the exponent's place but for e = 0, which is subnormal.
OL_INLINE F e8m0_row16(const uint8_t* p, int half) {
  return f_max(f_bits(i_sll32(i_u8(p + 16 * half), 23)), f_bits(i_set1(0x00400000)));
}

// Half of 16 floats of 4 bits of exponent and 3 of fraction, not negative. One power of two more, less what that adds to
// a subnormal, is right for those and too large for all others.
OL_INLINE F half_e4m3(I code) {
  I bits = i_sll32(code, 20);
  F more = f_sub(f_bits(i_add(bits, i_set1(120 << 23))), f_bits(i_set1(120 << 23)));
  return f_min(f_bits(i_add(bits, i_set1(119 << 23))), more);
}

// Before two blocks, 32 exponents of each.
struct MXFP4 : E2M1 {
  static constexpr int BLOCK_BYTES = SCALES, BLOCKS = 2, LEAD_BYTES = 64, LEAD_STEP = 32;
  OL_INLINE F scale(const uint8_t*, const uint8_t* lead, int half, int) {
    return f_mul(e8m0_row16(lead, half), f_set1(0.5f));
  }
};

// Each block ends with e4m3: 32 rows for k 0-15, 32 rows for k 16-31.
struct NVFP4 : E2M1 {
  static constexpr int PARTS = 2, BLOCK_BYTES = SCALES + 64;
  static constexpr bool ROW_SCALE = true;
  OL_INLINE F scale(const uint8_t* block, const uint8_t*, int half, int part) {
    return half_e4m3(i_u8(block + SCALES + 32 * part + 16 * half));
  }
};

// Superblocks whose blocks have an i8 scale in the lead, before the 32 f16 d that they share.
struct IQ4_XS : IQ4 {
  static constexpr int BLOCK_BYTES = SCALES, BLOCKS = 8, LEAD_BYTES = 320, LEAD_STEP = 32, SHARED = 256;
  OL_INLINE F scale(const uint8_t*, const uint8_t* lead, int half, int) {
    return f_from_i(i_s8((const int8_t*)lead + 16 * half));
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
  OL_INLINE F min(const uint8_t* block, const uint8_t* lead, int half, int) {
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

// Each block ends with 32 bytes for k 0-15, 32 bytes for k 16-31: a scale in the low nibble, a min in the high one.
struct Q2_K : TwoBits {
  static constexpr int ZERO = 0, BLOCK_BYTES = SCALES + 64, BLOCKS = 8, LEAD_BYTES = 128;
  static constexpr bool HAS_MIN = true;
  OL_INLINE I sub(const uint8_t* block, int half, int part) { return i_u8(block + SCALES + 32 * part + 16 * half); }
  OL_INLINE F scale(const uint8_t* block, const uint8_t* lead, int half, int part) {
    return f_mul(f_from_i(i_and(sub(block, half, part), i_set1(15))), half_row16(lead, half));
  }
  OL_INLINE F min(const uint8_t* block, const uint8_t* lead, int half, int part) {
    return f_neg(f_mul(f_from_i(i_srl32(sub(block, half, part), 4)), half_row16(lead + 64, half)));
  }
};

// As Q6_K.
struct Q3_K : ThreeBits {
  static constexpr int ZERO = 4, BLOCK_BYTES = SCALES + 64, BLOCKS = 8, LEAD_BYTES = 64;
  OL_INLINE F scale(const uint8_t* block, const uint8_t* lead, int half, int part) {
    I sub = i_s8((const int8_t*)block + SCALES + 32 * part + 16 * half);
    return f_mul(f_from_i(sub), half_row16(lead, half));
  }
};

// A block's scale, `lead` being that of its superblock, in which it is number `b`.
template <class Fmt>
OL_INLINE F scale_of(const uint8_t* block, const uint8_t* lead, int b, int half, int part) {
  F own = Fmt::scale(block, lead + b * Fmt::LEAD_STEP, half, part);
  return Fmt::SHARED ? f_mul(own, half_row16(lead + Fmt::SHARED, half)) : own;
}
