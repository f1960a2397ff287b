// The policy launch on the CPU: a problem for each thread, written for reading.
#include "../policy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../args.h"

namespace avl {
namespace {

float weight(const float* logits, const float* lse, int width, int head, int entry) {
  const float w = std::exp(logits[int64_t(head) * width + entry] - lse[head]);
  return w == w ? w : 0;  // NaN: an empty list, -inf minus -inf
}

void rank_one(const RankArgs& a, int p) {
  const int first = a.first[p], last = a.last[p], keep = std::min(a.keep[p], last - first);
  if (first < 0 || last > a.width || keep < 0 || keep > a.most) {
    *a.error = 1;
    a.out_count[p] = 0;
    return;
  }
  std::vector<float> mean(last - first, 0.0f);
  for (int h = 0; h < a.heads; ++h)
    for (int i = first; i < last; ++i)
      mean[i - first] += weight(a.logits + int64_t(p) * a.heads * a.width,
                                a.lse + int64_t(p) * a.heads, a.width, h, i);
  std::vector<int> order(last - first);
  for (int i = 0; i < last - first; ++i) order[i] = i;
  auto before = [&](int x, int y) { return mean[x] != mean[y] ? mean[x] > mean[y] : x < y; };
  std::nth_element(order.begin(), order.begin() + keep, order.end(), before);
  std::sort(order.begin(), order.begin() + keep);
  for (int i = 0; i < keep; ++i)
    a.out[int64_t(p) * a.most + i] = a.slots[int64_t(p) * a.width + first + order[i]];
  a.out_count[p] = keep;
}

// The entry to evict among `used`, whose scores and positions these are.
int lightest(const float* scores, const int32_t* positions, int used, int recent) {
  int victim = -1;
  for (int i = 0; i < used; ++i) {
    int later = 0;
    for (int j = 0; j < used; ++j) later += positions[j] > positions[i];
    if (later < recent || positions[i] < 0) continue;
    if (victim < 0 || scores[i] < scores[victim] ||
        (scores[i] == scores[victim] && positions[i] > positions[victim]))
      victim = i;
  }
  return victim;
}

void age_one(const AgeArgs& a, int p) {
  const int first = a.first[p], used = a.used[p], group = a.heads / a.kv_heads;
  if (first < 0 || used < 0 || used > a.text || first > a.width - used) {
    *a.error = 1;
    for (int k = 0; k < a.kv_heads; ++k) a.victim[int64_t(p) * a.kv_heads + k] = -1;
    return;
  }
  for (int k = 0; k < a.kv_heads; ++k) {
    const int64_t at = int64_t(p) * a.kv_heads + k;
    float* scores = a.scores + at * a.text;
    int32_t* positions = a.positions + at * a.text;
    for (int i = 0; i < used; ++i) {
      float sum = 0;
      for (int h = k * group; h < (k + 1) * group; ++h)
        sum += weight(a.logits + int64_t(p) * a.heads * a.width, a.lse + int64_t(p) * a.heads,
                      a.width, h, first + i);
      scores[i] += sum;
    }
    const bool full = a.budget[p] >= 0 && used > a.budget[p];
    const int victim = full ? lightest(scores, positions, used, a.recent[p]) : -1;
    if (victim >= 0) {
      scores[victim] = std::numeric_limits<float>::infinity();
      positions[victim] = -1;
    }
    a.victim[at] = victim;
  }
}

}  // namespace

int cpu_rank(const RankArgs& a) {
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
  for (int p = 0; p < a.problems; ++p) rank_one(a, p);
  return ok;
}

int cpu_age(const AgeArgs& a) {
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
  for (int p = 0; p < a.problems; ++p) age_one(a, p);
  return ok;
}

}  // namespace avl
