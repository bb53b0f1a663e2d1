// Guesses of the tokens that follow, looked up in a slot's own tokens, and how many; `ir/drafting.py` has the rules.
#pragma once
#include <algorithm>
#include <cstdint>

#include "sample.h"

// A place among the tokens before the last, as a number: more shared tokens are larger, then a later place, in the
// low MATCH_BITS.
// Fewer than `shortest` shared tokens: -1.
template <int LONGEST, int MATCH_BITS>
inline int32_t match_at(const int32_t* history, int end, int place, int shortest) {
  int32_t shared = 0, same = 1;
  for (int n = 0; n < LONGEST; ++n) {
    same &= history[place - n] == history[end - n];
    shared += same;
  }
  return shared >= shortest ? (shared << MATCH_BITS) | place : -1;
}

// history [length]: tokens by position. Writes `count` drafts and returns that, or 0 without a match.
template <int SHORTEST, int LONGEST, int MATCH_BITS>
int look_up(const int32_t* history, int length, int count, int32_t* drafts) {
  const int end = length - 1;
  if (count < 1) return 0;
  int32_t best = -1;
  for (int place = std::max(LONGEST - 1, 0); place < end; ++place)
    best = std::max(best, match_at<LONGEST, MATCH_BITS>(history, end, place, SHORTEST));
  // The first places have fewer tokens before them.
  for (int place = SHORTEST - 1; place < std::min(LONGEST - 1, end); ++place) {
    int32_t shared = 0;
    while (shared <= place && history[place - shared] == history[end - shared]) ++shared;
    if (shared >= SHORTEST) best = std::max(best, (shared << MATCH_BITS) | place);
  }
  if (best < 0) return 0;
  const int place = best & ((1 << MATCH_BITS) - 1), period = end - place;
  for (int i = 0; i < count; ++i) drafts[i] = history[place + 1 + i % period];
  return count;
}

inline int adapted(int drafts, int guessed, int held, int most) {
  return guessed ? std::min(most, held == guessed ? 2 * drafts : held + 1) : drafts;
}

// As `penalise`, of drafts [n] that a row has before it: those not seen yet, each once.
inline void penalise_drafts(float* logits, float* maxima, int vocab, const uint32_t* seen, const int32_t* drafts, int n,
                            float penalty) {
  for (int i = 0; i < n; ++i) {
    const int token = drafts[i], tile = token / LOGIT_TILE;
    if (seen[tile] >> (token % LOGIT_TILE) & 1 || std::find(drafts, drafts + i, token) != drafts + i) continue;
    float& logit = logits[token];
    logit = logit > 0 ? logit / penalty : logit * penalty;
    maxima[tile] = tile_max(logits + tile * LOGIT_TILE, std::min(LOGIT_TILE, vocab - tile * LOGIT_TILE));
  }
}
