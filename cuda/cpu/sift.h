// Sifting a tier: all its keys are scanned, then every head chooses the values that it reads, and
// only those are read. A row's choice is made over its whole list, so that it depends neither on
// threads nor on who shares the step.
#pragma once

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
// more than the share `most`. `top` is the largest logit.
static float threshold(const float* logits, int n, float top, float most) {
  auto kept = [&](float least) {
    vf mass = {};
    for (int i = 0; i < n; i += W) {
      const vf x = some(logits, i, n, LOWEST);
      mass += x >= least ? exp(x - top) : vf{};
    }
    return sum(mass);
  };
  const float enough = (1 - most) * kept(LOWEST);
  if (!(kept(top - float(MOST_STEPS) / STEPS) >= enough)) return LOWEST;
  int few = -1, many = MOST_STEPS;  // too few are read, enough are
  while (many - few > 1) {
    const int middle = (few + many) / 2;
    (kept(top - float(middle) / STEPS) >= enough ? many : few) = middle;
  }
  return top - float(many) / STEPS;
}

// Which values of the sifted tiers the heads of a kv head read: what any of them needs.
static void choose(const AttentionArgs& a, int row, int kv_head) {
  const int group = a.heads / a.kv_heads, first = kv_head * group;
  for (int tier = 0; tier < a.tier_count; ++tier) {
    if (!sifted(a, tier, row)) continue;
    const int n = list_count(a, tier, row, kv_head);
    float top[MAX_HEADS], least[MAX_HEADS], left[MAX_HEADS] = {};
    for (int g = 0; g < group; ++g) {
      const float* logits = sieve_of(a, row, first + g, tier);
      vf most = vf{} + LOWEST;
      for (int i = 0; i < n; i += W) most = larger(some(logits, i, n, LOWEST), most);
      top[g] = largest(most);
      least[g] = threshold(logits, n, top[g], a.tiers[tier].sifting.most[row]);
    }
    int32_t* to = chosen_of(a, row, kv_head, tier);
    int count = 0;
    for (int i = 0; i < n; ++i) {
      bool needed = false;
      for (int g = 0; g < group; ++g) needed |= !(sieve_of(a, row, first + g, tier)[i] < least[g]);
      if (needed) to[count++] = i;
    }
    for (int g = 0; g < group; ++g) {
      const float* logits = sieve_of(a, row, first + g, tier);
      for (int i = 0, next = 0; i < n; i += W) {
        float mine[W];
        store(mine, some(logits, i, n, LOWEST));
        for (; next < count && to[next] < i + W; ++next) mine[to[next] - i] = LOWEST;
        const vf x = load(mine);
        left[g] += sum(x > LOWEST ? exp(x - top[g]) : vf{});
      }
      float* rest = rest_of(a, row, first + g, tier);
      rest[0] = static_cast<float>(count);
      rest[1] = left[g] > 0 ? top[g] + __builtin_logf(left[g]) : LOWEST;
    }
  }
}

// Take in one part in `splits` of the values that were chosen, and once the mean of the tier for
// those that were not.
template <class T, int D>
static void attend_chosen(const AttentionArgs& a, int tier, int row, int kv_head, int kv_heads,
                          int split, float* logits, Running<D>* runs, Beside<D>* besides) {
  const int group = a.heads / a.kv_heads;
  for (int kv = kv_head; kv < kv_head + kv_heads; ++kv) {
    const int first = (kv - kv_head) * group;
    Running<D>* run = runs + first * a.splits;
    Beside<D>* beside = besides ? besides + first : nullptr;
    const int32_t* chosen = chosen_of(a, row, kv, tier);
    const int64_t count = static_cast<int64_t>(rest_of(a, row, kv * group, tier)[0]);
    const Part part(a, tier, row, kv, 1, count * split / a.splits, count * (split + 1) / a.splits);
    const Rows rows(a, part, sizeof(T));
    Tokens tokens;
    for (int begin = part.begin; begin < part.end; begin += BLOCK) {
      if (!read_tokens<T>(a, part, begin, block_at(begin, part.end), chosen, &tokens)) return;
      for (int g = 0; g < group; ++g)
        for (int t = 0; t < tokens.n; ++t)
          logits[g * BLOCK + t] = sieve_of(a, row, kv * group + g, tier)[chosen[begin + t]];
      absorb<T, D>(a, part, rows, tokens, logits, run, beside, nullptr);
    }
    const Sifting& sifting = a.tiers[tier].sifting;
    for (int g = 0; g < group && split == 0; ++g) {
      const float rest = rest_of(a, row, kv * group + g, tier)[1];
      if (rest == LOWEST) continue;
      Running<D>& r = run[g * a.splits];
      const float* mean = sifting.mean + row * sifting.mean_row + int64_t(kv) * D;
      logits[0] = rest;
      const float keep = soften(logits, 1, r.m, r.l);
      if (beside) beside[g].grown *= keep;
      for (int d = 0; d < D; ++d) {
        float& to = beside ? beside[g].acc[d] : r.acc[place<T, D>(d)];
        to = to * keep + mean[d] * logits[0];
      }
    }
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
    spent[1] += rest_of(a, row, kv_head * group, tier)[0];
  }
}

}  // namespace AVL_ISA
}  // namespace avl
