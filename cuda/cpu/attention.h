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
#include "pages.h"
#include "vec.h"

namespace avl {
namespace AVL_ISA {

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

// Where token `slot` of a tier begins: its keys or its values.
template <class T>
static inline const char* token_at(const Tier& tier, const void* base, const Side& side,
                                   int32_t stride, int64_t slot) {
  const char* first = static_cast<const char*>(base);
  if (!tier.paged) return first + slot * stride * int64_t(sizeof(T));
  return first + slot / PAGE * tier.page + slot % PAGE * side.block;
}

// `n` tokens from entry `begin` of a part's list on, or of those that `entries` names; false (and
// error set) if one is out of range.
template <class T>
static inline bool read_tokens(const AttentionArgs& a, const Part& part, int begin, int n,
                               const int32_t* entries, Tokens* to) {
  const Tier& tier = a.tiers[part.tier];
  to->n = n;
  for (int t = 0; t < n; ++t) {
    const int entry = entries ? entries[begin + t] : begin + t;
    const int64_t slot = part.slots ? part.slots[entry] : entry;
    if (slot < 0 || slot >= tier.pool_slots) {
      *a.error = 1 + part.tier;
      return false;
    }
    to->slot[t] = slot;
    to->k[t] = token_at<T>(tier, tier.k, tier.key, tier.k_slot, slot);
    to->v[t] = token_at<T>(tier, tier.v, tier.value, tier.v_slot, slot);
  }
  return true;
}

// How many tokens the block from `begin` has.
static inline int block_at(int begin, int end) {
  const int left = end - begin;
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

// Where behind a token's beginning the key and the value of each of a part's query heads begin, in
// bytes, and the scales of those in few bits.
struct Rows {
  int heads, group;
  int64_t k[MAX_HEADS], v[MAX_HEADS], k_scale[MAX_HEADS], v_scale[MAX_HEADS];
  Rows(const AttentionArgs& a, const Part& part, int64_t size)
      : heads(part.kv_heads * (a.heads / a.kv_heads)), group(a.heads / a.kv_heads) {
    const Tier& t = a.tiers[part.tier];
    for (int h = 0; h < heads; ++h) {
      const int64_t kv_head = part.kv_head + h / group;
      k[h] = kv_head * (t.paged ? t.key.codes : t.k_head * size);
      v[h] = kv_head * (t.paged ? t.value.codes : t.v_head * size);
      k_scale[h] = int64_t(a.kv_heads) * t.key.codes + kv_head * t.key.scales;
      v_scale[h] = int64_t(a.kv_heads) * t.value.codes + kv_head * t.value.scales;
    }
  }
};

// logits[head * BLOCK + t] = q . k for a block of tokens and the part's query heads, four at a
// time.
template <class T, int D>
static void score_block(const Tier& tier, const Rows& rows, const Tokens& tokens,
                        const Query<T, D>* q, float* logits) {
  for (int t = 0; t < tokens.n; ++t)
    for (int first = 0; first < rows.heads; first += 4) {
      vf dots[4] = {};
      for (int j = 0; j < 4; ++j) {
        const int head = first + j < rows.heads ? first + j : rows.heads - 1;
        if (tier.v && (head == 0 || rows.v[head] != rows.v[head - 1]))
          prefetch_row<T, D>(reinterpret_cast<const T*>(tokens.v[t] + rows.v[head]));
        dots[j] =
            products<T, D>(q + head * D, reinterpret_cast<const T*>(tokens.k[t] + rows.k[head]));
      }
      float four[4];
      four_sums(dots[0], dots[1], dots[2], dots[3], four);
      for (int j = 0; j < 4 && first + j < rows.heads; ++j)
        logits[(first + j) * BLOCK + t] = four[j];
    }
}

// A task's queries as the tiers want them, made when one does.
template <class T, int D>
struct Queries {
  const T* from;     // of the first head
  int64_t stride;    // from head to head
  Query<T, D>* own;  // as plain keys want them
  Rounded<D>* few;   // as keys in few bits do
  float* base;       // by channel: of every head
  DType rounded = DType::f32;
  const char* page = nullptr;  // the scales that `few` and `base` are multiplied with

  void take(DType format, int heads) {
    if (format == rounded) return;
    rounded = format;
    for (int h = 0; h < heads; ++h) take_rounded<T, D>(from + h * stride, format, few + h);
  }
  void take_page(const char* channels, const Rows& rows, int first) {
    if (channels == page && rounded == DType::q2) return;
    rounded = DType::q2, page = channels;
    for (int h = 0; h < rows.heads; ++h) {
      const int64_t head = (first + h / rows.group) * int64_t(4 * RUNS<D> * RUN);
      base[h] = by_channel<T, D>(from + h * stride, channels + head, few + h);
    }
  }
};

// The same as score_block in whatever format a tier's keys are.
template <class T, int D>
static void score(const Tier& tier, const Part& part, const Rows& rows, const Tokens& tokens,
                  Queries<T, D>& q, float* logits) {
  if (!tier.paged || tier.key.format < DType::q8)
    return score_block<T, D>(tier, rows, tokens, q.own, logits);
  if (tier.key.format != DType::q2) q.take(tier.key.format, rows.heads);
  auto by_four = [&](int t, auto dot) {
    for (int first = 0; first < rows.heads; first += 4) {
      vf dots[4];
      for (int j = 0; j < 4; ++j) {
        const int head = first + j < rows.heads ? first + j : rows.heads - 1;
        dots[j] = dot(head);
      }
      float four[4];
      four_sums(dots[0], dots[1], dots[2], dots[3], four);
      for (int j = 0; j < 4 && first + j < rows.heads; ++j)
        logits[(first + j) * BLOCK + t] = four[j];
    }
  };
  for (int t = 0; t < tokens.n; ++t) {
    const char* k = tokens.k[t];
    if (tier.key.format == DType::q8) {
      by_four(t, [&](int h) {
        return dot_q8<D>(k + rows.k[h], q.few[h]) * half_at(k + rows.k_scale[h], 0);
      });
    } else if (tier.key.format == DType::q4) {
      by_four(t, [&](int h) { return dot_q4<D>(k + rows.k[h], k + rows.k_scale[h], q.few[h]); });
    } else {
      const char* first = k - tokens.slot[t] % PAGE * tier.key.block;
      q.take_page(first + PAGE * int64_t(tier.key.block), rows, part.kv_head);
      for (int h = 0; h < rows.heads; ++h)
        logits[h * BLOCK + t] = dot_q2<D>(k + rows.k[h], q.few[h], q.base[h]);
    }
  }
}

// Whether values are loaded two vectors at a time, and accumulated in the order of load_two.
template <class T, int D>
constexpr bool BY_TWO = D % (2 * W) == 0;

// acc = acc * keep + sum of weight[t] * v[t] over a block of tokens, for one query head; keys of
// `coming` tokens are fetched meanwhile, if there are any.
template <class T, int D>
static void weigh_block(const Tokens& tokens, int64_t at, const float* weight, float keep,
                        float* acc, const Tokens* coming, int64_t coming_at) {
  vf x[D / W];
  for (int i = 0; i < D / W; ++i) x[i] = load(acc + i * W) * keep;
  for (int t = 0; t < tokens.n; ++t) {
    const T* row = reinterpret_cast<const T*>(tokens.v[t] + at);
    if (coming && t < coming->n)
      prefetch_row<T, D>(reinterpret_cast<const T*>(coming->k[t] + coming_at));
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

// The same for values in few bits, in the order of the numbers.
template <int D>
static void weigh_few(const Side& side, const Tokens& tokens, int64_t at, int64_t scales,
                      const float* weight, float keep, float* acc) {
  if (side.format == DType::q8) return weigh_q8<D>(tokens, at, scales, weight, keep, acc);
  if (side.format == DType::q4) return weigh_runs<4, D>(tokens, at, scales, weight, keep, acc);
  weigh_runs<2, D>(tokens, at, scales, weight, keep, acc);
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

// What a head sums up of a tier in few bits, in the order of the numbers, before it is added to the
// running softmax; `grown` is what that must be multiplied with.
template <int D>
struct Beside {
  float acc[D], grown;
};

// What a thread's tasks need.
template <class T, int D>
struct Space {
  alignas(64) Query<T, D> own[MAX_HEADS * D];
  alignas(64) float logits[MAX_HEADS * BLOCK];
  Rounded<D> few[MAX_HEADS];
  Beside<D> beside[MAX_HEADS];
  float base[MAX_HEADS];

  Queries<T, D> queries(const AttentionArgs& a, int row, int first, int heads) {
    const T* from = static_cast<const T*>(a.q) + row * a.q_row + first * a.q_head;
    for (int h = 0; h < heads; ++h) take_query<T, D>(from + h * a.q_head, own + h * D);
    return {from, a.q_head, own, few, base};
  }
  // For a tier whose values are in few bits; null for others.
  Beside<D>* beside_of(const Tier& tier, int heads) {
    if (!tier.paged || tier.value.format < DType::q8) return nullptr;
    for (int h = 0; h < heads; ++h) beside[h] = Beside<D>{{}, 1.0f};
    return beside;
  }
};

// Take in a block of tokens whose logits are known: run[h * splits] of every query head h goes on
// from where it stands. `next` are the tokens behind them, if they are known.
template <class T, int D>
static void absorb(const AttentionArgs& a, const Part& part, const Rows& rows, const Tokens& tokens,
                   float* logits, Running<D>* run, Beside<D>* beside, const Tokens* next) {
  const Side& side = a.tiers[part.tier].value;
  for (int h = 0; h < rows.heads; ++h) {
    float* mine = logits + h * BLOCK;
    Running<D>& r = run[h * a.splits];
    const float keep = soften(mine, tokens.n, r.m, r.l);
    if (beside) {
      beside[h].grown *= keep;
      weigh_few<D>(side, tokens, rows.v[h], rows.v_scale[h], mine, keep, beside[h].acc);
    } else {
      const Tokens* coming = h % rows.group ? nullptr : next;
      weigh_block<T, D>(tokens, rows.v[h], mine, keep, r.acc, coming, rows.k[h]);
    }
  }
}

// Read every token's bytes once, in order: what is then in the cache has come as a stream, several
// times faster than codes and scales of one head after the other would, which wait for the few
// buffers of the first cache, as prefetches do.
static inline void touch(const char* const* tokens, int n, int32_t bytes) {
  char some = 0;
  for (int t = 0; t < n; ++t)
    for (int32_t at = 0; at < bytes; at += 64) some ^= tokens[t][at];
  __asm__ volatile("" : : "r"(some));
}

// Score a block of tokens, scaled, and keep that where it is wanted: in a.logits, in `more`.
template <class T, int D>
static void score_scaled(const AttentionArgs& a, const Part& part, const Rows& rows,
                         const Tokens& tokens, int begin, Queries<T, D>& q, float* logits,
                         float* more) {
  const Tier& tier = a.tiers[part.tier];
  const int64_t first = int64_t(part.row) * a.heads + part.kv_head * rows.group;
  if (tier.paged) touch(tokens.k, tokens.n, tier.key.block);
  score<T, D>(tier, part, rows, tokens, q, logits);
  for (int h = 0; h < rows.heads; ++h) {
    float* mine = logits + h * BLOCK;
    for (int t = 0; t < tokens.n; ++t) mine[t] *= a.scale;
    for (float* kept : {a.logits, more})
      if (kept)
        __builtin_memcpy(kept + (first + h) * a.width + tier.at + begin, mine,
                         tokens.n * sizeof(float));
  }
}

// Take in a part of a tier.
template <class T, int D>
static void attend_part(const AttentionArgs& a, const Part& part, Queries<T, D>& q, float* logits,
                        Running<D>* run, Beside<D>* beside) {
  const Rows rows(a, part, sizeof(T));
  const Tier& tier = a.tiers[part.tier];
  Tokens tokens[2];  // these and the next
  const int first = block_at(part.begin, part.end);
  if (!read_tokens<T>(a, part, part.begin, first, nullptr, tokens)) return;
  for (int begin = part.begin, now = 0; begin < part.end; begin += BLOCK, now = 1 - now) {
    const int left = block_at(begin + BLOCK, part.end);
    if (!read_tokens<T>(a, part, begin + BLOCK, left, nullptr, tokens + 1 - now)) return;
    score_scaled<T, D>(a, part, rows, tokens[now], begin, q, logits, nullptr);
    if (tier.paged) touch(tokens[now].v, tokens[now].n, tier.value.block);
    absorb<T, D>(a, part, rows, tokens[now], logits, run, beside, tokens + 1 - now);
  }
}

#include "sift.h"

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
