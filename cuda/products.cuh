// The two products of the paper on their own: q times listed rows of K, weights times those of V.
#pragma once

#include "device.cuh"

namespace avl {

// grid (parts of the width, kv_heads, rows): one group of lanes for each entry, all its heads.
template <class T, int LANES>
__global__ void __launch_bounds__(THREADS) qk_kernel(const AttentionArgs a) {
  constexpr int GROUPS = THREADS / LANES;
  const int row = blockIdx.z, kv_head = blockIdx.y, heads = a.heads / a.kv_heads;
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  const bool active = lane * CHUNK < a.head_dim;
  const List list(a, 0, row, kv_head);
  const Tier& tier = a.tiers[0];
  const T* k = static_cast<const T*>(tier.k) + kv_head * tier.k_head + lane * CHUNK;
  const T* q = static_cast<const T*>(a.q) + row * a.q_row + lane * CHUNK;
  for (int base = blockIdx.x * GROUPS; base < a.width; base += gridDim.x * GROUPS) {
    const int i = base + group;
    const int slot = i < list.count ? list[i] : -1;
    const Eight<T> key =
        slot >= 0 && active ? load_eight(k + int64_t(slot) * tier.k_slot) : zero_eight<T>();
    for (int h = kv_head * heads; h < (kv_head + 1) * heads; ++h) {
      float sum = 0;
      for (int j = 0; active && j < CHUNK; ++j)
        sum += to_float(q[h * a.q_head + j]) * number(key, j);
      sum = lane_sum<LANES>(sum);
      if (lane == 0 && i < a.width)
        a.logits[(int64_t(row) * a.heads + h) * a.width + i] = slot >= 0 ? sum : AVL_LOWEST;
    }
  }
}

// grid (heads, rows): the groups of a block share one head's list and meet in shared memory.
template <class T, int LANES>
__global__ void __launch_bounds__(THREADS) pv_kernel(const AttentionArgs a) {
  constexpr int GROUPS = THREADS / LANES;
  __shared__ float accs[GROUPS][LANES * CHUNK];
  const int row = blockIdx.y, head = blockIdx.x, kv_head = head / (a.heads / a.kv_heads);
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  const List list(a, 0, row, kv_head);
  const Tier& tier = a.tiers[0];
  const T* v = static_cast<const T*>(tier.v) + kv_head * tier.v_head + lane * CHUNK;
  const int64_t at = int64_t(row) * a.heads + head;
  float acc[CHUNK] = {};
  for (int i = group; i < list.count; i += GROUPS) {
    const int slot = list[i];
    if (slot < 0 || lane * CHUNK >= a.head_dim) continue;
    const Eight<T> value = load_eight(v + int64_t(slot) * tier.v_slot);
    const float weight = a.p[at * a.width + i];
    for (int j = 0; j < CHUNK; ++j) acc[j] += weight * number(value, j);
  }
  for (int j = 0; j < CHUNK; ++j) accs[group][lane * CHUNK + j] = acc[j];
  __syncthreads();
  if (int(threadIdx.x) >= a.head_dim) return;
  float sum = 0;
  for (int g = 0; g < GROUPS; ++g) sum += accs[g][threadIdx.x];
  static_cast<float*>(a.out)[at * a.head_dim + threadIdx.x] = sum;
}

}  // namespace avl
