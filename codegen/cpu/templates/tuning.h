// Numbers that may be chosen (ir/tuning.py). A unit defines those that were, before its headers.
#pragma once
#ifndef OL_FETCH
#define OL_FETCH 1024  // bytes from a load of weights to the prefetch beside it
#endif
#ifndef OL_CACHE_FETCH
#define OL_CACHE_FETCH 2048  // the same of keys and values
#endif
#ifndef OL_PANEL
#define OL_PANEL 0  // rows of a panel; 0: what suits the level
#endif
#ifndef OL_BLOCK
#define OL_BLOCK 32  // rows that meet a tile before the next is read
#endif
#ifndef OL_SPLIT
#define OL_SPLIT 256  // tokens of an attention split
#endif
