// Guesses of the tokens that follow, looked up in a slot's own tokens, and how many; `ir/drafting.py` has the rules.
#pragma once
#include "sample.h"

inline int least(int a, int b) { return a < b ? a : b; }

// history [length]: tokens by position. Writes `count` drafts and returns that, or 0 without a match.
int look_up(const int32_t* history, int length, int count, int32_t* drafts);

inline int adapted(int drafts, int guessed, int held, int most) {
  return guessed ? least(most, held == guessed ? 2 * drafts : held + 1) : drafts;
}

// As `penalise`, of drafts [n] that a row has before it: those not seen yet, each once.
void penalise_drafts(float* logits, float* maxima, int vocab, const uint32_t* seen, const int32_t* drafts, int n,
                     float penalty);
