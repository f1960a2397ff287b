// Fused attention over listed slots: what the engine runs (lessons/ leads up to it).
//
// A row of K or V is spread over LANES lanes, eight numbers each, so a warp holds 32 / LANES rows
// and a block 256 / LANES. Each group of lanes walks its own rows with its own running softmax: no
// barrier inside the loop. Four K rows and four V rows (bf16) are requested before the first is
// used, since a decode step waits for memory and for nothing else. The lists of all tiers, taken as
// one, are split over blocks, and a block walks its part of them tier by tier; the last block to
// finish merges (FlashDecoding with a ticket instead of a second kernel).
#pragma once

#include "device.cuh"

namespace avl {

// Rows in flight per group: as many as the registers hold without spilling.
template <class T, int G>
constexpr int UNROLL = 4 / (sizeof(T) / 2) / (G > 1 ? 2 : 1);

// One query head's running softmax, spread over the lanes of a group.
struct Running {
  float m, l, acc[CHUNK];
};

// Which part of the lists a block handles, and for which G query heads. It lies in shared memory:
// in registers it would live through the walk, which needs them all.
struct Place {
  int row, kv_head, head, heads;  // first query head and how many (at most G)
  int begin, end;                 // of all tiers' lists as one
};

// `count` says how many entries of a tier, a row and a kv head there are.
template <int G, class Count>
__device__ __forceinline__ Place place_of(const AttentionArgs& a, int chunks, const Count& count) {
  const int group = a.heads / a.kv_heads, kv_head = blockIdx.y / chunks;
  const int first = blockIdx.y % chunks * G;
  int64_t n = 0, split = blockIdx.x;
  for (int tier = 0; tier < a.tier_count; ++tier) n += count(tier, blockIdx.z, kv_head);
  Place p;
  p.row = blockIdx.z;
  p.kv_head = kv_head;
  p.head = kv_head * group + first;
  p.heads = min(G, group - first);
  p.begin = int(n * split / gridDim.x);
  p.end = int(n * (split + 1) / gridDim.x);
  return p;
}

template <class T, int LANES, int G>
__device__ __forceinline__ void load_query(const AttentionArgs& a, const Place& p,
                                           Eight<T> (&q)[G]) {
  const bool active = int(threadIdx.x) % LANES * CHUNK < a.head_dim;
  const T* from = static_cast<const T*>(a.q) + p.row * a.q_row + threadIdx.x % LANES * CHUNK;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const bool real = active && g < p.heads;
    q[g] = real ? load_eight(from + (p.head + g) * a.q_head) : zero_eight<T>();
  }
}

// Turn the logits of N rows into their weights under a new running maximum, and rescale what was
// summed, which `keep` says; false where there is nothing yet.
template <int N>
__device__ __forceinline__ bool soften(Running& r, float (&logit)[N], float& keep) {
  float m = r.m;
#pragma unroll
  for (int u = 0; u < N; ++u) m = fmaxf(m, logit[u]);
  if (m == AVL_LOWEST) {  // -inf minus -inf would be NaN, which only a logit that is NaN may become
#pragma unroll
    for (int u = 0; u < N; ++u)
      if (logit[u] != logit[u]) r.l = logit[u];
    return false;
  }
  keep = __expf(r.m - m);
  r.m = m;
  r.l *= keep;
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) r.acc[i] *= keep;
#pragma unroll
  for (int u = 0; u < N; ++u) {
    logit[u] = __expf(logit[u] - m);
    r.l += logit[u];
  }
  return true;
}

// Take in N rows whose logits are known, which become weights.
template <class T, int N>
__device__ __forceinline__ void absorb(Running& r, float (&logit)[N], const Eight<T> (&v)[N]) {
  float keep;
  if (!soften(r, logit, keep)) return;
#pragma unroll
  for (int u = 0; u < N; ++u)
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) r.acc[i] += logit[u] * number(v[u], i);
}

// Take in a block's part of one tier's list, `before` entries behind the beginning of all lists.
template <class T, int LANES, int G>
__device__ __forceinline__ void walk(const AttentionArgs& a, const List& list, const Place& p,
                                     int before, const Eight<T> (&q)[G], Running (&run)[G]) {
  constexpr int GROUPS = THREADS / LANES, N = UNROLL<T, G>;
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  const bool active = lane * CHUNK < a.head_dim;
  const Tier& tier = a.tiers[list.tier];
  const T* k = static_cast<const T*>(tier.k) + p.kv_head * tier.k_head + lane * CHUNK;
  const T* v = static_cast<const T*>(tier.v) + p.kv_head * tier.v_head + lane * CHUNK;
  float* logits = a.logits + (int64_t(p.row) * a.heads + p.head) * a.width + tier.at;
  const int begin = max(p.begin - before, 0), end = min(p.end - before, list.count);
  for (int base = begin; base < end; base += GROUPS * N) {  // the same for all lanes
    Eight<T> keys[N], values[N];
    bool real[N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      const int i = base + u * GROUPS + group;
      const int slot = i < end ? list[i] : -1;
      real[u] = slot >= 0;
      keys[u] = real[u] && active ? load_eight(k + int64_t(slot) * tier.k_slot) : zero_eight<T>();
      values[u] = real[u] && active ? load_eight(v + int64_t(slot) * tier.v_slot) : zero_eight<T>();
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
      float logit[N];
#pragma unroll
      for (int u = 0; u < N; ++u) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < CHUNK; ++j) sum += number(q[g], j) * number(keys[u], j);
        logit[u] = lane_sum<LANES>(sum) * a.scale;
        if (!real[u]) logit[u] = AVL_LOWEST;
        const int i = base + u * GROUPS + group;
        if (a.logits && lane == 0 && i < end && g < p.heads)
          logits[unsigned(g * a.width + i)] = logit[u];
      }
      absorb(run[g], logit, values);
    }
  }
}

// Join the groups of a block for one query head; thread d ends with element d of the sum.
template <int LANES>
__device__ __forceinline__ void join_groups(const Running& mine, float& m, float& l, float& acc) {
  constexpr int GROUPS = THREADS / LANES;
  __shared__ float ms[GROUPS], ls[GROUPS], accs[GROUPS][LANES * CHUNK];
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  __syncthreads();  // the previous head's values have been read
  if (lane == 0) {
    ms[group] = mine.m;
    ls[group] = mine.l;
  }
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) accs[group][lane * CHUNK + i] = mine.acc[i];
  __syncthreads();
  m = AVL_LOWEST;
  for (int i = 0; i < GROUPS; ++i) m = fmaxf(m, ms[i]);
  l = acc = 0;
  for (int i = 0; i < GROUPS; ++i) {
    const float share = ms[i] == AVL_LOWEST ? 0 : __expf(ms[i] - m);
    l += share * ls[i];
    if (threadIdx.x < LANES * CHUNK) acc += share * accs[i][threadIdx.x];
  }
}

// Write a head's result; returns its lse.
template <class T>
__device__ __forceinline__ float write_head(const AttentionArgs& a, int row, int head, float m,
                                            float l, float acc) {
  const int64_t at = int64_t(row) * a.heads + head;
  if (int(threadIdx.x) < a.head_dim)
    static_cast<T*>(a.out)[at * a.head_dim + threadIdx.x] = from_float<T>(l == 0 ? 0 : acc / l);
  const float lse = l == 0 ? AVL_LOWEST : m + logf(l);
  if (a.lse && threadIdx.x == 0) a.lse[at] = lse;
  return lse;
}

// What one split found for one head: [m, l, acc...] in global memory.
__device__ __forceinline__ float* partial_of(const AttentionArgs& a, int row, int head, int split) {
  const int64_t at = (int64_t(row) * a.heads + head) * gridDim.x + split;
  return a.partials + at * (a.head_dim + 2);
}

template <class T>
__device__ __forceinline__ float merge_splits(const AttentionArgs& a, int row, int head) {
  float m = AVL_LOWEST, l = 0, acc = 0;
  for (int s = 0; s < int(gridDim.x); ++s) m = fmaxf(m, __ldcg(partial_of(a, row, head, s)));
  for (int s = 0; s < int(gridDim.x); ++s) {
    const float* part = partial_of(a, row, head, s);
    const float other = __ldcg(part);
    const float share = other == AVL_LOWEST ? 0 : __expf(other - m);
    l += share * __ldcg(part + 1);
    if (int(threadIdx.x) < a.head_dim) acc += share * __ldcg(part + 2 + threadIdx.x);
  }
  return write_head<T>(a, row, head, m, l, acc);
}

// Join what the groups of a block have found, and in the last of the splits what these have. What
// is written is told to `written`, head by head.
template <class T, int LANES, int G, class Written>
__device__ __forceinline__ void finish(const AttentionArgs& a, const Place& p,
                                       const Running (&run)[G], const Written& written) {
#pragma unroll
  for (int g = 0; g < G; ++g) {
    if (g >= p.heads) break;
    float m, l, acc;
    join_groups<LANES>(run[g], m, l, acc);
    if (gridDim.x == 1) {
      written(p.head + g, write_head<T>(a, p.row, p.head + g, m, l, acc));
      continue;
    }
    float* part = partial_of(a, p.row, p.head + g, blockIdx.x);
    if (int(threadIdx.x) < a.head_dim) part[2 + threadIdx.x] = acc;
    if (threadIdx.x == 0) {
      part[0] = m;
      part[1] = l;
    }
  }
  if (gridDim.x == 1) return;
  if (!last_to_arrive(a.tickets + int64_t(p.row) * a.heads + p.head, gridDim.x)) return;
  for (int g = 0; g < p.heads; ++g) written(p.head + g, merge_splits<T>(a, p.row, p.head + g));
}

// Entries beyond a list's count get -inf, each split filling its share of the width.
__device__ __forceinline__ void fill_tail(const AttentionArgs& a, const List& list,
                                          const Place& p) {
  if (!a.logits) return;
  const Tier& tier = a.tiers[list.tier];
  const int begin = int(int64_t(tier.width) * blockIdx.x / gridDim.x);
  const int end = int(int64_t(tier.width) * (blockIdx.x + 1) / gridDim.x);
  for (int g = 0; g < p.heads; ++g)
    for (int i = max(begin, list.count) + int(threadIdx.x); i < end; i += THREADS)
      a.logits[(int64_t(p.row) * a.heads + p.head + g) * a.width + tier.at + i] = AVL_LOWEST;
}

// What a block finds in its part of every tier.
template <class T, int LANES, int G>
__device__ __forceinline__ void walk_tiers(const AttentionArgs& a, const Place& p,
                                           Running (&run)[G]) {
  Eight<T> q[G];
  load_query<T, LANES, G>(a, p, q);
  for (int tier = 0, before = 0; tier < a.tier_count; ++tier) {
    const List list(a, tier, p.row, p.kv_head);
    walk<T, LANES, G>(a, list, p, before, q, run);
    fill_tail(a, list, p);
    before += list.count;
  }
}

// grid (splits, kv_heads * chunks, rows); `chunks` parts of G query heads share a kv head.
template <class T, int LANES, int G>
__global__ void __launch_bounds__(THREADS, G == 1 ? 3 : 2)
    attention_kernel(const __grid_constant__ AttentionArgs a, int chunks) {
  __shared__ Place p;
  if (threadIdx.x == 0)
    p = place_of<G>(a, chunks, [&](int tier, int row, int kv_head) {
      return List(a, tier, row, kv_head).count;
    });
  __syncthreads();
  Running run[G];
#pragma unroll
  for (int g = 0; g < G; ++g) run[g] = Running{AVL_LOWEST, 0, {}};
  walk_tiers<T, LANES, G>(a, p, run);
  finish<T, LANES, G>(a, p, run, [](int, float) {});
}

}  // namespace avl
