// C entry points to drafts.h for tests/test_drafting.py.
#include "drafts.h"

extern "C" {
int harness_look_up(const int32_t* history, int length, int count, int32_t* drafts) {
  return look_up<RUN_FROM, RUN_TO, RUN_BITS>(history, length, count, drafts);
}
int harness_adapted(int drafts, int guessed, int held, int most) { return adapted(drafts, guessed, held, most); }
}
