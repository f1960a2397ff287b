// The policy launch: one block for each layer of each row of the batch, all layers in one launch.
#pragma once

#include "device.cuh"
#include "policy.h"

namespace avl {

__device__ __forceinline__ float step_weight(const float* logits, const float* lse, int width,
                                             int head, int entry) {
  const float w = expf(logits[int64_t(head) * width + entry] - lse[head]);
  return w == w ? w : 0;  // NaN: an empty list, -inf minus -inf
}

// The `keep`-th largest of n non-negative keys, found eight bits at a time from the top: count how
// many keys continue the known prefix with each digit, go down until `keep` are reached. Non-
// negative floats order like their bits. After it, `ties` keys equal to the result are to be taken.
__device__ __forceinline__ uint32_t radix_select(const float* keys, int n, int keep, int* ties) {
  __shared__ int counts[256];
  __shared__ uint32_t prefix;
  __shared__ int wanted;
  if (threadIdx.x == 0) {
    prefix = 0;
    wanted = keep;
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    counts[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS) {
      const uint64_t key = bits_of(keys[i]);
      if (key >> (shift + 8) == uint64_t(prefix) >> (shift + 8))
        atomicAdd(&counts[key >> shift & 255], 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = 255;
      while (digit > 0 && counts[digit] < wanted) wanted -= counts[digit--];
      prefix |= uint32_t(digit) << shift;
    }
    __syncthreads();
  }
  *ties = wanted;
  return prefix;
}

// grid (problems): mean, select, and write the chosen slots in the order of the list.
__global__ void __launch_bounds__(THREADS) rank_kernel(const RankArgs a) {
  __shared__ float mean[MAX_RANKED];
  __shared__ int above[THREADS], equal[THREADS];
  const int64_t p = blockIdx.x;
  const int first = a.first[p], last = a.last[p], keep = a.keep[p], at = a.at[p];
  if (!a.wanted[p % a.rows]) return;
  const bool inside = first >= 0 && last >= first && last <= a.width;
  const int n = inside ? last - first : 0;
  const bool fits =
      inside && n <= MAX_RANKED && keep >= 0 && keep <= n && at >= 0 && at <= a.width - keep;
  if (!fits) *a.error = 1;
  if (!fits || keep == 0) return;
  const float *logits = a.logits + p * a.heads * a.width, *lse = a.lse + p * a.heads;
  for (int i = threadIdx.x; i < n; i += THREADS) {
    float sum = 0;
    for (int h = 0; h < a.heads; ++h) sum += step_weight(logits, lse, a.width, h, first + i);
    mean[i] = sum;
  }
  __syncthreads();
  int ties;
  const uint32_t lowest = radix_select(mean, n, keep, &ties);
  const int each = (n + THREADS - 1) / THREADS;  // a run of entries for every thread
  const int begin = min(n, int(threadIdx.x) * each), end = min(n, begin + each);
  int more = 0, same = 0;
  for (int i = begin; i < end; ++i) {
    more += bits_of(mean[i]) > lowest;
    same += bits_of(mean[i]) == lowest;
  }
  above[threadIdx.x] = more;
  equal[threadIdx.x] = same;
  __syncthreads();
  int taken = 0, tied = 0;  // by the threads before this one
  for (int t = 0; t < int(threadIdx.x); ++t) {
    taken += above[t];
    tied += equal[t];
  }
  const int32_t* slots = a.slots + p * a.width + first;
  int32_t* out = a.out + p * a.width + at;
  for (int i = begin; i < end; ++i) {
    const bool is_more = bits_of(mean[i]) > lowest, is_same = bits_of(mean[i]) == lowest;
    if (is_more || (is_same && tied < ties)) out[taken + min(tied, ties)] = slots[i];
    taken += is_more;
    tied += is_same;
  }
}

// grid (kv_heads, problems): accumulate, find the lightest old token, give its place to the next.
__global__ void __launch_bounds__(THREADS) age_kernel(const AgeArgs a) {
  __shared__ float best_score[THREADS];
  __shared__ int best[THREADS];
  const int64_t p = blockIdx.y, at = p * a.kv_heads + blockIdx.x;
  const int row = p % a.rows, first = a.first[p], used = a.used[row], group = a.heads / a.kv_heads;
  const int position = a.position[row], oldest = position - a.recent[row];
  if (first < 0 || used < 0 || used >= a.places || first > a.width - used) {
    *a.error = 1;
    return;
  }
  const float *logits = a.logits + p * a.heads * a.width, *lse = a.lse + p * a.heads;
  float* scores = a.scores + at * a.places;
  int32_t* positions = a.positions + at * a.places;
  const bool full = a.budget[row] >= 0 && used > a.budget[row];
  int mine = -1;
  for (int i = threadIdx.x; i < used; i += THREADS) {
    float sum = 0;
    for (int g = 0; g < group; ++g)
      sum += step_weight(logits, lse, a.width, blockIdx.x * group + g, first + i);
    scores[i] += sum;
    if (!full || positions[i] > oldest) continue;
    if (mine < 0 || scores[i] < scores[mine] ||
        (scores[i] == scores[mine] && positions[i] > positions[mine]))
      mine = i;
  }
  best[threadIdx.x] = mine;
  best_score[threadIdx.x] = mine < 0 ? 0 : scores[mine];
  __syncthreads();  // all scores are written
  if (threadIdx.x > 0) return;
  for (int t = 1; t < THREADS; ++t) {
    if (best[t] < 0) continue;
    const bool lighter = mine < 0 || best_score[t] < scores[mine];
    if (lighter || (best_score[t] == scores[mine] && positions[best[t]] > positions[mine]))
      mine = best[t];
  }
  const int place = mine < 0 ? used : mine;
  scores[place] = 0;
  positions[place] = position + 1;
  a.write[at] = (a.start[p] + place) * a.kv_heads + blockIdx.x;
}

}  // namespace avl
