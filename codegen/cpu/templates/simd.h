// Sixteen lanes on every machine: the only vector operations that generated code uses.
//
//   F   16 f32                            I   64 bytes, seen as 16 i32, 32 u16 or 64 u8
//
// OL_LEVEL picks the body: 2 = AVX-512 (VNNI, BF16), 1 = AVX2 + FMA + F16C, 0 = GCC vector extensions only.
// The three levels return the same bits, except for f_to_bf16 and f_bfdot of subnormals and the order of
// the additions inside f_bfdot. This holds only under -ffp-contract=off: GCC contracts even intrinsics.
//
// f_stream stores past the caches, to a multiple of 64 bytes; f_stream_end before other threads may look.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#define OL_INLINE static inline __attribute__((always_inline))
#define OL_METHOD inline __attribute__((always_inline))  // of a class

#if OL_LEVEL == 2
#include "simd_avx512.h"
#elif OL_LEVEL == 1
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

// Fetch the line of `p` towards L1 (or only L2); `p` may lie past the end of any buffer.
OL_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
OL_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

OL_INLINE F f_zero() { return f_set1(0.0f); }
OL_INLINE F f_neg(F a) { return f_bits(i_xor(i_bits(a), i_set1(INT32_MIN))); }
OL_INLINE F f_abs(F a) { return f_bits(i_and(i_bits(a), i_set1(INT32_MAX))); }
OL_INLINE I i_zero() { return i_set1(0); }

// The first n of 16 values, zeros in the other lanes; nothing past p + n is read. n may be <= 0.
OL_INLINE F f_load_part(const float* p, int n) {
  if (n >= 16) return f_load(p);
  float lanes[16] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return f_load(lanes);
}

// Four bytes, in any alignment, in every lane.
OL_INLINE I i_bcast(const void* p) {
  int32_t v;
  std::memcpy(&v, p, sizeof v);
  return i_set1(v);
}

// bf16 pairs (k, k+1) per lane as two f32 vectors: even k, odd k.
OL_INLINE F f_bf16_even(I pairs) { return f_bits(i_sll32(pairs, 16)); }
OL_INLINE F f_bf16_odd(I pairs) { return f_bits(i_and(pairs, i_set1(int32_t(0xffff0000)))); }

OL_INLINE F f_bf16(const uint16_t* p) { return f_bits(i_sll32(i_u16(p), 16)); }

#if OL_LEVEL < 2
// Sum of two bf16 products per lane, as vdpbf16ps does: the odd product first.
OL_INLINE F f_bfdot(F acc, I w, I x) {
  acc = f_fma(f_bf16_odd(w), f_bf16_odd(x), acc);
  return f_fma(f_bf16_even(w), f_bf16_even(x), acc);
}

// 16 f32 to bf16, nearest even; a NaN stays a NaN (only a NaN's magnitude is above infinity's as an integer).
OL_INLINE void f_to_bf16(uint16_t* out, F a) {
  I bits = i_bits(a), high = i_srl32(bits, 16);
  I rounded = i_srl32(i_add(bits, i_add(i_and(high, i_set1(1)), i_set1(0x7fff))), 16);
  I nan = i_gt(i_and(bits, i_set1(INT32_MAX)), i_set1(0x7f800000));
  i_store_u16(out, i_or(i_andnot(nan, rounded), i_and(nan, i_or(high, i_set1(0x40)))));
}
#endif

// 2^x with x clamped to [-126, 126]: below 1.5 ulp, exact for whole x.
// Degree 5 in the fraction, minimax for the relative error with the constant term held at 1.
OL_INLINE F f_exp2(F x) {
  x = f_min(f_max(x, f_set1(-126.0f)), f_set1(126.0f));
  I whole = f_round_i(x);
  F f = f_sub(x, f_from_i(whole));
  F p = f_set1(0.0013264726f);
  p = f_fma(p, f, f_set1(0.009671513f));
  p = f_fma(p, f, f_set1(0.055507336f));
  p = f_fma(p, f, f_set1(0.24022242f));
  p = f_fma(p, f, f_set1(0.693147f));
  p = f_fma(p, f, f_set1(1.0f));
  return f_mul(p, f_bits(i_sll32(i_add(whole, i_set1(127)), 23)));
}
