// C entry points to sample.h and rope.h for tests/test_sample.py.
#include "rope.h"
#include "units/sample.cpp"

extern "C" {
int harness_sample(float* logits, float* maxima, int vocab, const Sampling* how, const uint32_t* seen,
                   uint32_t position, void* scratch) {
  return sample(logits, maxima, vocab, *how, seen, position, scratch);
}
void harness_maxima(const float* logits, int vocab, float* maxima) {
  for (int i = 0; i < vocab; i += LOGIT_TILE) maxima[i / LOGIT_TILE] = tile_max(logits + i, std::min(32, vocab - i));
}
size_t harness_scratch_bytes(int vocab) { return sample_scratch_bytes(vocab); }
void harness_philox(uint32_t* counter, uint32_t key0, uint32_t key1) { philox4x32(counter, key0, key1); }
void harness_rope_angles(float* angles, const float* inv_freq, int d, int position, float factor) {
  rope_angles(angles, inv_freq, d, position, factor);
}
void harness_rope(float* x, const float* angles, int d) { rope(x, angles, d); }
void harness_head_norm(float* x, const float* weight, int d, float eps) { head_norm(x, weight, d, eps); }
}
