// Level 1 of simd.h: two ymm registers, `lo` for lanes 0-7 and `hi` for lanes 8-15.
#include <immintrin.h>

struct F {
  __m256 lo, hi;
};
struct I {
  __m256i lo, hi;
};

OL_INLINE F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
OL_INLINE void f_store(float* p, F a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
OL_INLINE void f_stream(float* p, F a) {
  _mm256_stream_ps(p, a.lo);
  _mm256_stream_ps(p + 8, a.hi);
}
OL_INLINE void f_stream_end() { _mm_sfence(); }
OL_INLINE F f_set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
OL_INLINE F f_add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
OL_INLINE F f_sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
OL_INLINE F f_mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
OL_INLINE F f_div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
OL_INLINE F f_fma(F a, F b, F c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
OL_INLINE F f_max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
OL_INLINE F f_min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
OL_INLINE F f_bits(I a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
OL_INLINE I i_bits(F a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }

// a > b ? x : y, lane by lane
OL_INLINE F f_gt_blend(F a, F b, F x, F y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))};
}

// Sum of the lanes, halving the vector each time: lane i + lane i+8, then i+4, i+2, i+1.
OL_INLINE float f_sum(F a) {
  __m256 h = _mm256_add_ps(a.lo, a.hi);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
OL_INLINE float f_hmax(F a) {
  __m256 h = _mm256_max_ps(a.lo, a.hi);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}

OL_INLINE F f_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
OL_INLINE float f_half_1(uint16_t h) { return _cvtsh_ss(h); }
OL_INLINE F f_from_i(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
OL_INLINE I f_round_i(F a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }

OL_INLINE I i_load(const void* p) {
  const __m256i* v = (const __m256i*)p;
  return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
}
OL_INLINE void i_store(void* p, I a) {
  _mm256_storeu_si256((__m256i*)p, a.lo);
  _mm256_storeu_si256((__m256i*)p + 1, a.hi);
}
// Lanes must already fit the narrow type.
OL_INLINE void i_store_u16(uint16_t* p, I a) {
  __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a.lo, a.hi), 0xd8);
  _mm256_storeu_si256((__m256i*)p, words);
}
OL_INLINE void i_store_s8(int8_t* p, I a) {
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128((__m128i*)p, bytes);
}
OL_INLINE I i_set1(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
OL_INLINE I i_and(I a, I b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
OL_INLINE I i_andnot(I a, I b) { return {_mm256_andnot_si256(a.lo, b.lo), _mm256_andnot_si256(a.hi, b.hi)}; }
OL_INLINE I i_or(I a, I b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
OL_INLINE I i_xor(I a, I b) { return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)}; }
OL_INLINE I i_gt(I a, I b) { return {_mm256_cmpgt_epi32(a.lo, b.lo), _mm256_cmpgt_epi32(a.hi, b.hi)}; }
OL_INLINE I i_add(I a, I b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
OL_INLINE I i_sub(I a, I b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
OL_INLINE I i_mul(I a, I b) { return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)}; }
OL_INLINE I i_srl16(I a, int n) { return {_mm256_srli_epi16(a.lo, n), _mm256_srli_epi16(a.hi, n)}; }
OL_INLINE I i_sll16(I a, int n) { return {_mm256_slli_epi16(a.lo, n), _mm256_slli_epi16(a.hi, n)}; }
OL_INLINE I i_srl32(I a, int n) { return {_mm256_srli_epi32(a.lo, n), _mm256_srli_epi32(a.hi, n)}; }
OL_INLINE I i_sra32(I a, int n) { return {_mm256_srai_epi32(a.lo, n), _mm256_srai_epi32(a.hi, n)}; }
OL_INLINE I i_sll32(I a, int n) { return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)}; }
OL_INLINE I i_u8(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
OL_INLINE I i_s8(const int8_t* p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
OL_INLINE I i_u16(const uint16_t* p) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8)))};
}

// A run of dots from `start` on: s = i_dot_begin(start); s = i_dot_add(s, ..); ..; i_dot_end(s, start).
// Sums of two products stay in 16 bits in between: dots in a run * largest code <= 129, act never -128.
OL_INLINE I i_dot_begin(I) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
OL_INLINE I i_dot_add(I sum, I codes, I act) {
  return {_mm256_add_epi16(sum.lo, _mm256_maddubs_epi16(codes.lo, act.lo)),
          _mm256_add_epi16(sum.hi, _mm256_maddubs_epi16(codes.hi, act.hi))};
}
OL_INLINE I i_dot_end(I sum, I start) {
  const __m256i one = _mm256_set1_epi16(1);
  return i_add(start, {_mm256_madd_epi16(sum.lo, one), _mm256_madd_epi16(sum.hi, one)});
}

// acc + four products u8 * s8 per lane. i_dot takes codes up to 63, i_dot8 any u8; both are exact.
OL_INLINE I i_dot(I acc, I codes, I act) { return i_dot_end(i_dot_add(i_dot_begin(acc), codes, act), acc); }

// Even and odd bytes apart, in 16 bits: one madd cannot overflow where maddubs would saturate.
OL_INLINE __m256i dot8_half(__m256i acc, __m256i codes, __m256i act) {
  __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)),
                                   _mm256_srai_epi16(_mm256_slli_epi16(act, 8), 8));
  __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(act, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
OL_INLINE I i_dot8(I acc, I codes, I act) {
  return {dot8_half(acc.lo, codes.lo, act.lo), dot8_half(acc.hi, codes.hi, act.hi)};
}

// Byte by byte, table[index % 16].
OL_INLINE I i_lookup16(const uint8_t* table, I index) {
  const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  index = i_and(index, i_set1(0x0f0f0f0f));
  return {_mm256_shuffle_epi8(both, index.lo), _mm256_shuffle_epi8(both, index.hi)};
}

// Lane by lane, table[index % 16]: both halves by three bits, the fourth says which.
OL_INLINE __m256 lookup16_half(const float* table, __m256i index) {
  __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
  __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
OL_INLINE F f_lookup16(const float* table, I index) {
  return {lookup16_half(table, index.lo), lookup16_half(table, index.hi)};
}
