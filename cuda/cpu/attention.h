// Attention of one query per row over listed slots, on the CPU, rows read where they lie.
//
// A task is (row, a few kv heads, a part of the row's lists, tier after tier). A token's heads are
// one run of memory, so a task walks tokens outside and heads inside; 16 tokens at a time. Their V
// rows are requested while their K rows are read, and the next 16 tokens' K rows while V is read:
// memory is never idle, and what was requested is still in the cache when it is needed. Softmax is
// online (Milakov and Gimelshein 2018): m, l and acc are rescaled whenever a larger logit appears.
// Parts of a list meet in `partials` and are merged at the end.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "vec.h"

namespace avl {
namespace AVL_ISA {

constexpr int BLOCK = 16;  // tokens between two updates of the running maximum
constexpr float LOWEST = -__builtin_inff();

// One query head's running softmax over its part of the lists, in `partials`.
template <int D>
struct Running {
  float m, l, acc[D];
};

static inline int list_count(const AttentionArgs& a, int tier, int row, int kv_head) {
  const Tier& t = a.tiers[tier];
  if (!t.count) return t.width;
  int n = t.count[row * t.count_row + kv_head * t.count_list];
  if (n < 0 || n > t.width) {
    *a.error = 1 + tier;
    return 0;
  }
  return n;
}

// Which tokens of a tier a task handles, and for which heads.
struct Part {
  int tier, row, kv_head, kv_heads, begin, end;
  const int32_t* slots;  // null: identity
  Part(const AttentionArgs& a, int tier, int row, int kv_head, int kv_heads, int begin, int end)
      : tier(tier), row(row), kv_head(kv_head), kv_heads(kv_heads), begin(begin), end(end) {
    const Tier& t = a.tiers[tier];
    slots = t.slots ? t.slots + row * t.slots_row + kv_head * t.slots_list : nullptr;
  }
};

// The slots of tokens begin.. of a list, `n` of them checked; false (and error set) if one is out.
static inline bool read_slots(const AttentionArgs& a, const Part& part, int begin, int n,
                              int64_t* slot) {
  for (int t = 0; t < n; ++t) {
    slot[t] = part.slots ? part.slots[begin + t] : begin + t;
    if (slot[t] < 0 || slot[t] >= a.tiers[part.tier].pool_slots) {
      *a.error = 1 + part.tier;
      return false;
    }
  }
  return true;
}

// How many tokens the block from `begin` has.
static inline int block_at(const Part& part, int begin) {
  const int left = part.end - begin;
  return left < 0 ? 0 : left < BLOCK ? left : BLOCK;
}

template <class T, int D>
static inline void prefetch_row(const T* row) {
  for (int byte = 0; byte < int(D * sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + byte, 0, 2);
}

// Keys meet queries by whole steps where those fill a head, else a vector of floats at a time.
template <class T, int D>
using KeyLane = std::conditional_t<D % Step<T, T>::width == 0, Step<T, T>, Lane<T, float>>;
template <class T, int D>
using Query = typename KeyLane<T, D>::X;

// Vectors whose lanes add up to q . row.
template <class T, int D>
static inline vf products(const Query<T, D>* q, const T* row) {
  using L = KeyLane<T, D>;
  vf sums[2] = {};
  for (int d = 0; d < D; d += L::width)
    for (int part = 0; part < L::parts; ++part) {
      vf& sum = sums[L::parts == 2 ? part : d / L::width % 2];
      sum = L::multiply_add(sum, L::weight(row + d, part), L::input(q + d + part * W));
    }
  return sums[0] + sums[1];
}

// A query as `products` wants it.
template <class T, int D>
static inline void take_query(const T* from, Query<T, D>* to) {
  using L = KeyLane<T, D>;
  for (int d = 0; d < D; d += L::width) L::pack(from + d, L::width, to + d);
}

// Where in a token's slot the key and the value of each of a part's query heads begin.
struct Rows {
  int heads;
  int64_t k[MAX_HEADS], v[MAX_HEADS];
  Rows(const AttentionArgs& a, const Part& part) : heads(part.kv_heads * (a.heads / a.kv_heads)) {
    for (int h = 0; h < heads; ++h) {
      const int64_t kv_head = part.kv_head + h / (a.heads / a.kv_heads);
      k[h] = kv_head * a.tiers[part.tier].k_head, v[h] = kv_head * a.tiers[part.tier].v_head;
    }
  }
};

// logits[head * BLOCK + t] = q . k for n tokens and the part's query heads, four at a time.
template <class T, int D>
static void score_block(const Tier& tier, const Rows& rows, const int64_t* slot, int n,
                        const Query<T, D>* q, float* logits) {
  for (int t = 0; t < n; ++t) {
    const T* k = static_cast<const T*>(tier.k) + slot[t] * tier.k_slot;
    const T* v = static_cast<const T*>(tier.v) + slot[t] * tier.v_slot;
    for (int first = 0; first < rows.heads; first += 4) {
      vf dots[4] = {};
      for (int j = 0; j < 4; ++j) {
        const int head = first + j < rows.heads ? first + j : rows.heads - 1;
        if (tier.v && (head == 0 || rows.v[head] != rows.v[head - 1]))
          prefetch_row<T, D>(v + rows.v[head]);
        dots[j] = products<T, D>(q + head * D, k + rows.k[head]);
      }
      float four[4];
      four_sums(dots[0], dots[1], dots[2], dots[3], four);
      for (int j = 0; j < 4 && first + j < rows.heads; ++j)
        logits[(first + j) * BLOCK + t] = four[j];
    }
  }
}

// Rows that will be needed: `n` of them at `slot`.
template <class T>
struct Coming {
  const T* rows;
  int64_t stride;
  const int64_t* slot;
  int n;
};

// Whether values are loaded two vectors at a time, and accumulated in the order of load_two.
template <class T, int D>
constexpr bool BY_TWO = D % (2 * W) == 0;

// acc = acc * keep + sum of weight[t] * v[t] over n tokens, for one query head.
template <class T, int D>
static void weigh_block(const T* v, int64_t v_slot, const int64_t* slot, int n, const float* weight,
                        float keep, float* acc, const Coming<T>& coming) {
  vf x[D / W];
  for (int i = 0; i < D / W; ++i) x[i] = load(acc + i * W) * keep;
  for (int t = 0; t < n; ++t) {
    const T* row = v + slot[t] * v_slot;
    if (t < coming.n) prefetch_row<T, D>(coming.rows + coming.slot[t] * coming.stride);
    if constexpr (BY_TWO<T, D>)
      for (int i = 0; i < D / W; i += 2) {
        vf first, second;
        load_two(row + i * W, first, second);
        x[i] += first * weight[t];
        x[i + 1] += second * weight[t];
      }
    else
      for (int i = 0; i < D / W; ++i) x[i] += load(row + i * W) * weight[t];
  }
  for (int i = 0; i < D / W; ++i) store(acc + i * W, x[i]);
}

// Where number d of a head lies in what weigh_block accumulates.
template <class T, int D>
static inline int place(int d) {
  return BY_TWO<T, D> ? place_of<T>(d) : d;
}

// Turn n logits into weights exp(logit - m) with a new running maximum; gives the factor for what
// was accumulated under the old one.
static inline float soften(float* logits, int n, float& m, float& l) {
  for (int t = n; t < BLOCK; ++t) logits[t] = LOWEST;
  vf top = load(logits);
  for (int t = W; t < BLOCK; t += W) top = larger(top, load(logits + t));
  const float now = largest(larger(top, vf{} + m));
  vf total = {};
  for (int t = 0; t < BLOCK; t += W) {
    vf weight = exp(load(logits + t) - now);
    store(logits + t, weight);
    total += weight;
  }
  float keep = m == LOWEST ? 0.0f : exp(vf{} + (m - now))[0];
  m = now;
  l = l * keep + sum(total);
  return keep;
}

// Take in a part of a tier: run[h * splits] of every query head h goes on from where it stands.
template <class T, int D>
static void attend_part(const AttentionArgs& a, const Part& part, const Query<T, D>* q,
                        float* logits, Running<D>* run, int splits) {
  const int group = a.heads / a.kv_heads, first = part.kv_head * group;
  const Rows rows(a, part);
  const Tier& tier = a.tiers[part.tier];
  const T *k = static_cast<const T*>(tier.k), *v = static_cast<const T*>(tier.v);
  int64_t slots[2][BLOCK];  // of these tokens and of the next
  int now = 0, n = block_at(part, part.begin);
  if (!read_slots(a, part, part.begin, n, slots[now])) return;
  for (int begin = part.begin; begin < part.end; begin += BLOCK, now = 1 - now) {
    const int64_t *slot = slots[now], *next = slots[1 - now];
    const int next_n = block_at(part, begin + BLOCK);
    if (!read_slots(a, part, begin + BLOCK, next_n, slots[1 - now])) return;
    score_block<T, D>(tier, rows, slot, n, q, logits);
    for (int h = 0; h < rows.heads; ++h) {
      float* mine = logits + h * BLOCK;
      for (int t = 0; t < n; ++t) mine[t] *= a.scale;
      if (a.logits) {
        float* kept = a.logits + (int64_t(part.row) * a.heads + first + h) * a.width + tier.at;
        __builtin_memcpy(kept + begin, mine, n * sizeof(float));
      }
      Running<D>& r = run[h * splits];
      const float keep = soften(mine, n, r.m, r.l);
      const Coming<T> coming{k + rows.k[h], tier.k_slot, next, h % group ? 0 : next_n};
      weigh_block<T, D>(v + rows.v[h], tier.v_slot, slot, n, mine, keep, r.acc, coming);
    }
    n = next_n;
  }
}

// One part in `splits` of a row's lists, taken as one list, for a few kv heads.
template <class T, int D>
static void attend_task(const AttentionArgs& a, int row, int kv_head, int kv_heads, int split,
                        Query<T, D>* q, float* logits) {
  const int group = a.heads / a.kv_heads, first = kv_head * group;
  const T* query = static_cast<const T*>(a.q) + row * a.q_row + first * a.q_head;
  Running<D>* run = reinterpret_cast<Running<D>*>(a.partials) +
                    (int64_t(row) * a.heads + first) * a.splits + split;
  for (int h = 0; h < kv_heads * group; ++h) {
    take_query<T, D>(query + h * a.q_head, q + h * D);
    run[h * a.splits] = Running<D>{LOWEST, 0.0f, {}};
  }
  int64_t n = 0;
  for (int tier = 0; tier < a.tier_count; ++tier) n += list_count(a, tier, row, kv_head);
  int begin = n * split / a.splits, end = n * (split + 1) / a.splits;
  for (int tier = 0; tier < a.tier_count; ++tier) {  // of what is left, its beginning is here
    const int count = list_count(a, tier, row, kv_head);
    const int from = begin > 0 ? begin : 0, to = end < count ? end : count;
    if (from < to) {
      const Part part(a, tier, row, kv_head, kv_heads, from, to);
      attend_part<T, D>(a, part, q, logits, run, a.splits);
    }
    begin -= count, end -= count;
  }
}

// Join the parts of one query head's lists, write out, lse and the unused end of its logits.
template <class T, int D>
static void merge_head(const AttentionArgs& a, int row, int head, const Running<D>* parts) {
  float m = LOWEST, l = 0;
  for (int s = 0; s < a.splits; ++s) m = parts[s].m > m ? parts[s].m : m;
  vf acc[D / W] = {};
  for (int s = 0; s < a.splits; ++s) {
    if (parts[s].m == LOWEST) continue;
    const float share = exp(vf{} + (parts[s].m - m))[0];
    l += share * parts[s].l;
    for (int i = 0; i < D / W; ++i) acc[i] += load(parts[s].acc + i * W) * share;
  }
  const int64_t at = int64_t(row) * a.heads + head;
  T* out = static_cast<T*>(a.out) + at * D;
  const float inverse = l == 0 ? 0 : 1 / l;
  float numbers[D];
  for (int i = 0; i < D / W; ++i) store(numbers + i * W, acc[i] * inverse);
  for (int d = 0; d < D; ++d) out[d] = from_float<T>(numbers[place<T, D>(d)]);
  if (a.lse) a.lse[at] = l == 0 ? LOWEST : m + __builtin_logf(l);
  if (!a.logits) return;
  for (int tier = 0; tier < a.tier_count; ++tier) {
    float* logits = a.logits + at * a.width + a.tiers[tier].at;
    const int used = list_count(a, tier, row, head / (a.heads / a.kv_heads));
    for (int t = used; t < a.tiers[tier].width; ++t) logits[t] = LOWEST;
  }
}

template <class T, int D>
static int attention(const AttentionArgs& a) {
  static_assert(D % W == 0);
  const int chunk = cpu_heads_per_task(a);
  const int chunks = (a.kv_heads + chunk - 1) / chunk;
  const int64_t tasks = int64_t(a.rows) * chunks * a.splits;
  const Running<D>* partials = reinterpret_cast<const Running<D>*>(a.partials);
#pragma omp parallel num_threads(a.threads)
  {
    alignas(64) Query<T, D> q[MAX_HEADS * D];
    alignas(64) float logits[MAX_HEADS * BLOCK];
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int split = task % a.splits, first = task / a.splits % chunks * chunk;
      const int row = task / a.splits / chunks;
      const int heads = a.kv_heads - first < chunk ? a.kv_heads - first : chunk;
      attend_task<T, D>(a, row, first, heads, split, q, logits);
    }
#pragma omp for schedule(static)
    for (int64_t at = 0; at < int64_t(a.rows) * a.heads; ++at)
      merge_head<T, D>(a, at / a.heads, at % a.heads, partials + at * a.splits);
  }
  return ok;
}

// The two products alone, of one tier, one task for each (row, kv head): for reading and for
// scoring policies.
template <class T, int D>
static int qk(const AttentionArgs& a) {
  const int group = a.heads / a.kv_heads;
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
  for (int64_t task = 0; task < int64_t(a.rows) * a.kv_heads; ++task) {
    const int row = task / a.kv_heads, kv_head = task % a.kv_heads, first = kv_head * group;
    alignas(64) Query<T, D> q[MAX_HEADS * D];
    alignas(64) float scores[MAX_HEADS * BLOCK];
    for (int g = 0; g < group; ++g) {
      const T* query = static_cast<const T*>(a.q) + row * a.q_row + (first + g) * a.q_head;
      take_query<T, D>(query, q + g * D);
    }
    float* out = a.logits + (int64_t(row) * a.heads + first) * a.width;
    const int used = list_count(a, 0, row, kv_head);
    const Part part(a, 0, row, kv_head, 1, 0, used);
    const Rows rows(a, part);
    int64_t slot[BLOCK];
    for (int begin = 0; begin < used; begin += BLOCK) {
      const int n = used - begin < BLOCK ? used - begin : BLOCK;
      if (!read_slots(a, part, begin, n, slot)) break;
      score_block<T, D>(a.tiers[0], rows, slot, n, q, scores);
      for (int g = 0; g < group; ++g)
        __builtin_memcpy(out + int64_t(g) * a.width + begin, scores + g * BLOCK, n * sizeof(float));
    }
    for (int g = 0; g < group; ++g)
      for (int t = used; t < a.width; ++t) out[int64_t(g) * a.width + t] = LOWEST;
  }
  return ok;
}

template <class T, int D>
static int pv(const AttentionArgs& a) {
  const int group = a.heads / a.kv_heads;
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
  for (int64_t task = 0; task < int64_t(a.rows) * a.kv_heads; ++task) {
    const int row = task / a.kv_heads, kv_head = task % a.kv_heads;
    const T* v = static_cast<const T*>(a.tiers[0].v) + kv_head * a.tiers[0].v_head;
    const int64_t first = int64_t(row) * a.heads + kv_head * group;
    alignas(64) float sums[MAX_HEADS * D];
    for (int i = 0; i < group * D; ++i) sums[i] = 0;
    const int used = list_count(a, 0, row, kv_head);
    const Part part(a, 0, row, kv_head, 1, 0, used);
    int64_t slot[BLOCK];
    for (int begin = 0; begin < used; begin += BLOCK) {
      const int n = used - begin < BLOCK ? used - begin : BLOCK;
      if (!read_slots(a, part, begin, n, slot)) break;
      for (int g = 0; g < group; ++g)
        weigh_block<T, D>(v, a.tiers[0].v_slot, slot, n, a.p + (first + g) * a.width + begin, 1,
                          sums + g * D, {});
    }
    float* out = static_cast<float*>(a.out) + first * D;
    for (int i = 0; i < group * D; ++i) out[i] = sums[i / D * D + place<T, D>(i % D)];
  }
  return ok;
}

}  // namespace AVL_ISA
}  // namespace avl
