// Mixtures of experts: from router logits to gates, from gates to the rows of each expert, and their panels.
#pragma once
#include "activations.h"

// ---- routers: one row of n values, padded to whole vectors ------------------------------------------

inline void softmax_row(const float* x, int n, float* out) {
  float top = x[0];
  for (int i = 1; i < n; ++i) top = x[i] > top ? x[i] : top;
  F sum = f_zero();
  for (int i = 0; i < n; i += 16) {
    F e = f_exp2(f_mul(f_sub(f_load_part(x + i, n - i), f_set1(top)), f_set1(LOG2E)));
    f_store(out + i, e);
    sum = f_add(sum, f_load_part(out + i, n - i));
  }
  const F total = f_set1(f_sum(sum));
  for (int i = 0; i < n; i += 16) f_store(out + i, f_div(f_load(out + i), total));
}

// The `k` largest of x in falling order, of equal ones the first; `best` and `at` hold k.
inline void largest(const float* x, int n, int k, float* best, int* at) {
  int count = 0;
  for (int i = 0; i < n; ++i) {
    if (count == k && !(x[i] > best[k - 1])) continue;
    int place = count < k ? count++ : k - 1;
    for (; place > 0 && x[i] > best[place - 1]; --place) best[place] = best[place - 1], at[place] = at[place - 1];
    best[place] = x[i], at[place] = i;
  }
}

template <int K>
void top_k_row(const float* x, const float* order, int n, float* out) {
  float best[K];
  int at[K];
  largest(order, n, K, best, at);
  float kept[K];  // `out` may be `x`
  for (int j = 0; j < K; ++j) kept[j] = x[at[j]];
  for (int i = 0; i < n; i += 16) f_store(out + i, f_zero());
  for (int j = 0; j < K; ++j) out[at[j]] = kept[j];
}

template <int GROUPS, int KEEP, int BEST>
void group_limit_row(const float* x, int n, float* out) {
  const int size = n / GROUPS;
  float score[GROUPS], best[BEST > KEEP ? BEST : KEEP];
  int at[BEST > KEEP ? BEST : KEEP];
  for (int g = 0; g < GROUPS; ++g) {
    largest(x + g * size, size, BEST, best, at);
    score[g] = best[0];
    for (int i = 1; i < BEST; ++i) score[g] += best[i];
  }
  largest(score, GROUPS, KEEP, best, at);
  bool kept[GROUPS] = {};
  for (int i = 0; i < KEEP; ++i) kept[at[i]] = true;
  for (int i = 0; i < n; ++i) out[i] = kept[i / size] ? x[i] : -__builtin_inff();
}

inline void normalize_row(const float* x, int n, float eps, float* out) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += x[i];
  for (int i = 0; i < n; ++i) out[i] = x[i] == 0 ? 0 : x[i] / (sum + eps);
}

// ---- the rows of each active expert -----------------------------------------------------------------

struct Assignment {
  int row, slot;  // the expert is the row's slot-th
  float gate;
};

// Assignments first[i] .. first[i + 1] - 1 are of expert[i], in order of rows; experts in order of their numbers.
template <int MAX_ROWS, int EXPERTS, int CHOICES>
struct Routes {
  int active = 0, expert[EXPERTS], first[EXPERTS + 1];
  Assignment list[MAX_ROWS * CHOICES];

  Routes(const float* gates, size_t stride, int rows) {
    int count[EXPERTS] = {};
    each(gates, stride, rows, [&](int e, Assignment) { ++count[e]; });
    int total = 0;
    for (int e = 0; e < EXPERTS; ++e)
      if (count[e]) {
        expert[active] = e, first[active++] = total;
        const int mine = count[e];
        count[e] = total;  // from here on: where the next one goes
        total += mine;
      }
    first[active] = total;
    each(gates, stride, rows, [&](int e, Assignment a) { list[count[e]++] = a; });
  }

  // Each row's experts in order, [rows][CHOICES], -1 beyond them: for the host to look at.
  void note(int32_t* out, int rows) const {
    for (int i = 0; i < rows * CHOICES; ++i) out[i] = -1;
    for (int i = 0; i < active; ++i)
      for (int a = first[i]; a < first[i + 1]; ++a) out[list[a].row * CHOICES + list[a].slot] = expert[i];
  }

 private:
  template <class Use>
  static void each(const float* gates, size_t stride, int rows, Use use) {
    for (int row = 0; row < rows; ++row, gates += stride)
      for (int e = 0, slot = 0; e < EXPERTS && slot < CHOICES; ++e)
        if (gates[e] != 0) use(e, Assignment{row, slot++, gates[e]});
  }
};

// Where the share of drain `worker` of `workers` starts: each has a run of neighbours, that it reads as one stream.
inline int share_of(int tiles, int worker, int workers) { return int(int64_t(tiles) * worker / workers); }

// ---- panels -----------------------------------------------------------------------------------------

// M panels of one row as one of M rows: every piece of a panel is [word][row] of four bytes.
template <int M>
void interleave(const uint32_t* const* rows, int words, uint32_t* out) {
  for (int i = 0; i < words; ++i)
    for (int m = 0; m < M; ++m) out[size_t(i) * M + m] = rows[m][i];
}

template <int M = PANEL_MAX>
void interleave_some(int count, const uint32_t* const* rows, int words, uint32_t* out) {
  if (count == M) return interleave<M>(rows, words, out);
  if constexpr (M > 1) interleave_some<M - 1>(count, rows, words, out);
}

// The panels of `count` assignments, as `tile` takes them; `index` says which row of `panels` is an assignment's.
template <class Index>
const uint8_t* gather(const uint8_t* panels, size_t row_bytes, const Assignment* list, int count, Index index,
                      uint8_t* out) {
  if (count == 1) return panels + index(*list) * row_bytes;
  const int words = int(row_bytes / 4);
  for (int r = 0, n; r < count; r += n) {
    n = panel_rows(count, r);
    const uint32_t* rows[PANEL_MAX];
    for (int m = 0; m < n; ++m) rows[m] = (const uint32_t*)(panels + index(list[r + m]) * row_bytes);
    interleave_some(n, rows, words, (uint32_t*)(out + r * row_bytes));
  }
  return out;
}
