// The paged KV cache of one kv head: tile layout and append.
//
// A tile holds 64 tokens of one kv head, K part then V part, every element in a 32-bit lane:
//   KvBf16   K [dim/2][64 tokens][2]    V [32 token pairs][dim][2]     bf16
//   KvF32    K [dim][64 tokens]         V [64 tokens][dim]             f32
// dim = head_dim padded to 16. PAGE_RUN pages' tiles of a head lie together, so that a split is one stream.
// Slots not yet written must hold finite numbers: zero the cache once.
#pragma once
#include "simd.h"

constexpr int PAGE_TOKENS = 64, PAGE_RUN = 4, HEAD_DIM_MAX = 256;

struct KvBf16 {
  static constexpr int per_lane = 2;
  OL_INLINE F mac(F acc, I cache, I x) { return f_bfdot(acc, x, cache); }
  // Write 16 values at element i of `x`; returns them as they were rounded.
  OL_INLINE F put(uint32_t* x, int i, F v) {
    uint16_t* at = (uint16_t*)x + i;
    f_to_bf16(at, v);
    return f_bf16(at);
  }
};

struct KvF32 {
  static constexpr int per_lane = 1;
  OL_INLINE F mac(F acc, I cache, I x) { return f_fma(f_bits(cache), f_bits(x), acc); }
  OL_INLINE F put(uint32_t* x, int i, F v) {
    f_store((float*)x + i, v);
    return v;
  }
};

// One kv head's cache as one sequence sees it.
struct KvHead {
  const uint8_t* base;     // tile of page 0
  const int32_t* pages;    // page of token t: pages[t / 64]
  size_t run_stride;       // bytes from one run of PAGE_RUN pages' tiles to the next
  int head_dim;
  float soft_cap;          // logits become cap * tanh(logit / cap); 0: off
  const uint8_t* after;    // what this worker reads next, for the last prefetches; may be null
};

inline int padded_dim(int head_dim) { return (head_dim + 15) / 16 * 16; }

template <class KV>
size_t kv_tile_bytes(int head_dim) { return size_t(2 * PAGE_TOKENS * 4 / KV::per_lane) * padded_dim(head_dim); }

// Where a page's tile lies behind the tile of page 0 of the same head.
template <class KV>
size_t kv_page_offset(int page, size_t run_stride, int head_dim) {
  return run_stride * size_t(page / PAGE_RUN) + kv_tile_bytes<KV>(head_dim) * size_t(page % PAGE_RUN);
}

template <class KV>
const uint8_t* kv_page(const KvHead& kv, int page) {
  return kv.base + kv_page_offset<KV>(kv.pages[page], kv.run_stride, kv.head_dim);
}

// Values to lanes of the cache's type, zeros up to the padded dim.
template <class KV>
void to_lanes(const float* x, int head_dim, uint32_t* lanes) {
  const int whole = head_dim / 16 * 16;
  for (int d = 0; d < whole; d += 16) KV::put(lanes, d, f_load(x + d));
  if (whole == head_dim) return;
  float padded[16] = {};
  std::memcpy(padded, x + whole, sizeof(float) * (head_dim - whole));
  KV::put(lanes, whole, f_load(padded));
}

// K [dim/per_lane][64 tokens]: one lane per row.
template <class KV>
void append_k(uint8_t* tile, int token_in_page, const float* k, int head_dim) {
  uint32_t lanes[HEAD_DIM_MAX];
  to_lanes<KV>(k, head_dim, lanes);
  uint32_t* slot = (uint32_t*)tile + token_in_page;
  for (int i = 0; i < padded_dim(head_dim) / KV::per_lane; ++i) slot[PAGE_TOKENS * i] = lanes[i];
}

// V [64/per_lane][dim]: one row, or every second bf16 of it; the neighbour may be another worker's token.
template <class KV>
void append_v(uint8_t* tile, int token_in_page, const float* v, int head_dim) {
  uint32_t lanes[HEAD_DIM_MAX];
  to_lanes<KV>(v, head_dim, lanes);
  const int dim = padded_dim(head_dim), row = token_in_page / KV::per_lane;
  uint8_t* slot = tile + kv_tile_bytes<KV>(head_dim) / 2 + size_t(4) * dim * row;
  constexpr int size = 4 / KV::per_lane;  // bytes of one element
  slot += size * (token_in_page % KV::per_lane);
  for (int d = 0; d < dim; ++d) std::memcpy(slot + 4 * d, (uint8_t*)lanes + size * d, size);
}
