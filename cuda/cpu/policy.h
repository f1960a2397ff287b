// The policy launch on the CPU: a problem for each thread, see ../policy.h.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "../policy.h"
#include "vec.h"

namespace avl {
namespace AVL_ISA {

// This step's attention weights of n entries, summed over heads: logits [heads, width] from the
// first of the entries on, lse [heads]. NaN and -inf count as 0: an empty list, a masked entry.
template <class Take>
static void sum_weights(const float* logits, const float* lse, int heads, int width, int n,
                        Take take) {
  for (int i = 0; i < n; i += W) {
    const int lanes = n - i < W ? n - i : W;
    vf total = {};
    for (int h = 0; h < heads; ++h) {
      const vf x = load(logits + int64_t(h) * width + i, lanes) - lse[h];
      total += x > -87.0f ? exp(x) : vf{};
    }
    take(i, lanes, total);
  }
}

static bool rank_one(const RankArgs& a, int p) {
  const int first = a.first[p], last = a.last[p], keep = a.keep[p], at = a.at[p];
  if (!a.wanted[p % a.rows]) return true;
  if (first < 0 || last < first || last > a.width) return false;
  const int n = last - first;
  if (keep < 0 || keep > n || at < 0 || at > a.width - keep) return false;
  if (keep == 0) return true;
  std::vector<float> mean(n), order(n);
  sum_weights(a.logits + int64_t(p) * a.heads * a.width + first, a.lse + int64_t(p) * a.heads,
              a.heads, a.width, n, [&](int i, int lanes, vf x) { store(&mean[i], x, lanes); });
  order = mean;
  std::nth_element(order.begin(), order.begin() + keep - 1, order.end(), std::greater<float>());
  const float lowest = order[keep - 1];
  int ties = keep;  // how many of those equal to the lowest are taken
  for (float x : mean) ties -= x > lowest;
  const int32_t* slots = a.slots + int64_t(p) * a.width + first;
  int32_t* out = a.out + int64_t(p) * a.width + at;
  for (int i = 0; i < n; ++i)
    if (mean[i] > lowest || (mean[i] == lowest && ties-- > 0)) *out++ = slots[i];
  return true;
}

// The lightest of `used` tokens that are not later than `oldest`; the latest of equals; -1: none.
static int lightest(const float* scores, const int32_t* positions, int used, int oldest) {
  int victim = -1;
  for (int i = 0; i < used; ++i) {
    if (positions[i] > oldest) continue;
    if (victim < 0 || scores[i] < scores[victim] ||
        (scores[i] == scores[victim] && positions[i] > positions[victim]))
      victim = i;
  }
  return victim;
}

static bool age_one(const AgeArgs& a, int p) {
  const int row = p % a.rows, first = a.first[p], used = a.used[row], position = a.position[row];
  const bool full = a.budget[row] >= 0 && used > a.budget[row];
  if (first < 0 || used < 0 || used >= a.places || first > a.width - used) return false;
  const int group = a.heads / a.kv_heads;
  for (int k = 0; k < a.kv_heads; ++k) {
    const int64_t at = int64_t(p) * a.kv_heads + k, head = int64_t(p) * a.heads + k * group;
    float* scores = a.scores + at * a.places;
    int32_t* positions = a.positions + at * a.places;
    sum_weights(
        a.logits + head * a.width + first, a.lse + head, group, a.width, used,
        [&](int i, int lanes, vf x) { store(scores + i, load(scores + i, lanes) + x, lanes); });
    int place = full ? lightest(scores, positions, used, position - a.recent[row]) : -1;
    if (place < 0) place = used;
    scores[place] = 0;
    positions[place] = position + 1;
    a.write[at] = (a.start[p] + place) * a.kv_heads + k;
  }
  return true;
}

// Calls one(a, p) for all problems; says whether all of them fitted.
template <class Args>
static int for_problems(const Args& a, bool (*one)(const Args&, int)) {
  bool fit = true;
#pragma omp parallel for schedule(static) num_threads(a.threads) reduction(&& : fit)
  for (int p = 0; p < a.problems; ++p) fit = one(a, p) && fit;
  return fit ? ok : bad_slot;
}

static int rank(const RankArgs& a, void*) {
  return for_problems(a, rank_one);
}

static int age(const AgeArgs& a, void*) {
  return for_problems(a, age_one);
}

}  // namespace AVL_ISA
}  // namespace avl
