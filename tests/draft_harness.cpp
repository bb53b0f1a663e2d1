// C entry points to drafts.h, in the unit that test_drafting.py renders, for tests/test_drafting.py.
#include "drafts.cpp"

extern "C" {
int harness_look_up(const int32_t* history, int length, int count, int32_t* drafts) {
  return look_up(history, length, count, drafts);
}
int harness_adapted(int drafts, int guessed, int held, int most) { return adapted(drafts, guessed, held, most); }
}
