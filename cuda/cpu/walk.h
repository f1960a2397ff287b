// A walk over listed tokens: where they lie, their products with queries in whatever format keys
// are, and the running softmax that their values are taken into. What attention.h and sift.h are
// made of.
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

// Read `bytes` of every token once, from `at` on: what is then in the cache has come as streams,
// several times faster than codes and scales of one head after the other would, which wait for the
// few buffers of the first cache, as prefetches do. Four runs side by side come faster than one.
static inline void touch(const char* const* tokens, int n, int64_t at, int64_t bytes) {
  const int run = (n + 3) / 4;
  char some = 0;
  for (int t = 0; t < run; ++t) {
    const char* from[4];
    for (int i = 0; i < 4; ++i) from[i] = tokens[t + i * run < n ? t + i * run : n - 1] + at;
    for (int64_t line = 0; line < bytes; line += 64)
      for (int i = 0; i < 4; ++i) some ^= from[i][line];
  }
  __asm__ volatile("" : : "r"(some));
}

// Whether plain keys and values are touched before they are used, or else prefetched while what
// comes before them is. On machines that end at AVX2 (measured: Zen 3) the former is a fifth
// faster; others have the latter, beside which it has not been measured there.
constexpr bool TOUCHED = W == 8;

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

// logits[head * BLOCK + t] = q . k of every query head, four at a time: dot(head) gives vectors
// whose lanes add up to it.
template <class Dot>
static inline void score_token(const Rows& rows, int t, float* logits, const Dot& dot) {
  for (int first = 0; first < rows.heads; first += 4) {
    vf dots[4];
    for (int j = 0; j < 4; ++j) dots[j] = dot(first + j < rows.heads ? first + j : rows.heads - 1);
    float four[4];
    four_sums(dots[0], dots[1], dots[2], dots[3], four);
    for (int j = 0; j < 4 && first + j < rows.heads; ++j) logits[(first + j) * BLOCK + t] = four[j];
  }
}

// Touch the keys, or the values, of a part's heads, where that is how they come.
template <class T, int D>
static inline void touch_heads(const Tier& tier, const Tokens& tokens, const Rows& rows,
                               bool keys) {
  const char* const* from = keys ? tokens.k : tokens.v;
  const int64_t* at = keys ? rows.k : rows.v;
  if (tier.paged)
    touch(from, tokens.n, 0, (keys ? tier.key : tier.value).block);
  else if (TOUCHED && (keys ? tier.k_head : tier.v_head) == D)  // heads lie beside each other
    touch(from, tokens.n, at[0], at[rows.heads - 1] - at[0] + D * int64_t(sizeof(T)));
}

// The logits of a block of tokens whose keys are plain; their values are fetched meanwhile, unless
// they are TOUCHED.
template <class T, int D>
static void score_block(const Tier& tier, const Rows& rows, const Tokens& tokens,
                        const Query<T, D>* q, float* logits) {
  for (int t = 0; t < tokens.n; ++t)
    score_token(rows, t, logits, [&](int head) {
      if (!TOUCHED && tier.v && (head == 0 || rows.v[head] != rows.v[head - 1]))
        prefetch_row<T, D>(reinterpret_cast<const T*>(tokens.v[t] + rows.v[head]));
      return products<T, D>(q + head * D, reinterpret_cast<const T*>(tokens.k[t] + rows.k[head]));
    });
}

// The logits of a block of tokens in q4, four tokens at a time; behind the last it is repeated.
template <int D>
static void score_fours(const Rows& rows, const Tokens& tokens, const Rounded<D>* q,
                        float* logits) {
  for (int t = 0; t < tokens.n; t += 4) {
    const char* k[4];
    for (int i = 0; i < 4; ++i) k[i] = tokens.k[t + i < tokens.n ? t + i : tokens.n - 1];
    for (int h = 0; h < rows.heads; ++h)
      dot_four<D>(k, rows.k[h], rows.k_scale[h], q[h], logits + h * BLOCK + t);
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
  if constexpr (FOUR_TOKENS<D>)
    if (tier.key.format == DType::q4) return score_fours<D>(rows, tokens, q.few, logits);
  for (int t = 0; t < tokens.n; ++t) {
    const char* k = tokens.k[t];
    if (tier.key.format == DType::q8) {
      score_token(rows, t, logits, [&](int h) {
        return dot_q8<D>(k + rows.k[h], q.few[h]) * half_at(k + rows.k_scale[h], 0);
      });
    } else if (tier.key.format == DType::q4) {
      score_token(rows, t, logits,
                  [&](int h) { return dot_q4<D>(k + rows.k[h], k + rows.k_scale[h], q.few[h]); });
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
    if (!TOUCHED && coming && t < coming->n)
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

// Score a block of tokens, scaled, and keep that where it is wanted: in a.logits, in `more`.
template <class T, int D>
static void score_scaled(const AttentionArgs& a, const Part& part, const Rows& rows,
                         const Tokens& tokens, int begin, Queries<T, D>& q, float* logits,
                         float* more) {
  const Tier& tier = a.tiers[part.tier];
  const int64_t first = int64_t(part.row) * a.heads + part.kv_head * rows.group;
  touch_heads<T, D>(tier, tokens, rows, true);
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
    touch_heads<T, D>(tier, tokens[now], rows, false);
    absorb<T, D>(a, part, rows, tokens[now], logits, run, beside, tokens + 1 - now);
  }
}

}  // namespace AVL_ISA
}  // namespace avl
