// Attention where keys and values are read one after the other: over pages of few bits, and where
// only those values are read that matter.
//
// First all keys are scanned, and logits go to global memory (the *sieve*): four bytes beside a few
// hundred of a key and a value. Then values are read, with the logits of their keys. So formats of
// keys and of values never meet, which would be sixteen loops in place of four and two, and a loop
// has only the one or the other in its registers, and more of them in flight. Over pages both
// halves are one launch: a block scans its part of the lists and then reads that part's values.
//
// Where a tier is sifted the choice needs the whole list (engine/ops/native.py, Sifting), and so a
// launch of its own between the two: scan, choose, mix. The launches are the same for all contents,
// so that they can be captured; which rows are sifted is read on the device.
#pragma once

#include "attention.cuh"
#include "pages.cuh"

namespace avl {

enum Stage : int { SCAN = 1, MIX = 2 };

constexpr int STEPS = 16, MOST_STEPS = 255;  // thresholds to a nat, and how many at most
constexpr int MOST_SHARING = 64;             // query heads that may share a kv head

__device__ __forceinline__ bool sifted(const AttentionArgs& a, int tier, int row) {
  const float* most = a.tiers[tier].sifting.most;
  return most && most[row] > 0;
}

// The logits of a head.
__device__ __forceinline__ float* sieve_of(const AttentionArgs& a, int row, int head, int tier) {
  return a.sieve + (int64_t(row) * a.heads + head) * a.width + a.tiers[tier].at;
}
__device__ __forceinline__ int32_t* chosen_of(const AttentionArgs& a, int row, int kv_head,
                                              int tier) {
  return a.chosen + (int64_t(row) * a.kv_heads + kv_head) * a.width + a.tiers[tier].at;
}
// Of a sifted tier how many values a head reads, and the log of the weight that it leaves out.
// While the choice is made: the least logit that it reads, and the largest.
__device__ __forceinline__ float* rest_of(const AttentionArgs& a, int row, int head, int tier) {
  return a.rest + ((int64_t(row) * a.heads + head) * (MAX_TIERS + 1) + tier) * 2;
}

// What a group of lanes has of a block's part of a list: entries that lie side by side, so that it
// meets the scales of a page once. All groups take as many turns.
struct Share {
  int first, last, most;
};
template <int LANES>
__device__ __forceinline__ Share share_of(const Place& p, int before, int count) {
  constexpr int GROUPS = THREADS / LANES;
  const int begin = max(p.begin - before, 0), end = min(p.end - before, count);
  const int each = (end - begin + GROUPS - 1) / GROUPS;
  const int first = begin + int(threadIdx.x) / LANES * each;
  return {first, min(first + each, end), each};
}

// -- scan -----------------------------------------------------------------------------------------

// Keys in flight per group of lanes: as many as the registers hold without spilling.
template <class T, DType F>
constexpr int KEYS = F == DType::f32  ? 4 / (sizeof(T) / 2)
                     : F == DType::q2 ? 4
                                      : 8;

// Queries as they meet the keys of a page whose channels have scales.
template <class T, int LANES, int G>
__device__ __forceinline__ void ask_page(const AttentionArgs& a, const Rows& rows, int page,
                                         const Eight<T> (&q)[G], Query<T, DType::q2> (&asked)[G]) {
  const int lane = threadIdx.x % LANES;
  const bool real = page >= 0 && lane * CHUNK < a.head_dim;
  const fp16* at = rows.channels(max(page, 0)) + lane * CHUNK;
  const Eight<fp16> scales = real ? load_eight(at) : zero_eight<fp16>();
  const Eight<fp16> zeros = real ? load_eight(at + runs_of(a) * RUN) : zero_eight<fp16>();
#pragma unroll
  for (int g = 0; g < G; ++g) asked[g] = query_of_page(q[g], scales, zeros);
}

// The logits of a block's part of one tier's list, `before` entries behind the beginning of all.
template <class T, DType F, int LANES, int G>
__device__ __forceinline__ void scan_list(const AttentionArgs& a, const List& list, const Place& p,
                                          int before) {
  constexpr int N = KEYS<T, F>;
  const int lane = threadIdx.x % LANES;
  const bool active = lane * CHUNK < a.head_dim;
  const Rows rows = keys_of<T>(a, a.tiers[list.tier], p.kv_head);
  const Spot spot(a, F, lane);
  float* to = sieve_of(a, p.row, p.head + min(lane, p.heads - 1), list.tier);
  Eight<T> q[G];
  load_query<T, LANES, G>(a, p, q);
  Query<T, F> asked[G] = {};
#pragma unroll
  for (int g = 0; g < G; ++g)
    if constexpr (F != DType::q2) asked[g] = query_of<T, F>(q[g]);
  const Share mine = share_of<LANES>(p, before, list.count);
  int page = -1;
  for (int done = 0; done < mine.most; done += N) {  // the same for all lanes
    Key<T, F> key[N];
    int slot[N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      const int i = mine.first + done + u;
      slot[u] = i < mine.last ? list[i] : -1;
      key[u] = {};
      if (slot[u] >= 0 && active) key[u] = load_key<T, F>(rows[slot[u]], rows, spot, lane);
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if constexpr (F == DType::q2) {
        const int now = slot[u] < 0 ? page : slot[u] / PAGE;
        if (__any_sync(ALL_LANES, now != page)) ask_page<T, LANES, G>(a, rows, now, q, asked);
        page = now;
      }
      float sums[G];
#pragma unroll
      for (int g = 0; g < G; ++g) sums[g] = dot(asked[g], key[u], spot);
      const float logit = lane_sums<LANES>(sums) * a.scale;
      const int i = mine.first + done + u;
      if (lane < p.heads && i < mine.last) to[i] = slot[u] >= 0 ? logit : AVL_LOWEST;
    }
  }
}

template <class T, int LANES, int G>
__device__ __forceinline__ void scan_tiers(const AttentionArgs& a, const Place& p) {
  for (int tier = 0, before = 0; tier < a.tier_count; ++tier) {
    const List list(a, tier, p.row, p.kv_head);
    const Tier& t = a.tiers[tier];
    switch (t.paged ? t.key.format : DType::f32) {
      case DType::q8: scan_list<T, DType::q8, LANES, G>(a, list, p, before); break;
      case DType::q4: scan_list<T, DType::q4, LANES, G>(a, list, p, before); break;
      case DType::q2: scan_list<T, DType::q2, LANES, G>(a, list, p, before); break;
      default: scan_list<T, DType::f32, LANES, G>(a, list, p, before);
    }
    fill_tail(a, list, p);
    before += list.count;
  }
}

// -- choose ---------------------------------------------------------------------------------------

// The least logit whose value a head reads, of n: the highest of the thresholds that leaves out no
// more than the share `most`. `top` is the largest logit. Sums are in one order, always.
__device__ __forceinline__ float threshold(const float* logits, int n, float top, float most) {
  auto kept = [&](float least) {
    float mass = 0;
    for (int i = threadIdx.x; i < n; i += THREADS)
      if (logits[i] >= least) mass += __expf(logits[i] - top);
    return block_sum(mass);
  };
  const float enough = (1 - most) * kept(AVL_LOWEST);
  if (!(kept(top - float(MOST_STEPS) / STEPS) >= enough)) return AVL_LOWEST;
  int few = -1, many = MOST_STEPS;  // too few are read, enough are
  while (many - few > 1) {
    const int middle = (few + many) / 2;
    (kept(top - float(middle) / STEPS) >= enough ? many : few) = middle;
  }
  return top - float(many) / STEPS;
}

// The sum of the numbers of the threads before this one; that of all goes to `total`.
__device__ __forceinline__ int sum_before(int mine, int* total) {
  __shared__ int numbers[THREADS];
  numbers[threadIdx.x] = mine;
  __syncthreads();
  int before = 0, sum = 0;
  for (int t = 0; t < THREADS; ++t) {
    if (t == int(threadIdx.x)) before = sum;
    sum += numbers[t];
  }
  __syncthreads();  // may be called again
  *total = sum;
  return before;
}

// The list of the entries that any head of a kv head reads, and what each head leaves out. Every
// thread has a run of entries.
__device__ __forceinline__ void gather(const AttentionArgs& a, int row, int kv_head, int tier,
                                       int n) {
  __shared__ float least[MOST_SHARING], top[MOST_SHARING];
  const int group = a.heads / a.kv_heads, first = kv_head * group;
  if (int(threadIdx.x) < group) {
    const float* rest = rest_of(a, row, first + threadIdx.x, tier);
    least[threadIdx.x] = __ldcg(rest);
    top[threadIdx.x] = __ldcg(rest + 1);
  }
  __syncthreads();
  auto needed = [&](int i) {  // by a head whose logit is no number too
    bool any = false;
    for (int g = 0; g < group; ++g) any |= !(sieve_of(a, row, first + g, tier)[i] < least[g]);
    return any;
  };
  const int each = (n + THREADS - 1) / THREADS;
  const int begin = min(n, int(threadIdx.x) * each), end = min(n, begin + each);
  int mine = 0, count;
  for (int i = begin; i < end; ++i) mine += needed(i);
  const int before = sum_before(mine, &count);
  int32_t* chosen = chosen_of(a, row, kv_head, tier);
  for (int i = begin, to = before; i < end; ++i)
    if (needed(i)) chosen[to++] = i;
  for (int g = 0; g < group; ++g) {
    const float* logits = sieve_of(a, row, first + g, tier);
    float left = 0;
    for (int i = begin, next = before; i < end; ++i) {
      const bool read = next < before + mine && chosen[next] == i;
      next += read;
      if (!read) left += __expf(logits[i] - top[g]);
    }
    left = block_sum(left);
    if (threadIdx.x > 0) continue;
    float* rest = rest_of(a, row, first + g, tier);
    rest[0] = static_cast<float>(count);
    rest[1] = left > 0 ? top[g] + logf(left) : AVL_LOWEST;
  }
  const Sifting& sifting = a.tiers[tier].sifting;
  if (threadIdx.x == 0) sifting.spent[row * sifting.spent_row + 2 * kv_head + 1] += count;
  __syncthreads();  // the first thread has read `top`: the next tier's may be written
}

// grid (heads, rows): a head's thresholds; the last of those that share a kv head gathers.
__global__ void __launch_bounds__(THREADS) choose_kernel(const __grid_constant__ AttentionArgs a) {
  const int row = blockIdx.y, head = blockIdx.x, group = a.heads / a.kv_heads;
  const int kv_head = head / group;
  for (int tier = 0; tier < a.tier_count; ++tier) {
    if (!sifted(a, tier, row)) continue;
    const int n = List(a, tier, row, kv_head).count;
    const float* logits = sieve_of(a, row, head, tier);
    float top = AVL_LOWEST;
    for (int i = threadIdx.x; i < n; i += THREADS) top = fmaxf(top, logits[i]);
    top = block_join(top, [](float one, float other) { return fmaxf(one, other); });
    const float least = threshold(logits, n, top, a.tiers[tier].sifting.most[row]);
    if (threadIdx.x > 0) continue;
    float* rest = rest_of(a, row, head, tier);
    rest[0] = least;
    rest[1] = top;
  }
  if (!last_to_arrive(a.tickets + int64_t(row) * a.heads + kv_head * group, group)) return;
  for (int tier = 0; tier < a.tier_count; ++tier)
    if (sifted(a, tier, row)) gather(a, row, kv_head, tier, List(a, tier, row, kv_head).count);
}

// -- mix ------------------------------------------------------------------------------------------

// Entries of a list whose values are read: the first `count`, or those that were chosen.
struct Entries {
  const int32_t* chosen;
  int count;

  __device__ __forceinline__ Entries(const AttentionArgs& a, int tier, int row, int kv_head,
                                     bool sifts)
      : chosen(nullptr) {
    if (sifts && sifted(a, tier, row)) {
      chosen = chosen_of(a, row, kv_head, tier);
      count = int(rest_of(a, row, kv_head * (a.heads / a.kv_heads), tier)[0]);
    } else {
      count = List(a, tier, row, kv_head).count;
    }
  }
  __device__ __forceinline__ int operator[](int i) const { return chosen ? chosen[i] : i; }
};

// Values in flight per group of lanes.
template <class T, class Values, int G>
constexpr int VALUES = Values::FEW ? (G > 1 ? 4 : 6) : 4 / (sizeof(T) / 2) / (G > 1 ? 2 : 1);

// Take in a block's part of the values of one tier's list.
template <class T, class Values, int LANES, int G>
__device__ __forceinline__ void mix_list(const AttentionArgs& a, const List& list,
                                         const Entries& entries, const Place& p, int before,
                                         const Rows& rows, const Values& values,
                                         Running (&run)[G]) {
  constexpr int N = VALUES<T, Values, G>;
  const bool active = int(threadIdx.x) % LANES * CHUNK < a.head_dim;
  const float* logits = sieve_of(a, p.row, p.head, list.tier);
  const Share mine = share_of<LANES>(p, before, entries.count);
  float zeros[G] = {};  // what is subtracted from all of a lane's sums
  for (int done = 0; done < mine.most; done += N) {
    typename Values::Row row[N];
    float weight[G][N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      const int i = mine.first + done + u;
      const int entry = i < mine.last ? entries[i] : -1;
      const int slot = entry >= 0 ? list[entry] : -1;
      row[u] = {};
      if (slot >= 0 && active) row[u] = values.load(rows[slot]);
#pragma unroll
      for (int g = 0; g < G; ++g)
        weight[g][u] =
            slot >= 0 && g < p.heads ? logits[unsigned(g * a.width + entry)] : AVL_LOWEST;
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
      float keep = 0;
      if (!soften(run[g], weight[g], keep))
        for (float& each : weight[g]) each = 0;
      zeros[g] *= keep;
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
      float x[CHUNK];
      values.numbers(row[u], x);
#pragma unroll
      for (int g = 0; g < G; ++g) {
        float share = weight[g][u];
        if constexpr (Values::FEW) {
          share *= to_float(row[u].scale);
          zeros[g] += share * to_float(row[u].zero);
        }
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) run[g].acc[i] += share * x[i];
      }
    }
  }
#pragma unroll
  for (int g = 0; Values::FEW && g < G; ++g)
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) run[g].acc[i] -= zeros[g];
}

// The mean of a tier's values for those that were not read: one group of lanes takes it in.
template <int LANES, int G>
__device__ __forceinline__ void mix_mean(const AttentionArgs& a, int tier, const Place& p,
                                         Running (&run)[G]) {
  if (blockIdx.x > 0 || threadIdx.x >= LANES || int(threadIdx.x) * CHUNK >= a.head_dim) return;
  const Sifting& sifting = a.tiers[tier].sifting;
  const float* mean = sifting.mean + p.row * sifting.mean_row + int64_t(p.kv_head) * a.head_dim;
  const Eight<float> row[1] = {load_eight(mean + threadIdx.x * CHUNK)};
#pragma unroll
  for (int g = 0; g < G; ++g) {
    if (g >= p.heads) break;
    float left[1] = {rest_of(a, p.row, p.head + g, tier)[1]};
    if (left[0] > AVL_LOWEST) absorb(run[g], left, row);
  }
}

template <class T, int LANES, int G>
__device__ __forceinline__ void mix_tiers(const AttentionArgs& a, const Place& p, bool sifts,
                                          Running (&run)[G]) {
  const int lane = threadIdx.x % LANES;
  for (int tier = 0, before = 0; tier < a.tier_count; ++tier) {
    const Tier& t = a.tiers[tier];
    const List list(a, tier, p.row, p.kv_head);
    const Entries entries(a, tier, p.row, p.kv_head, sifts);
    const Rows rows = values_of<T>(a, t, p.kv_head);
    if (t.paged && t.value.format >= DType::q8) {
      const FewValues values{rows.scales, Spot(a, t.value.format, lane)};
      mix_list<T, FewValues, LANES, G>(a, list, entries, p, before, rows, values, run);
    } else {
      const PlainValues<T> values{lane};
      mix_list<T, PlainValues<T>, LANES, G>(a, list, entries, p, before, rows, values, run);
    }
    if (entries.chosen) mix_mean<LANES, G>(a, tier, p, run);
    before += entries.count;
  }
}

// Count what a head has left out. Heads that share a kv head add to one number, those of different
// blocks in any order.
__device__ __forceinline__ void account(const AttentionArgs& a, int row, int head, float lse) {
  const int group = a.heads / a.kv_heads;
  for (int tier = 0; tier < a.tier_count; ++tier) {
    if (!sifted(a, tier, row)) continue;
    const Sifting& sifting = a.tiers[tier].sifting;
    const float left = rest_of(a, row, head, tier)[1];
    float* spent = sifting.spent + row * sifting.spent_row + 2 * (head / group);
    if (left > AVL_LOWEST) atomicAdd(spent, __expf(left - lse) / group);
  }
}

// grid (splits, kv_heads * chunks, rows), as attention_kernel's.
template <class T, int LANES, int G>
__global__ void __launch_bounds__(THREADS, G == 1 ? 3 : 2)
    staged_kernel(const __grid_constant__ AttentionArgs a, int chunks, int stages) {
  __shared__ Place p;
  const bool sifts = stages == MIX;  // a launch of its own follows a choice
  if (threadIdx.x == 0)
    p = place_of<G>(a, chunks, [&](int tier, int row, int kv_head) {
      return Entries(a, tier, row, kv_head, sifts).count;
    });
  __syncthreads();
  if (stages & SCAN) {
    scan_tiers<T, LANES, G>(a, p);
    __syncthreads();  // what the block's other groups have written is read next
  }
  if (!(stages & MIX)) return;
  Running run[G];
#pragma unroll
  for (int g = 0; g < G; ++g) run[g] = Running{AVL_LOWEST, 0, {}};
  mix_tiers<T, LANES, G>(a, p, sifts, run);
  finish<T, LANES, G>(a, p, run, [&](int head, float lse) {
    if (sifts && threadIdx.x == 0) account(a, p.row, head, lse);
  });
}

}  // namespace avl
