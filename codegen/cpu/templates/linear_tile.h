// What a step asks of a weight format; linear.h is how. Each format's kernels are a unit of their own
// (units/linear.cpp.j2).
#pragma once
#include "linear_act.h"

// One tile against R activation rows, packed by pack_act<Fmt::ACT>: y[m * ldy + 0..31].
// FETCH: bytes from a load of weights to the prefetch beside it.
template <class Fmt, int FETCH = OL_FETCH>
void tile(const uint8_t* w, int K, const uint8_t* act, int R, float* y, size_t ldy);

// Row `row` of a packed matrix as f32, exactly as formats.decode has it; K padded to 32.
template <class Fmt>
void decode_row(const uint8_t* packed, int K, int row, float* out);
