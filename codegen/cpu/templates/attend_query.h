// What a step asks of attention; attend.h is how. The kernels of a cache type are a unit of their own
// (units/attend.cpp.j2).
#pragma once
#include "attend_partial.h"
#include "tuning.h"

constexpr int SPLIT_TOKENS = OL_SPLIT;
constexpr int AHEAD = OL_CACHE_FETCH;  // bytes between a load and the prefetch beside it

struct Query {
  const float* x;  // [head_dim], times softmax_scale * log2(e)
  float* partial;  // [partial_floats(head_dim)]
  int lo, hi;      // visible tokens lo..hi-1
  int sinks = 0;   // and 0..sinks-1 of the first page, before them: sinks <= lo
};

// Queries of any number, all of one slot and kv head, over splits split_begin..split_end-1, folded into
// their partials (which `begin` starts). With many rows a worker gives all splits of the context at once;
// with few rows one split per call, and whoever needs the row folds the partials later: the same bits.
template <class KV>
void attend_row_group(const KvHead& kv, const Query* queries, int n, int split_begin, int split_end);
