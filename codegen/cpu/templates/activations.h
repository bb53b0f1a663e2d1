// Pointwise functions over 16 lanes, and how rows are cut into panels.
#pragma once
#include "attend_query.h"
#include "linear_tile.h"

inline F silu(F x) {  // x / (1 + e^-x), through e^-|x| so that nothing overflows
  F e = f_exp2(f_mul(f_abs(x), f_set1(-LOG2E)));
  F up = f_div(x, f_add(f_set1(1.0f), e));
  return f_gt_blend(x, f_zero(), up, f_mul(up, e));
}

inline F sigmoid(F x) {
  F e = f_exp2(f_mul(f_abs(x), f_set1(-LOG2E)));
  F up = f_div(f_set1(1.0f), f_add(f_set1(1.0f), e));
  return f_gt_blend(x, f_zero(), up, f_mul(up, e));
}

inline F tanh16(F x) {  // sign(x) (1 - e) / (1 + e), e = e^-2|x|
  F e = f_exp2(f_mul(f_abs(x), f_set1(-2.0f * LOG2E)));
  F t = f_div(f_sub(f_set1(1.0f), e), f_add(f_set1(1.0f), e));
  return f_gt_blend(x, f_zero(), t, f_neg(t));
}

inline F gelu_tanh(F x) {
  F inner = f_mul(f_set1(0.7978845608028654f), f_fma(f_mul(f_mul(x, x), x), f_set1(0.044715f), x));
  return f_mul(f_mul(f_set1(0.5f), x), f_add(f_set1(1.0f), tanh16(inner)));
}

inline F softcap(F x, float cap) { return f_mul(f_set1(cap), tanh16(f_div(x, f_set1(cap)))); }

// Rows go through the matrices in blocks, so that a tile's weights are used from the L1 cache.
constexpr int BLOCK_ROWS = OL_BLOCK, BLOCK_PANELS = BLOCK_ROWS / PANEL_BODY;
static_assert(BLOCK_ROWS % PANEL_BODY == 0 && BLOCK_ROWS > PANEL_MAX, "tuning: a block must be whole panels");

inline int block_panels(int rows) {
  return rows <= PANEL_MAX ? (rows > 0) : (rows + PANEL_BODY - 1) / PANEL_BODY;
}

inline int panel_count(int rows) {
  return rows / BLOCK_ROWS * BLOCK_PANELS + block_panels(rows % BLOCK_ROWS);
}

struct PanelRows {
  int first, count;
};

inline PanelRows panel_at(int panel, int rows) {
  const int block = panel / BLOCK_PANELS * BLOCK_ROWS, in_block = panel % BLOCK_PANELS * PANEL_BODY;
  const int left = rows - block < BLOCK_ROWS ? rows - block : BLOCK_ROWS;
  return {block + in_block, panel_rows(left, in_block)};
}

template <Act ACT>
void pack_panel(const float* x, size_t ldx, int K, int rows, uint8_t* panel) {
  if (ACT == Act::Q8) pack_q8(x, ldx, K, pad_k(K), rows, panel);
  if (ACT == Act::BF16) pack_bf16(x, ldx, K, pad_k(K), rows, panel);
  if (ACT == Act::F32) pack_f32(x, ldx, K, pad_k(K), rows, panel);
}

// One head's finished attention of a row, from the partials of its splits (or from the one already folded).
inline void combine_head(const float* partials, int splits, int position, int window, int head_dim, float* out,
                         const float* sink = nullptr) {
  const int lo = window && position >= window ? position - window + 1 : 0;
  const int count = splits == 1 ? 1 : (position + SPLIT_TOKENS) / SPLIT_TOKENS - lo / SPLIT_TOKENS;
  alignas(64) float total[PARTIAL_O + HEAD_DIM_MAX];
  begin(total, head_dim);
  for (int i = 0; i < count; ++i) fold(total, partials + size_t(i) * partial_floats(head_dim), head_dim);
  if (sink) add_sink(total, *sink, head_dim);
  finish(out, total, head_dim);
}
