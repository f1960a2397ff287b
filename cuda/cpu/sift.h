// Sifting a tier: all its keys are scanned, then every head chooses the values that it reads, and
// only those are read. A row's choice is made over its whole list, so that it depends neither on
// threads nor on who shares the step.
#pragma once

#include <algorithm>
#include <vector>

#include "walk.h"

namespace avl {
namespace AVL_ISA {

static inline bool sifted(const AttentionArgs& a, int tier, int row) {
  const float* most = a.tiers[tier].sifting.most;
  return most && most[row] > 0;
}

// The logits of a head.
static inline float* sieve_of(const AttentionArgs& a, int row, int head, int tier) {
  return a.sieve + (int64_t(row) * a.heads + head) * a.width + a.tiers[tier].at;
}
static inline int32_t* chosen_of(const AttentionArgs& a, int row, int kv_head, int tier) {
  return a.chosen + (int64_t(row) * a.kv_heads + kv_head) * a.width + a.tiers[tier].at;
}
// Of a tier how many values a head reads, and the log of the weight that it leaves out; behind
// those of the tiers the log of all its weights.
static inline float* rest_of(const AttentionArgs& a, int row, int head, int tier) {
  return a.rest + ((int64_t(row) * a.heads + head) * (MAX_TIERS + 1) + tier) * 2;
}

// How many values the heads of a kv head read.
static inline int count_of(const AttentionArgs& a, int row, int kv_head, int tier) {
  return static_cast<int>(rest_of(a, row, kv_head * (a.heads / a.kv_heads), tier)[0]);
}

// The logits of one part in `splits` of every sifted tier, for a few kv heads.
template <class T, int D>
static void scan_task(const AttentionArgs& a, int row, int kv_head, int kv_heads, int split,
                      Space<T, D>& space) {
  const int group = a.heads / a.kv_heads;
  Queries<T, D> q = space.queries(a, row, kv_head * group, kv_heads * group);
  for (int tier = 0; tier < a.tier_count; ++tier) {
    if (!sifted(a, tier, row)) continue;
    const int64_t n = list_count(a, tier, row, kv_head);
    const Part part(a, tier, row, kv_head, kv_heads, n * split / a.splits,
                    n * (split + 1) / a.splits);
    const Rows rows(a, part, sizeof(T));
    Tokens tokens;
    for (int begin = part.begin; begin < part.end; begin += BLOCK) {
      if (!read_tokens<T>(a, part, begin, block_at(begin, part.end), nullptr, &tokens)) break;
      score_scaled<T, D>(a, part, rows, tokens, begin, q, space.logits, a.sieve);
    }
  }
}

// A vector of a list of n: where it ends, `other`.
static inline vf some(const float* p, int i, int n, float other) {
  if (n - i >= W) return load(p + i);
  float numbers[W];
  for (int j = 0; j < W; ++j) numbers[j] = i + j < n ? p[i + j] : other;
  return load(numbers);
}

constexpr int STEPS = 16, MOST_STEPS = 255;  // thresholds to a nat, and how many at most

// The least logit whose value a head reads, of n: the highest of the thresholds that leaves out no
// more than the share `most`. `top` is the largest logit; the weights are left in `weights`, whole
// vectors of them.
static float threshold(const float* logits, int n, float top, float most, float* weights) {
  for (int i = 0; i < n; i += W) {
    const vf x = some(logits, i, n, LOWEST);
    store(weights + i, x > LOWEST ? exp(x - top) : vf{});
  }
  // What three thresholds leave, in one reading.
  auto kept = [&](float a, float b, float c, float* to) {
    vf masses[3] = {};
    for (int i = 0; i < n; i += W) {
      const vf x = some(logits, i, n, LOWEST), weight = load(weights + i);
      masses[0] += x >= a ? weight : vf{};
      masses[1] += x >= b ? weight : vf{};
      masses[2] += x >= c ? weight : vf{};
    }
    for (int i = 0; i < 3; ++i) to[i] = sum(masses[i]);
  };
  auto at = [&](int step) { return top - float(step) / STEPS; };
  float mass[3];
  kept(LOWEST, at(MOST_STEPS), at(MOST_STEPS / 4), mass);
  const float enough = (1 - most) * mass[0];
  if (!(mass[1] >= enough)) return LOWEST;
  int few = -1, many = MOST_STEPS;  // too few are read, enough are
  (mass[2] >= enough ? many : few) = MOST_STEPS / 4;
  while (many - few > 1) {
    const int quarter = (many - few + 3) / 4;
    int steps[3];
    for (int i = 0; i < 3; ++i) steps[i] = std::min(few + (i + 1) * quarter, many);
    kept(at(steps[0]), at(steps[1]), at(steps[2]), mass);
    for (int i = 0; i < 3 && steps[i] < many; ++i) (mass[i] >= enough ? many : few) = steps[i];
  }
  return at(many);
}

static inline float largest_of(const float* logits, int n) {
  vf most = vf{} + LOWEST;
  for (int i = 0; i < n; i += W) most = larger(some(logits, i, n, LOWEST), most);
  return largest(most);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Of every set of eight lanes which those are, the first ones first.
struct Lanes {
  uint8_t of[256][8];
  constexpr Lanes() : of() {
    for (int set = 0; set < 256; ++set)
      for (int lane = 0, n = 0; lane < 8; ++lane)
        if (set >> lane & 1) of[set][n++] = lane;
  }
};
constexpr Lanes lanes_of;
#endif

// Writes the numbers i + j of the lanes j below n where `needed` is -1; returns how many. There is
// room for n.
static inline int put_needed(vi needed, int i, int n, int32_t* to) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (n >= W) {
    const int set = _mm256_movemask_ps((__m256)needed);
    const __m128i* lanes = reinterpret_cast<const __m128i*>(lanes_of.of[set]);
    const vi numbers = (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(lanes)) + i;
    __builtin_memcpy(to, &numbers, sizeof numbers);
    return __builtin_popcount(set);
  }
#endif
  int count = 0;
  for (int j = 0; j < W && j < n; ++j) {  // without branches, which nobody could foretell
    to[count] = i + j;
    count -= needed[j];
  }
  return count;
}

// Which values of the sifted tiers the heads of a kv head read: what any of them needs.
static void choose(const AttentionArgs& a, int row, int kv_head) {
  static thread_local std::vector<float> weights;  // of every head
  const int group = a.heads / a.kv_heads, first = kv_head * group;
  for (int tier = 0; tier < a.tier_count; ++tier) {
    if (!sifted(a, tier, row)) continue;
    const int n = list_count(a, tier, row, kv_head), whole = (n + W - 1) / W * W;
    weights.resize(size_t(group) * whole);
    float top[MAX_HEADS], least[MAX_HEADS];
    for (int g = 0; g < group; ++g) {
      const float* logits = sieve_of(a, row, first + g, tier);
      top[g] = largest_of(logits, n);
      const float most = a.tiers[tier].sifting.most[row];
      least[g] = threshold(logits, n, top[g], most, weights.data() + size_t(g) * whole);
    }
    vf left[MAX_HEADS] = {};
    int32_t* to = chosen_of(a, row, kv_head, tier);
    int count = 0;
    for (int i = 0; i < n; i += W) {
      vi needed = {};  // -1 where a value is
      for (int g = 0; g < group; ++g)
        needed |= ~(some(sieve_of(a, row, first + g, tier), i, n, LOWEST) < least[g]);
      for (int g = 0; g < group; ++g)
        left[g] += needed ? vf{} : load(weights.data() + size_t(g) * whole + i);
      count += put_needed(needed, i, n - i, to + count);
    }
    for (int g = 0; g < group; ++g) {
      float* rest = rest_of(a, row, first + g, tier);
      const float mass = sum(left[g]);
      rest[0] = static_cast<float>(count);
      rest[1] = mass > 0 ? top[g] + __builtin_logf(mass) : LOWEST;
    }
  }
}

// Ask for the values of a head that will be taken in next: they lie far from each other.
template <class T, int D>
static inline void prefetch_values(const Tier& tier, const Rows& rows, const Tokens& tokens) {
  const int bytes = tier.paged ? tier.value.codes : D * int(sizeof(T));
  for (int t = 0; t < tokens.n; ++t) {
    for (int at = 0; at < bytes; at += 64) __builtin_prefetch(tokens.v[t] + rows.v[0] + at);
    if (tier.paged) __builtin_prefetch(tokens.v[t] + rows.v_scale[0]);
  }
}

// Take in one part in `splits` of the values that were chosen, for one kv head.
template <class T, int D>
static void attend_few(const AttentionArgs& a, int tier, int row, int kv_head, int split,
                       float* logits, Running<D>* run, Beside<D>* beside) {
  const int group = a.heads / a.kv_heads;
  const int32_t* chosen = chosen_of(a, row, kv_head, tier);
  const int64_t count = count_of(a, row, kv_head, tier);
  const Part part(a, tier, row, kv_head, 1, count * split / a.splits,
                  count * (split + 1) / a.splits);
  const Rows rows(a, part, sizeof(T));
  Tokens tokens[2];  // these and the next
  const int first = block_at(part.begin, part.end);
  if (!read_tokens<T>(a, part, part.begin, first, chosen, tokens)) return;
  for (int begin = part.begin, now = 0; begin < part.end; begin += BLOCK, now = 1 - now) {
    const int left = block_at(begin + BLOCK, part.end);
    if (!read_tokens<T>(a, part, begin + BLOCK, left, chosen, tokens + 1 - now)) return;
    prefetch_values<T, D>(a.tiers[tier], rows, tokens[1 - now]);
    for (int g = 0; g < group; ++g)
      for (int i = 0; i < tokens[now].n; ++i)
        logits[g * BLOCK + i] = sieve_of(a, row, kv_head * group + g, tier)[chosen[begin + i]];
    absorb<T, D>(a, part, rows, tokens[now], logits, run, beside, nullptr);
  }
}

constexpr float UNREAD = -1e30f;  // the logit of a value without weight: no number's difference

// The same for kv heads that have chosen most values: all are read as they lie, which is faster
// than one by one, and those that were not chosen get no weight.
template <class T, int D>
static void attend_most(const AttentionArgs& a, int tier, int row, int kv_head, int kv_heads,
                        int split, float* logits, Running<D>* run, Beside<D>* beside) {
  const int group = a.heads / a.kv_heads;
  const int64_t n = list_count(a, tier, row, kv_head);
  const Part part(a, tier, row, kv_head, kv_heads, n * split / a.splits,
                  n * (split + 1) / a.splits);
  const Rows rows(a, part, sizeof(T));
  const int32_t *next[MAX_HEADS], *last[MAX_HEADS];
  for (int kv = 0; kv < kv_heads; ++kv) {
    const int32_t* chosen = chosen_of(a, row, kv_head + kv, tier);
    last[kv] = chosen + count_of(a, row, kv_head + kv, tier);
    next[kv] = std::lower_bound(chosen, last[kv], part.begin);
  }
  Tokens tokens;
  for (int begin = part.begin; begin < part.end; begin += BLOCK) {
    if (!read_tokens<T>(a, part, begin, block_at(begin, part.end), nullptr, &tokens)) return;
    if (a.tiers[tier].paged && 2 * kv_heads > a.kv_heads)
      touch(tokens.v, tokens.n, 0, a.tiers[tier].value.block);
    for (int kv = 0; kv < kv_heads; ++kv)
      for (int i = 0; i < tokens.n; ++i) {
        const bool mine = next[kv] < last[kv] && *next[kv] == begin + i;
        next[kv] += mine;
        for (int h = kv * group; h < (kv + 1) * group; ++h)
          logits[h * BLOCK + i] =
              mine ? sieve_of(a, row, kv_head * group + h, tier)[begin + i] : UNREAD;
      }
    absorb<T, D>(a, part, rows, tokens, logits, run, beside, nullptr);
  }
}

// Take in the mean of a tier's values for those that a kv head's heads have not chosen.
template <class T, int D>
static void attend_mean(const AttentionArgs& a, int tier, int row, int kv_head, float* logits,
                        Running<D>* run, Beside<D>* beside) {
  const int group = a.heads / a.kv_heads;
  const Sifting& sifting = a.tiers[tier].sifting;
  const float* mean = sifting.mean + row * sifting.mean_row + int64_t(kv_head) * D;
  for (int g = 0; g < group; ++g) {
    logits[0] = rest_of(a, row, kv_head * group + g, tier)[1];
    if (logits[0] == LOWEST) continue;
    Running<D>& r = run[g * a.splits];
    const float keep = soften(logits, 1, r.m, r.l);
    if (beside) beside[g].grown *= keep;
    for (int d = 0; d < D; ++d) {
      float& to = beside ? beside[g].acc[d] : r.acc[place<T, D>(d)];
      to = to * keep + mean[d] * logits[0];
    }
  }
}

// Take in what was chosen of a tier, for a few kv heads.
template <class T, int D>
static void attend_chosen(const AttentionArgs& a, int tier, int row, int kv_head, int kv_heads,
                          int split, float* logits, Running<D>* runs, Beside<D>* besides) {
  const int group = a.heads / a.kv_heads, end = kv_head + kv_heads;
  auto most = [&](int kv) { return 2 * count_of(a, row, kv, tier) > list_count(a, tier, row, kv); };
  for (int kv = kv_head, many = 1; kv < end; kv += many, many = 1) {
    Running<D>* run = runs + (kv - kv_head) * group * a.splits;
    Beside<D>* beside = besides ? besides + (kv - kv_head) * group : nullptr;
    if (most(kv)) {
      while (kv + many < end && most(kv + many)) ++many;
      attend_most<T, D>(a, tier, row, kv, many, split, logits, run, beside);
    } else {
      attend_few<T, D>(a, tier, row, kv, split, logits, run, beside);
    }
    for (int each = 0; each < many && split == 0; ++each)
      attend_mean<T, D>(a, tier, row, kv + each, logits, run + each * group * a.splits,
                        beside ? beside + each * group : nullptr);
  }
}

// Count what a kv head has left out and read; `rest` has the log of all weights by now.
static void account(const AttentionArgs& a, int row, int kv_head) {
  const int group = a.heads / a.kv_heads;
  for (int tier = 0; tier < a.tier_count; ++tier) {
    if (!sifted(a, tier, row)) continue;
    const Sifting& sifting = a.tiers[tier].sifting;
    float* spent = sifting.spent + row * sifting.spent_row + 2 * kv_head;
    for (int g = 0; g < group; ++g) {
      const float* rest = rest_of(a, row, kv_head * group + g, tier);
      const float all = rest_of(a, row, kv_head * group + g, MAX_TIERS)[1];
      if (rest[1] > LOWEST) spent[0] += exp(vf{} + (rest[1] - all))[0] / group;
    }
    spent[1] += count_of(a, row, kv_head, tier);
  }
}

}  // namespace AVL_ISA
}  // namespace avl
