// Numbers that may be chosen (ir/tuning.py); the step defines them before its headers, harnesses of tests do not.
#pragma once
#ifndef OL_FETCH
#define OL_FETCH 1024  // bytes from a load of weights to the prefetch beside it
#define OL_CACHE_FETCH 2048
#define OL_PANEL 0  // rows of a panel; 0: what suits the level
#define OL_BLOCK 32
#define OL_SPLIT 256
#endif
