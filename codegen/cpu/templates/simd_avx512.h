// Level 2 of simd.h: one zmm register is one F or one I.
#include <immintrin.h>

typedef __m512 F;
typedef __m512i I;

OL_INLINE F f_load(const float* p) { return _mm512_loadu_ps(p); }
OL_INLINE void f_store(float* p, F a) { _mm512_storeu_ps(p, a); }
OL_INLINE void f_stream(float* p, F a) { _mm512_stream_ps(p, a); }
OL_INLINE void f_stream_end() { _mm_sfence(); }
OL_INLINE F f_set1(float a) { return _mm512_set1_ps(a); }
OL_INLINE F f_add(F a, F b) { return _mm512_add_ps(a, b); }
OL_INLINE F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
OL_INLINE F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
OL_INLINE F f_div(F a, F b) { return _mm512_div_ps(a, b); }
OL_INLINE F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
OL_INLINE F f_max(F a, F b) { return _mm512_max_ps(a, b); }
OL_INLINE F f_min(F a, F b) { return _mm512_min_ps(a, b); }
OL_INLINE F f_bits(I a) { return _mm512_castsi512_ps(a); }
OL_INLINE I i_bits(F a) { return _mm512_castps_si512(a); }

// a > b ? x : y, lane by lane
OL_INLINE F f_gt_blend(F a, F b, F x, F y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}

// Sum of the lanes, halving the vector each time: lane i + lane i+8, then i+4, i+2, i+1.
OL_INLINE float f_sum(F a) {
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
OL_INLINE float f_hmax(F a) { return _mm512_reduce_max_ps(a); }

OL_INLINE F f_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
OL_INLINE float f_half_1(uint16_t h) { return _cvtsh_ss(h); }
OL_INLINE F f_from_i(I a) { return _mm512_cvtepi32_ps(a); }
OL_INLINE I f_round_i(F a) { return _mm512_cvtps_epi32(a); }
OL_INLINE void f_to_bf16(uint16_t* p, F a) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a));
}


OL_INLINE I i_load(const void* p) { return _mm512_loadu_si512(p); }
OL_INLINE void i_store(void* p, I a) { _mm512_storeu_si512(p, a); }
OL_INLINE void i_store_s8(int8_t* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }
OL_INLINE I i_set1(int32_t a) { return _mm512_set1_epi32(a); }
OL_INLINE I i_and(I a, I b) { return _mm512_and_si512(a, b); }
OL_INLINE I i_andnot(I a, I b) { return _mm512_andnot_si512(a, b); }
OL_INLINE I i_or(I a, I b) { return _mm512_or_si512(a, b); }
OL_INLINE I i_xor(I a, I b) { return _mm512_xor_si512(a, b); }
OL_INLINE I i_add(I a, I b) { return _mm512_add_epi32(a, b); }
OL_INLINE I i_sub(I a, I b) { return _mm512_sub_epi32(a, b); }
OL_INLINE I i_mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
OL_INLINE I i_srl16(I a, int n) { return _mm512_srl_epi16(a, _mm_cvtsi32_si128(n)); }
OL_INLINE I i_sll16(I a, int n) { return _mm512_sll_epi16(a, _mm_cvtsi32_si128(n)); }
OL_INLINE I i_srl32(I a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
OL_INLINE I i_sra32(I a, int n) { return _mm512_sra_epi32(a, _mm_cvtsi32_si128(n)); }
OL_INLINE I i_sll32(I a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
OL_INLINE I i_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
OL_INLINE I i_s8(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
OL_INLINE I i_u16(const uint16_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }

// acc + four products u8 * s8 per lane. i_dot takes codes up to 63, i_dot8 any u8; both are exact.
OL_INLINE I i_dot(I acc, I codes, I act) { return _mm512_dpbusd_epi32(acc, codes, act); }
OL_INLINE I i_dot8(I acc, I codes, I act) { return _mm512_dpbusd_epi32(acc, codes, act); }

// A run of dots from `start` on: s = i_dot_begin(start); s = i_dot_add(s, ..); ..; i_dot_end(s, start).
// AVX2 keeps 16-bit sums of two products in between: dots in a run * largest code <= 129, act never -128.
OL_INLINE I i_dot_begin(I start) { return start; }
OL_INLINE I i_dot_add(I sum, I codes, I act) { return _mm512_dpbusd_epi32(sum, codes, act); }
OL_INLINE I i_dot_end(I sum, I) { return sum; }

// Byte by byte, table[index % 16]: of an index six bits are read, which a table repeated four times does not mind.
OL_INLINE I i_lookup16(const uint8_t* table, I index) {
  return _mm512_permutexvar_epi8(index, _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)));
}

// Lane by lane, table[index % 16].
OL_INLINE F f_lookup16(const float* table, I index) { return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table)); }

OL_INLINE F f_bfdot(F acc, I w, I x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
