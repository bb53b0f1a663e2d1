// How sample.h does it.
#include "sample.h"

#include <algorithm>
#include <functional>

constexpr float WEIGHT_ONE = 1073741824.0f;  // weight of the best token

inline void philox4x32(uint32_t counter[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    const uint64_t a = uint64_t(0xD2511F53u) * counter[0], b = uint64_t(0xCD9E8D57u) * counter[2];
    const uint32_t next[4] = {uint32_t(b >> 32) ^ counter[1] ^ key0, uint32_t(b),
                              uint32_t(a >> 32) ^ counter[3] ^ key1, uint32_t(a)};
    std::memcpy(counter, next, sizeof next);
  }
}

inline uint64_t uniform_bits(uint64_t seed, uint32_t position, uint32_t stream) {
  uint32_t words[4] = {position, stream, 0, 0};
  philox4x32(words, uint32_t(seed), uint32_t(seed >> 32));
  return uint64_t(words[1]) << 32 | words[0];
}

// Scale seen tokens' logits and renew the maxima of their tiles. seen: one bit per token, a word per tile.
inline void penalise(float* logits, float* maxima, int vocab, const uint32_t* seen, float penalty) {
  for (int tile = 0; tile * LOGIT_TILE < vocab; ++tile) {
    if (!seen[tile]) continue;
    float* x = logits + tile * LOGIT_TILE;
    for (uint32_t left = seen[tile]; left; left &= left - 1) {
      float& logit = x[__builtin_ctz(left)];
      logit = logit > 0 ? logit / penalty : logit * penalty;
    }
    maxima[tile] = tile_max(x, std::min(LOGIT_TILE, vocab - tile * LOGIT_TILE));
  }
}

float largest(const float* x, int n) {
  F top = f_set1(x[0]), bad = f_zero();
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    F v = f_load(x + i);
    top = f_max(top, v);
    bad = f_add(bad, nan_lanes(v));
  }
  const float rest = i < n ? tile_max(x + i, n - i) : x[0];
  return rest != rest ? rest : std::max(f_hmax(top), rest) + f_sum(bad);
}

// Rank as a number: the larger logit is larger, then the lower index. Adding 0 makes -0 and 0 equal.
inline uint64_t rank_key(float logit, int index) {
  uint32_t bits;
  logit += 0.0f;
  std::memcpy(&bits, &logit, sizeof bits);
  bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
  return uint64_t(bits) << 32 | uint32_t(~index);
}

inline float key_logit(uint64_t key) {
  uint32_t bits = uint32_t(key >> 32);
  bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
  float logit;
  std::memcpy(&logit, &bits, sizeof logit);
  return logit;
}

inline size_t sample_scratch_bytes(int vocab) {
  const size_t blocks = vocab / LOGIT_BLOCK + 1, tiles = blocks * (LOGIT_BLOCK / LOGIT_TILE);
  return sizeof(uint64_t) * (vocab + blocks) + sizeof(float) * tiles;
}

// Steps 3-5 for one row whose largest logit is known.
struct Draw {
  const float *logits, *maxima;
  int vocab;
  float top, scale;      // weight = 2^30 * 2^((logit - top) * scale)
  uint64_t *keys, *mass;  // scratch: rank keys of candidates [vocab], weight of each block of 256
  float* sorted;          // scratch: maxima, partly sorted
  float min_weight = 0, cut_logit = -INFINITY;
  int cut_index = INT32_MAX;  // the last kept token by rank, and its logit

  Draw(const float* logits, const float* maxima, int vocab, float top, float temperature, void* scratch)
      : logits(logits), maxima(maxima), vocab(vocab), top(top), scale(float(1.4426950408889634 / double(temperature))) {
    keys = (uint64_t*)scratch, mass = keys + vocab, sorted = (float*)(mass + blocks());
  }

  int tiles() const { return (vocab + LOGIT_TILE - 1) / LOGIT_TILE; }
  int blocks() const { return (vocab + LOGIT_BLOCK - 1) / LOGIT_BLOCK; }

  OL_METHOD I weigh(F logit) const {
    F w = f_exp2(f_mul(f_sub(logit, f_set1(top)), f_set1(scale)));
    return f_round_i(f_mul(w, f_set1(WEIGHT_ONE)));
  }

  // 0 for the tokens from `first` that are not kept.
  OL_METHOD I filter(int first, F logit, I weight) const {
    static const float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    F w = f_from_i(weight), cut = f_set1(cut_logit);  // a weight is a whole f32 number
    w = f_gt_blend(f_set1(min_weight), w, f_zero(), w);
    F index = f_add(f_load(lanes), f_set1(float(first)));  // exact below 2^24
    F tied = f_gt_blend(index, f_set1(float(cut_index)), f_zero(), w);
    return f_round_i(f_gt_blend(logit, cut, w, f_gt_blend(cut, logit, f_zero(), tied)));
  }

  // Kept weights of the 16 tokens from `first`.
  OL_METHOD I kept(int first) const {
    float padded[16];
    const float* at = logits + first;
    if (first + 16 > vocab) {
      for (int i = 0; i < 16; ++i) padded[i] = first + i < vocab ? at[i] : -INFINITY;
      at = padded;
    }
    F logit = f_load(at);
    I weight = weigh(logit);
    return min_weight > 0 || cut_logit > -INFINITY ? filter(first, logit, weight) : weight;
  }

  // Kept weight of one block. Lanes add 16-bit halves, which stay exact even after the conversion to f32.
  uint64_t block_mass(int block) const {
    I low = i_zero(), high = i_zero();
    for (int at = block * LOGIT_BLOCK; at < std::min(vocab, (block + 1) * LOGIT_BLOCK); at += LOGIT_TILE) {
      if (maxima[at / LOGIT_TILE] < cut_logit) continue;
      for (int half = 0; half < LOGIT_TILE; half += 16) {
        I w = kept(at + half);
        low = i_add(low, i_and(w, i_set1(0xffff)));
        high = i_add(high, i_srl32(w, 16));
      }
    }
    return (uint64_t(f_sum(f_from_i(high))) << 16) + uint64_t(f_sum(f_from_i(low)));
  }

  uint64_t total() {
    uint64_t sum = 0;
    for (int block = 0; block < blocks(); ++block) sum += mass[block] = block_mass(block);
    return sum;
  }

  // Keys of the tokens with lo <= logit < hi.
  size_t gather(float lo, float hi) {
    size_t n = 0;
    for (int tile = 0; tile < tiles(); ++tile) {
      if (maxima[tile] < lo) continue;
      for (int i = tile * LOGIT_TILE; i < std::min(vocab, (tile + 1) * LOGIT_TILE); ++i)
        if (logits[i] >= lo && logits[i] < hi) keys[n++] = rank_key(logits[i], i);
    }
    return n;
  }

  // Put the keys of the first `count` ranks first. As many tiles as that have a token not below the
  // count-th largest maximum, so only tokens from there on can be among them.
  void gather_ranks(int count) {
    std::copy(maxima, maxima + tiles(), sorted);
    if (count < tiles()) std::nth_element(sorted, sorted + count - 1, sorted + tiles(), std::greater<float>());
    const size_t n = gather(count < tiles() ? sorted[count - 1] : -INFINITY, INFINITY);
    std::nth_element(keys, keys + count - 1, keys + n, std::greater<uint64_t>());
  }

  uint64_t weight_of(const uint64_t* key, size_t n) const {
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i += 16) {
      const size_t count = std::min<size_t>(16, n - i);
      float x[16] = {};
      int32_t w[16];
      for (size_t j = 0; j < count; ++j) x[j] = key_logit(key[i + j]);
      i_store(w, weigh(f_load(x)));
      for (size_t j = 0; j < count; ++j) sum += uint32_t(w[j]);
    }
    return sum;
  }

  // How many of the first ranks hold `goal` of the weight; puts them first. The n keys hold at least `goal`.
  size_t shortest(size_t n, uint64_t goal) {
    size_t lo = 0, hi = n;
    for (uint64_t below = 0; hi - lo > 1;) {
      const size_t middle = (lo + hi) / 2;
      std::nth_element(keys + lo, keys + middle, keys + hi, std::greater<uint64_t>());
      const uint64_t half = weight_of(keys + lo, middle - lo);
      if (below + half >= goal) hi = middle;
      else below += half, lo = middle;
    }
    return hi;
  }

  static uint64_t share(float top_p, uint64_t weight) { return uint64_t(std::ceil(double(top_p) * double(weight))); }

  void cut_after(size_t n) {
    const uint64_t last = *std::min_element(keys, keys + n);
    cut_logit = key_logit(last), cut_index = int(~uint32_t(last));
  }

  void keep_ranks(int top_k, float top_p) {
    gather_ranks(top_k);
    cut_after(top_p < 1 ? shortest(top_k, share(top_p, weight_of(keys, top_k))) : top_k);
  }

  // top_p of the whole vocabulary: bisect the cut until few tokens are left between, and rank only those.
  void keep_weight(float top_p) {
    uint64_t held = total(), above = 0;  // weight from lo on, and from hi on
    const uint64_t goal = share(top_p, held), few = held / 64;
    float lo = -INFINITY, hi = INFINITY, near = 0, far = 32;  // octaves below the best
    for (int i = 0; i < 12 && held - above > few; ++i) {
      const float octaves = (near + far) / 2;
      cut_logit = top - octaves / scale;
      const uint64_t weight = total();
      if (weight >= goal) held = weight, lo = cut_logit, far = octaves;
      else above = weight, hi = cut_logit, near = octaves;
    }
    cut_after(shortest(gather(lo, hi), goal - above));
  }

  // An octave below min_p is the cut, which only serves to skip tiles.
  void keep_likely(float min_p) {
    min_weight = min_p * WEIGHT_ONE;
    const float bound = top + (std::log2(min_p) - 1) / scale;
    if (bound > cut_logit) cut_logit = bound, cut_index = INT32_MAX;
  }

  int token_at(uint64_t target) const {
    int block = 0;
    for (; target >= mass[block]; ++block) target -= mass[block];
    for (int at = block * LOGIT_BLOCK;; at += 16) {
      int32_t w[16];
      i_store(w, kept(at));
      for (int i = 0; i < 16; ++i) {
        if (target < uint32_t(w[i])) return at + i;
        target -= uint32_t(w[i]);
      }
    }
  }
};

int first_equal(const float* logits, const float* maxima, float top) {
  int tile = 0;
  while (maxima[tile] != top) ++tile;
  int i = tile * LOGIT_TILE;
  while (logits[i] != top) ++i;
  return i;
}

int sample(float* logits, float* maxima, int vocab, const Sampling& how, const uint32_t* seen,
                  uint32_t position, void* scratch) {
  if (how.repetition_penalty != 1) penalise(logits, maxima, vocab, seen, how.repetition_penalty);
  const float top = largest(maxima, (vocab + LOGIT_TILE - 1) / LOGIT_TILE);
  if (!std::isfinite(top)) return -1;
  if (how.temperature == 0) return first_equal(logits, maxima, top);
  Draw draw(logits, maxima, vocab, top, how.temperature, scratch);
  if (how.top_k > 0 && how.top_k < vocab) draw.keep_ranks(how.top_k, how.top_p);
  else if (how.top_p < 1) draw.keep_weight(how.top_p);
  draw.keep_likely(how.min_p);
  const unsigned __int128 total = draw.total();
  return draw.token_at(uint64_t(total * uniform_bits(how.seed, position, how.stream) >> 64));
}
