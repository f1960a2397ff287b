// Attention of one query per row over listed slots, on the CPU, rows read where they lie.
//
// A task is (row, a few kv heads, a part of the row's lists, tier after tier). A token's heads are
// one run of memory, so a task walks tokens outside and heads inside; 16 tokens at a time. With
// AVX512 their V rows are requested while their K rows are read, and the next 16 tokens' K rows
// while V is read, so that memory is never idle; AVX2 machines read ahead in runs (walk.h:TOUCHED).
// Softmax is online (Milakov and Gimelshein 2018): m, l and acc are rescaled whenever a larger
// logit appears. Parts of a list meet in `partials` and are merged at the end.
#pragma once

#include "sift.h"

namespace avl {
namespace AVL_ISA {

// One part in `splits` of a row's lists, taken as one list, for a few kv heads.
template <class T, int D>
static void attend_task(const AttentionArgs& a, int row, int kv_head, int kv_heads, int split,
                        Space<T, D>& space) {
  const int group = a.heads / a.kv_heads, first = kv_head * group, heads = kv_heads * group;
  Queries<T, D> q = space.queries(a, row, first, heads);
  Running<D>* run = reinterpret_cast<Running<D>*>(a.partials) +
                    (int64_t(row) * a.heads + first) * a.splits + split;
  for (int h = 0; h < heads; ++h) run[h * a.splits] = Running<D>{LOWEST, 0.0f, {}};
  int64_t n = 0;
  for (int tier = 0; tier < a.tier_count; ++tier)
    if (!sifted(a, tier, row)) n += list_count(a, tier, row, kv_head);
  int begin = n * split / a.splits, end = n * (split + 1) / a.splits;
  for (int tier = 0; tier < a.tier_count; ++tier) {  // of what is left, its beginning is here
    Beside<D>* beside = space.beside_of(a.tiers[tier], heads);
    if (sifted(a, tier, row)) {
      attend_chosen<T, D>(a, tier, row, kv_head, kv_heads, split, space.logits, run, beside);
    } else {
      const int count = list_count(a, tier, row, kv_head);
      const int from = begin > 0 ? begin : 0, to = end < count ? end : count;
      if (from < to) {
        const Part part(a, tier, row, kv_head, kv_heads, from, to);
        attend_part<T, D>(a, part, q, space.logits, run, beside);
      }
      begin -= count, end -= count;
    }
    for (int h = 0; beside && h < heads; ++h)
      for (int d = 0; d < D; ++d) {
        float& to = run[h * a.splits].acc[place<T, D>(d)];
        to = to * beside[h].grown + beside[h].acc[d];
      }
  }
}

// Join the parts of one query head's lists, write out, lse and the unused end of its logits.
template <class T, int D>
static void merge_head(const AttentionArgs& a, int row, int head, const Running<D>* parts) {
  float m = LOWEST, l = 0;
  for (int s = 0; s < a.splits; ++s) m = parts[s].m > m ? parts[s].m : m;
  vf acc[D / W] = {};
  for (int s = 0; s < a.splits; ++s) {
    if (parts[s].m == LOWEST && parts[s].l == 0) continue;  // not where all is NaN
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
  const float lse = l == 0 ? LOWEST : m + __builtin_logf(l);
  if (a.lse) a.lse[at] = lse;
  if (a.sieve) rest_of(a, row, head, MAX_TIERS)[1] = lse;
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
    Space<T, D> space;
    auto each = [&](auto work, int64_t task) {
      const int split = task % a.splits, first = task / a.splits % chunks * chunk;
      const int heads = a.kv_heads - first < chunk ? a.kv_heads - first : chunk;
      work(a, task / a.splits / chunks, first, heads, split, space);
    };
    if (a.sieve) {
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; ++task) each(scan_task<T, D>, task);
#pragma omp for schedule(dynamic)
      for (int64_t at = 0; at < int64_t(a.rows) * a.kv_heads; ++at)
        choose(a, at / a.kv_heads, at % a.kv_heads);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) each(attend_task<T, D>, task);
#pragma omp for schedule(static)
    for (int64_t at = 0; at < int64_t(a.rows) * a.heads; ++at)
      merge_head<T, D>(a, at / a.heads, at % a.heads, partials + at * a.splits);
    if (a.sieve) {
#pragma omp for schedule(static)
      for (int64_t at = 0; at < int64_t(a.rows) * a.kv_heads; ++at)
        account(a, at / a.kv_heads, at % a.kv_heads);
    }
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
    const Rows rows(a, part, sizeof(T));
    Tokens tokens;
    for (int begin = 0; begin < used; begin += BLOCK) {
      const int n = block_at(begin, used);
      if (!read_tokens<T>(a, part, begin, n, nullptr, &tokens)) break;
      score_block<T, D>(a.tiers[0], rows, tokens, q, scores);
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
    const int64_t first = int64_t(row) * a.heads + kv_head * group;
    alignas(64) float sums[MAX_HEADS * D];
    for (int i = 0; i < group * D; ++i) sums[i] = 0;
    const int used = list_count(a, 0, row, kv_head);
    const Part part(a, 0, row, kv_head, 1, 0, used);
    const Rows rows(a, part, sizeof(T));
    Tokens tokens;
    for (int begin = 0; begin < used; begin += BLOCK) {
      if (!read_tokens<T>(a, part, begin, block_at(begin, used), nullptr, &tokens)) break;
      for (int g = 0; g < group; ++g)
        weigh_block<T, D>(tokens, rows.v[g], a.p + (first + g) * a.width + begin, 1, sums + g * D,
                          nullptr, 0);
    }
    float* out = static_cast<float*>(a.out) + first * D;
    for (int i = 0; i < group * D; ++i) out[i] = sums[i / D * D + place<T, D>(i % D)];
  }
  return ok;
}

}  // namespace AVL_ISA
}  // namespace avl
