// From the simplest correct attention kernel to the one the engine runs, one idea at a time.
//
//   level  idea                                               what it changes
//   1      one thread for each query head                     correct, and that is all
//   2      the lanes of a warp share a row (coalesced loads)  memory is read in full sectors
//   3      many warps for each head, online softmax           K and V are read once, in parallel
//   4      split lists, four rows in flight, one merge        every multiprocessor has work
//
// Level 4 is attention.cuh. All take the same arguments, share a launcher (launch.cu) and a test;
// bench/kernels.py --levels times them on the machine at hand.
#pragma once

#include "attention.cuh"

namespace avl {

// Level 1, grid (heads, rows), one thread: three passes over the list, in the order of the formula.
// Every lane of a warp waits while one computes; each load fetches 32 bytes and uses 2 or 4.
template <class T>
__global__ void level1_kernel(const AttentionArgs a) {
  const int row = blockIdx.y, head = blockIdx.x, kv_head = head / (a.heads / a.kv_heads);
  const List list(a, row, kv_head);
  const T* q = static_cast<const T*>(a.q) + row * a.q_row + head * a.q_head;
  const T* k = static_cast<const T*>(a.k) + kv_head * a.k_head;
  const T* v = static_cast<const T*>(a.v) + kv_head * a.v_head;
  const int64_t at = int64_t(row) * a.heads + head;
  float* logits = a.logits + at * a.width;
  float m = AVL_LOWEST, l = 0;
  for (int i = 0; i < a.width; ++i) {
    const int64_t slot = list[i];
    float sum = slot >= 0 ? 0 : AVL_LOWEST;
    for (int d = 0; slot >= 0 && d < a.head_dim; ++d)
      sum += to_float(q[d]) * to_float(k[slot * a.k_slot + d]);
    logits[i] = sum * a.scale;
    m = fmaxf(m, logits[i]);
  }
  for (int i = 0; m > AVL_LOWEST && i < list.count; ++i) l += expf(logits[i] - m);
  for (int d = 0; d < a.head_dim; ++d) {
    float sum = 0;
    for (int i = 0; i < list.count; ++i) {
      const int64_t slot = list[i];
      if (slot >= 0) sum += expf(logits[i] - m) * to_float(v[slot * a.v_slot + d]);
    }
    static_cast<T*>(a.out)[at * a.head_dim + d] = from_float<T>(l == 0 ? 0 : sum / l);
  }
  if (a.lse) a.lse[at] = l == 0 ? AVL_LOWEST : m + logf(l);
}

// Level 2, grid (heads, rows), one warp: lane j holds numbers 8 j.. of a row (32 / LANES lanes of
// the warp repeat the same work), so a row is read by whole 16-byte loads side by side.
template <class T, int LANES>
__global__ void level2_kernel(const AttentionArgs a) {
  const int row = blockIdx.y, head = blockIdx.x, kv_head = head / (a.heads / a.kv_heads);
  const int first = threadIdx.x % LANES * CHUNK;
  const bool active = first < a.head_dim, writes = threadIdx.x < LANES;
  const List list(a, row, kv_head);
  const T* q = static_cast<const T*>(a.q) + row * a.q_row + head * a.q_head + first;
  const T* k = static_cast<const T*>(a.k) + kv_head * a.k_head + first;
  const T* v = static_cast<const T*>(a.v) + kv_head * a.v_head + first;
  const int64_t at = int64_t(row) * a.heads + head;
  const Eight<T> query = active ? load_eight(q) : zero_eight<T>();
  float m = AVL_LOWEST, l = 0, acc[CHUNK] = {};
  for (int i = 0; i < a.width; ++i) {
    const int64_t slot = list[i];
    const bool real = slot >= 0;
    const Eight<T> key = real && active ? load_eight(k + slot * a.k_slot) : zero_eight<T>();
    float logit = 0;
    for (int j = 0; j < CHUNK; ++j) logit += number(query, j) * number(key, j);
    logit = real ? lane_sum<LANES>(logit) * a.scale : (lane_sum<LANES>(logit), AVL_LOWEST);
    if (a.logits && threadIdx.x == 0) a.logits[at * a.width + i] = logit;
    m = fmaxf(m, logit);
  }
  for (int i = 0; m > AVL_LOWEST && i < list.count; ++i) {  // the second pass computes q.k again
    const int64_t slot = list[i];
    const bool real = slot >= 0;
    const Eight<T> key = real && active ? load_eight(k + slot * a.k_slot) : zero_eight<T>();
    const Eight<T> value = real && active ? load_eight(v + slot * a.v_slot) : zero_eight<T>();
    float logit = 0;
    for (int j = 0; j < CHUNK; ++j) logit += number(query, j) * number(key, j);
    const float weight = expf(lane_sum<LANES>(logit) * a.scale - m) * real;
    l += weight;
    for (int j = 0; j < CHUNK; ++j) acc[j] += weight * number(value, j);
  }
  for (int j = 0; active && writes && j < CHUNK; ++j)
    static_cast<T*>(a.out)[at * a.head_dim + first + j] = from_float<T>(l == 0 ? 0 : acc[j] / l);
  if (a.lse && threadIdx.x == 0) a.lse[at] = l == 0 ? AVL_LOWEST : m + logf(l);
}

// Level 3, grid (heads, rows), 256 threads: each group of lanes takes every GROUPS-th row and keeps
// its own running softmax, so K and V are read once; the groups meet in shared memory.
template <class T, int LANES>
__global__ void __launch_bounds__(THREADS) level3_kernel(const AttentionArgs a) {
  constexpr int GROUPS = THREADS / LANES;
  const int row = blockIdx.y, head = blockIdx.x, kv_head = head / (a.heads / a.kv_heads);
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES, first = lane * CHUNK;
  const bool active = first < a.head_dim;
  const List list(a, row, kv_head);
  const T* q = static_cast<const T*>(a.q) + row * a.q_row + head * a.q_head + first;
  const T* k = static_cast<const T*>(a.k) + kv_head * a.k_head + first;
  const T* v = static_cast<const T*>(a.v) + kv_head * a.v_head + first;
  const int64_t at = int64_t(row) * a.heads + head;
  const Eight<T> query = active ? load_eight(q) : zero_eight<T>();
  Running run{AVL_LOWEST, 0, {}};
  for (int base = 0; base < a.width; base += GROUPS) {
    const int i = base + group;
    const int64_t slot = list[i];
    const bool real = slot >= 0;
    const Eight<T> key = real && active ? load_eight(k + slot * a.k_slot) : zero_eight<T>();
    const Eight<T> value = real && active ? load_eight(v + slot * a.v_slot) : zero_eight<T>();
    float logit = 0;
    for (int j = 0; j < CHUNK; ++j) logit += number(query, j) * number(key, j);
    logit = lane_sum<LANES>(logit) * a.scale;
    if (!real) logit = AVL_LOWEST;
    if (a.logits && lane == 0 && i < a.width) a.logits[at * a.width + i] = logit;
    const float m = fmaxf(run.m, logit);
    if (m == AVL_LOWEST) continue;
    const float keep = expf(run.m - m), weight = expf(logit - m);
    run.m = m;
    run.l = run.l * keep + weight;
    for (int j = 0; j < CHUNK; ++j) run.acc[j] = run.acc[j] * keep + weight * number(value, j);
  }
  float m, l, acc;
  join_groups<LANES>(run, m, l, acc);
  write_head<T>(a, row, head, m, l, acc);
}

}  // namespace avl
