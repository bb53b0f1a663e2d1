// Level 0 of simd.h: GCC / clang vector extensions and nothing else, for any machine they compile for.
#pragma GCC diagnostic ignored "-Wpsabi"  // 64-byte vectors are passed only between inlined functions

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(64)));
typedef int16_t S16 __attribute__((vector_size(64)));
typedef double D __attribute__((vector_size(128)));
typedef int64_t L __attribute__((vector_size(128)));
typedef uint16_t Half16 __attribute__((vector_size(32)));
typedef uint8_t Byte16 __attribute__((vector_size(16)));
typedef int8_t SByte16 __attribute__((vector_size(16)));

template <class V>
OL_INLINE V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

OL_INLINE F f_load(const float* p) { return load_as<F>(p); }
OL_INLINE void f_store(float* p, F a) { std::memcpy(p, &a, sizeof a); }
OL_INLINE void f_stream(float* p, F a) { f_store(p, a); }
OL_INLINE void f_stream_end() {}
OL_INLINE I i_set1(int32_t a) { return I{a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a}; }
OL_INLINE F f_set1(float a) { return F{a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a}; }
OL_INLINE F f_add(F a, F b) { return a + b; }
OL_INLINE F f_sub(F a, F b) { return a - b; }
OL_INLINE F f_mul(F a, F b) { return a * b; }
OL_INLINE F f_div(F a, F b) { return a / b; }
OL_INLINE F f_bits(I a) { return (F)a; }
OL_INLINE I i_bits(F a) { return (I)a; }

// One rounding, as on the other levels. The product is exact in f64; the sum is rounded to odd there (its
// last bit says whether anything was lost), after which rounding to f32 gives the correct result.
OL_INLINE F f_fma(F a, F b, F c) {
  D product = __builtin_convertvector(a, D) * __builtin_convertvector(b, D);
  D addend = __builtin_convertvector(c, D);
  D sum = product + addend, part = sum - product;
  D lost = (product - (sum - part)) + (addend - part);
  L bits = (L)sum, away = (bits ^ (L)lost) < 0;  // all ones where the sum is too large in magnitude
  L inexact = ((lost > 0.0) | (lost < 0.0)) & (1 - (bits & 1));
  return __builtin_convertvector((D)(bits + ((inexact ^ away) - away)), F);
}

// a > b ? x : y, lane by lane
OL_INLINE F f_gt_blend(F a, F b, F x, F y) {
  I mask = a > b;
  return (F)(((I)x & mask) | ((I)y & ~mask));
}
// The second operand if either is a NaN, as x86 has it.
OL_INLINE F f_max(F a, F b) { return f_gt_blend(a, b, a, b); }
OL_INLINE F f_min(F a, F b) { return f_gt_blend(b, a, a, b); }

// Sum of the lanes, halving the vector each time: lane i + lane i+8, then i+4, i+2, i+1.
OL_INLINE float f_sum(F a) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a[i] += a[i + half];
  return a[0];
}
OL_INLINE float f_hmax(F a) {
  float best = a[0];
  for (int i = 1; i < 16; ++i) best = a[i] > best ? a[i] : best;
  return best;
}

OL_INLINE F f_from_i(I a) { return __builtin_convertvector(a, F); }

// Nearest even: adding 2^23 leaves no room for a fraction; from 2^23 on there is none.
OL_INLINE I f_round_i(F a) {
  const F magic = (F)(((I)a & INT32_MIN) | (I)f_set1(8388608.0f));
  const F whole = (a + magic) - magic;
  const I small = (a < 8388608.0f) & (a > -8388608.0f);
  return __builtin_convertvector((F)((small & (I)whole) | (~small & (I)a)), I);
}

// f16 bits in the low half of each lane. Rescaling by 2^112 makes normals and subnormals right at once.
OL_INLINE F half_bits(U32 h) {
  U32 magnitude = (h & 0x7fffu) << 13;
  U32 finite = (U32)((F)magnitude * f_set1(0x1p112f));
  U32 special = (U32)(magnitude >= 0x0f800000u) & (magnitude | 0x7f800000u);  // infinity and NaN
  return (F)(finite | special | (h & 0x8000u) << 16);
}
OL_INLINE F f_half(const uint16_t* p) { return half_bits(__builtin_convertvector(load_as<Half16>(p), U32)); }
OL_INLINE float f_half_1(uint16_t h) { return half_bits((U32)i_set1(h))[0]; }

OL_INLINE I i_load(const void* p) { return load_as<I>(p); }
OL_INLINE void i_store(void* p, I a) { std::memcpy(p, &a, sizeof a); }
// Lanes must already fit the narrow type.
OL_INLINE void i_store_u16(uint16_t* p, I a) {
  Half16 words = __builtin_convertvector(a, Half16);
  std::memcpy(p, &words, sizeof words);
}
OL_INLINE void i_store_s8(int8_t* p, I a) {
  SByte16 bytes = __builtin_convertvector(a, SByte16);
  std::memcpy(p, &bytes, sizeof bytes);
}
OL_INLINE I i_and(I a, I b) { return a & b; }
OL_INLINE I i_andnot(I a, I b) { return ~a & b; }
OL_INLINE I i_or(I a, I b) { return a | b; }
OL_INLINE I i_xor(I a, I b) { return a ^ b; }
OL_INLINE I i_gt(I a, I b) { return a > b; }
OL_INLINE I i_add(I a, I b) { return (I)((U32)a + (U32)b); }
OL_INLINE I i_sub(I a, I b) { return (I)((U32)a - (U32)b); }
OL_INLINE I i_mul(I a, I b) { return (I)((U32)a * (U32)b); }
OL_INLINE I i_srl16(I a, int n) { return (I)((U16)a >> n); }
OL_INLINE I i_sll16(I a, int n) { return (I)((U16)a << n); }
OL_INLINE I i_srl32(I a, int n) { return (I)((U32)a >> n); }
OL_INLINE I i_sra32(I a, int n) { return a >> n; }
OL_INLINE I i_sll32(I a, int n) { return (I)((U32)a << n); }
OL_INLINE I i_u8(const uint8_t* p) { return __builtin_convertvector(load_as<Byte16>(p), I); }
OL_INLINE I i_s8(const int8_t* p) { return __builtin_convertvector(load_as<SByte16>(p), I); }
OL_INLINE I i_u16(const uint16_t* p) { return __builtin_convertvector(load_as<Half16>(p), I); }

// Sums of the two i16 in each lane.
OL_INLINE I pair_sum(S16 p) { return i_add(i_sra32((I)p, 16), i_sra32(i_sll32((I)p, 16), 16)); }

// acc + four products u8 * s8 per lane. i_dot takes codes up to 63, i_dot8 any u8; both are exact:
// one product fits i16, and two do when the codes are small.
OL_INLINE S16 even_products(I codes, I act) { return (S16)((U16)codes & 255) * ((S16)i_sll16(act, 8) >> 8); }
OL_INLINE S16 odd_products(I codes, I act) { return (S16)((U16)codes >> 8) * ((S16)act >> 8); }
OL_INLINE I i_dot(I acc, I codes, I act) {
  return i_add(acc, pair_sum(even_products(codes, act) + odd_products(codes, act)));
}
OL_INLINE I i_dot8(I acc, I codes, I act) {
  return i_add(acc, i_add(pair_sum(even_products(codes, act)), pair_sum(odd_products(codes, act))));
}

// A run of dots from `start` on: s = i_dot_begin(start); s = i_dot_add(s, ..); ..; i_dot_end(s, start).
// AVX2 keeps 16-bit sums of two products in between: dots in a run * largest code <= 129, act never -128.
OL_INLINE I i_dot_begin(I start) { return start; }
OL_INLINE I i_dot_add(I sum, I codes, I act) { return i_dot(sum, codes, act); }
OL_INLINE I i_dot_end(I sum, I) { return sum; }

// Byte by byte, table[index % 16].
OL_INLINE I i_lookup16(const uint8_t* table, I index) {
  uint8_t bytes[64];
  i_store(bytes, index);
  for (uint8_t& b : bytes) b = table[b % 16];
  return i_load(bytes);
}

// Lane by lane, table[index % 16].
OL_INLINE F f_lookup16(const float* table, I index) {
  F found;
  for (int i = 0; i < 16; ++i) found[i] = table[index[i] & 15];
  return found;
}
