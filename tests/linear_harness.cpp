// linear.h with C linkage: one set of entry points per weight format. K is padded to 32.
#include "linear.h"

template <class Fmt>
static void linear(const uint8_t* packed, int N, int K, const float* x, int Kx, int R, uint8_t* act, float* y) {
  pack_act<Fmt::ACT>(x, Kx, Kx, R, act);
  const int ldy = (N + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
  for (int n = 0; n < N; n += TILE_ROWS)
    tile<Fmt>(packed + n / TILE_ROWS * tile_bytes<Fmt>(K), K, act, R, y + n, ldy);
}

#define FORMAT(name, Fmt)                                                                                    \
  extern "C" void linear_##name(const uint8_t* packed, int N, int K, const float* x, int Kx, int R,          \
                                uint8_t* act, float* y) {                                                    \
    linear<Fmt>(packed, N, K, x, Kx, R, act, y);                                                             \
  }                                                                                                          \
  extern "C" void decode_row_##name(const uint8_t* packed, int K, int row, float* out) {                     \
    decode_row<Fmt>(packed, K, row, out);                                                                    \
  }                                                                                                          \
  extern "C" size_t tile_bytes_##name(int K) { return tile_bytes<Fmt>(K); }

FORMAT(f32, F32)
FORMAT(f16, F16)
FORMAT(bf16, BF16)
FORMAT(q4_0, Q4_0)
FORMAT(q4_1, Q4_1)
FORMAT(q5_0, Q5_0)
FORMAT(q8_0, Q8_0)
FORMAT(mxfp4, MXFP4)
FORMAT(q4_k, Q4_K)
FORMAT(q5_k, Q5_K)
FORMAT(q6_k, Q6_K)
FORMAT(q5_1, Q5_1)
FORMAT(q2_k, Q2_K)
FORMAT(q3_k, Q3_K)
FORMAT(iq4_nl, IQ4_NL)
FORMAT(iq4_xs, IQ4_XS)
FORMAT(nvfp4, NVFP4)
FORMAT(int4, INT4)
FORMAT(int4_z, INT4_Z)
FORMAT(int4_bz, INT4_BZ)
FORMAT(int8, INT8)
FORMAT(fp8, FP8)
FORMAT(fp8_128, FP8_128)
FORMAT(fp8_32, FP8_32)
FORMAT(mxfp8, MXFP8)
FORMAT(nf4, NF4)

extern "C" void quantise_row(const float* x, int K, uint8_t* panel) { pack_q8(x, K, K, pad_k(K), 1, panel); }

extern "C" void rms_norm(const float* x, const float* weight, int K, float eps, float* out) {
  rms_norm_row(x, weight, K, eps, out);
}

extern "C" void exp2_16(const float* x, float* out) { f_store(out, f_exp2(f_load(x))); }

extern "C" void fma_16(const float* a, const float* b, const float* c, float* out) {
  f_store(out, f_fma(f_load(a), f_load(b), f_load(c)));
}
