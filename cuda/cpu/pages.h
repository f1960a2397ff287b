// Keys and values in few bits, token by token from pages: products with a query, weighted sums.
//
// A query is rounded once a call, so that the products of codes are whole numbers: to 16 bits in
// runs of 64 beside q8, to 8 bits in runs of 32 beside q4 and q2. A run's product is scale *
// (sum of code * query - zero * sum of query). Values are summed up as floats.
#pragma once

#include "q8.h"

namespace avl {
namespace AVL_ISA {

constexpr int BLOCK = 16;  // tokens between two updates of the running maximum
constexpr int RUN = 32;    // numbers that share a scale

template <int D>
constexpr int RUNS = (D + RUN - 1) / RUN;

// Where keys and values of a block's tokens begin.
struct Tokens {
  int n;
  int64_t slot[BLOCK];
  const char *k[BLOCK], *v[BLOCK];
};

// Runs whose halves are multiplied at once beside q4: as many as a vector holds the first halves
// of.
constexpr int runs_at_once(int left) {
#if defined(__AVX512BW__)
  if (left >= 4) return 4;
#endif
  return left >= 2 ? 2 : 1;
}

// Whether four tokens of a head are multiplied with a query at once (dot_four).
#if defined(__AVX2__) && !defined(__AVX512F__)
template <int D>
constexpr bool FOUR_TOKENS = RUNS<D> == 4;
#else
template <int D>
constexpr bool FOUR_TOKENS = false;
#endif

// A query head as keys in few bits meet it. Beside q4 the codes of runs that are multiplied at once
// lie by halves, and there are four lanes for each run.
template <int D>
struct Rounded {
  alignas(64) int8_t codes[RUNS<D> * RUN];
  alignas(64) int16_t wide[(RUNS<D> * RUN + Q8_RUN - 1) / Q8_RUN * Q8_RUN];
  alignas(64) float lane_scale[4 * RUNS<D> + W], lane_sum[4 * RUNS<D> + W];
  alignas(32) float pair_scale[8], pair_sum[8];  // as dot_four wants them
  float scale[RUNS<D>], sum[RUNS<D>], wide_scale[(RUNS<D> * RUN + Q8_RUN - 1) / Q8_RUN];
};

// x as whole numbers of 8 bits: returns the scale; the sum of the codes times it goes to `sum`.
static inline float round_to_8(const float* x, int8_t* codes, float* sum) {
  vf most = {}, wrong = {};
  for (int i = 0; i < RUN; i += W) {
    const vf one = load(x + i), size = larger(one, -one);
    most = larger(size, most), wrong += one * 0;
  }
  const float top = largest(most), inverse = top > 0 ? 127 / top : 0, magic = 12582912.0f;
  int total = 0;
  for (int i = 0; i < RUN; i += W) {
    const vf shifted = rounded_product(load(x + i), vf{} + inverse) + magic;
    const vi whole = (vi)shifted - (vi)(vf{} + magic);
    for (int j = 0; j < W; ++j) {
      codes[i + j] = static_cast<int8_t>(whole[j]);
      total += codes[i + j];
    }
  }
  const float scale = top / 127 + avl::AVL_ISA::sum(wrong);
  *sum = scale * total;
  return scale;
}

// What of a query the keys of a format need.
template <class T, int D>
static void take_rounded(const T* from, DType format, Rounded<D>* to) {
  alignas(64) float x[RUNS<D> * RUN] = {};
  for (int d = 0; d < D; ++d) x[d] = to_float(from[d]);
  if (format == DType::q8) {
    X16Block blocks[(RUNS<D> * RUN + Q8_RUN - 1) / Q8_RUN];
    round_to_16(x, RUNS<D> * RUN, blocks);
    for (int b = 0; b < int(sizeof blocks / sizeof *blocks); ++b) {
      __builtin_memcpy(to->wide + b * Q8_RUN, blocks[b].codes, sizeof blocks[b].codes);
      to->wide_scale[b] = blocks[b].scale;
    }
    return;
  }
  int8_t codes[RUNS<D> * RUN];
  for (int r = 0; r < RUNS<D>; ++r) {
    to->scale[r] = round_to_8(x + r * RUN, codes + r * RUN, to->sum + r);
    for (int lane = 4 * r; lane < 4 * r + 4; ++lane) {
      to->lane_scale[lane] = to->scale[r];
      to->lane_sum[lane] = to->scale[r] != 0 ? to->sum[r] / to->scale[r] / 4 : 0;
    }
  }
  for (int i = 0; i < 8 && FOUR_TOKENS<D>; ++i) {
    const int r = i / 4 + i % 2 * 2;
    to->pair_scale[i] = to->scale[r];
    to->pair_sum[i] = to->scale[r] != 0 ? to->sum[r] / to->scale[r] : 0;
  }
  for (int r = 0, many = 0; r < RUNS<D>; r += many) {
    many = runs_at_once(RUNS<D> - r);
    for (int i = 0; i < RUN * many; ++i) {
      const int half = i / (16 * many), run = r + i % (16 * many) / 16;
      to->codes[r * RUN + i] = codes[run * RUN + 16 * half + i % 16];
    }
  }
}

static inline float half_at(const char* p, int i) {
  fp16 number;
  __builtin_memcpy(&number, p + 2 * i, sizeof number);
  return to_float(number);
}

// Codes of a run, in order.
template <int bits>
static inline void codes_of(const char* p, uint8_t* to) {
  constexpr int bytes = 4 * bits;
  for (int part = 0; part < 8 / bits; ++part)
    for (int i = 0; i < bytes; ++i)
      to[part * bytes + i] = uint8_t(p[i]) >> (part * bits) & ((1 << bits) - 1);
}

#if defined(__AVX2__)
static inline __m256i codes_of_4(const char* p) {
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i halves = _mm256_set_m128i(_mm_srli_epi16(both, 4), both);
  return _mm256_and_si256(halves, _mm256_set1_epi8(15));
}
static inline __m256i codes_of_2(const char* p) {
  int64_t all;
  __builtin_memcpy(&all, p, sizeof all);
  const __m256i parts = _mm256_srlv_epi64(_mm256_set1_epi64x(all), _mm256_set_epi64x(6, 4, 2, 0));
  return _mm256_and_si256(parts, _mm256_set1_epi8(3));
}
// Sums of codes * query: eight lanes that add up to a run's.
static inline __m256i dot_run(__m256i codes, const int8_t* q) {
  const __m256i query = _mm256_load_si256(reinterpret_cast<const __m256i*>(q));
#if defined(__AVX512VNNI__)
  return _mm256_dpbusd_epi32(_mm256_setzero_si256(), codes, query);
#else
  return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, query), _mm256_set1_epi16(1));
#endif
}

static inline float lane_sum(__m256 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#endif

#if defined(__AVX2__)
// The scales of a head's runs and then their zeros, as floats.
template <int D>
static inline __m256 scales_and_zeros(const char* p) {
  __m128i halves = _mm_setzero_si128();
  static_assert(RUNS<D> <= 4);
  __builtin_memcpy(&halves, p, 4 * RUNS<D>);
  return _mm256_cvtph_ps(halves);
}

// Lanes that add up to the products of `many` runs from r on.
template <int D, int many>
static inline __m256 dot_runs(const char* codes, __m256 both, const Rounded<D>& q, int r) {
  const int8_t* query = q.codes + r * RUN;
  const float *scale = q.lane_scale + 4 * r, *sum = q.lane_sum + 4 * r;
  if constexpr (many == 2) {
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 16 * r));
    const __m256i low = _mm256_set1_epi8(15), first = _mm256_and_si256(all, low);
    const __m256i second = _mm256_and_si256(_mm256_srli_epi16(all, 4), low);
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(query));
    const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(query) + 1);
#if defined(__AVX512VNNI__)
    const __m256i whole =
        _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(_mm256_setzero_si256(), first, x), second, y);
#else
    const __m256i whole = _mm256_madd_epi16(
        _mm256_add_epi16(_mm256_maddubs_epi16(first, x), _mm256_maddubs_epi16(second, y)),
        _mm256_set1_epi16(1));
#endif
    const __m256i at =
        _mm256_add_epi32(_mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0), _mm256_set1_epi32(r));
    const __m256 mine = _mm256_permutevar8x32_ps(both, at);
    const __m256 zero =
        _mm256_permutevar8x32_ps(both, _mm256_add_epi32(at, _mm256_set1_epi32(RUNS<D>)));
    const __m256 net = _mm256_fnmadd_ps(zero, _mm256_loadu_ps(sum), _mm256_cvtepi32_ps(whole));
    return _mm256_mul_ps(net, _mm256_mul_ps(mine, _mm256_loadu_ps(scale)));
  } else {
    const __m256i whole = dot_run(codes_of_4(codes + 16 * r), query);
    const __m256i at = _mm256_set1_epi32(r);
    const __m256 mine = _mm256_permutevar8x32_ps(both, at);
    const __m256 zero =
        _mm256_permutevar8x32_ps(both, _mm256_add_epi32(at, _mm256_set1_epi32(RUNS<D>)));
    const __m256 half = _mm256_set1_ps(0.5f * *sum);  // eight lanes for the run, not four
    const __m256 net = _mm256_fnmadd_ps(zero, half, _mm256_cvtepi32_ps(whole));
    return _mm256_mul_ps(net, _mm256_mul_ps(mine, _mm256_set1_ps(*scale)));
  }
}
#endif

// Lanes that add up to q . k of a head in q4, whose scales and then zeros lie at `scales`.
template <int D>
static inline vf dot_q4(const char* codes, const char* scales, const Rounded<D>& q) {
#if defined(__AVX2__)
  const __m256 both = scales_and_zeros<D>(scales);
  constexpr int four = runs_at_once(4) == 4 ? RUNS<D> / 4 * 4 : 0, two = (RUNS<D> - four) / 2 * 2;
  __m256 total = _mm256_setzero_ps();
  for (int r = four; r < four + two; r += 2)
    total = _mm256_add_ps(total, dot_runs<D, 2>(codes, both, q, r));
  if constexpr (four + two < RUNS<D>)
    total = _mm256_add_ps(total, dot_runs<D, 1>(codes, both, q, four + two));
#if defined(__AVX512BW__)
  vf sums = (vf)_mm512_castps256_ps512(total);
  if constexpr (four + two < RUNS<D> || two) sums = (vf)_mm512_zextps256_ps512(total);
  if constexpr (four) {
    static_assert(four == 4);
    const __m512i all = _mm512_loadu_si512(codes), low = _mm512_set1_epi8(15);
    const __m512i first = _mm512_and_si512(all, low);
    const __m512i second = _mm512_and_si512(_mm512_srli_epi16(all, 4), low);
#if defined(__AVX512VNNI__)
    const __m512i whole = _mm512_dpbusd_epi32(
        _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, _mm512_load_si512(q.codes)), second,
        _mm512_load_si512(q.codes + 64));
#else
    const __m512i whole = _mm512_madd_epi16(
        _mm512_add_epi16(_mm512_maddubs_epi16(first, _mm512_load_si512(q.codes)),
                         _mm512_maddubs_epi16(second, _mm512_load_si512(q.codes + 64))),
        _mm512_set1_epi16(1));
#endif
    const __m512i at = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512 wide = _mm512_castps256_ps512(both);
    const __m512 mine = _mm512_permutexvar_ps(at, wide);
    const __m512 zero = _mm512_permutexvar_ps(_mm512_add_epi32(at, _mm512_set1_epi32(4)), wide);
    const __m512 net =
        _mm512_fnmadd_ps(zero, _mm512_load_ps(q.lane_sum), _mm512_cvtepi32_ps(whole));
    const __m512 product = _mm512_mul_ps(net, _mm512_mul_ps(mine, _mm512_load_ps(q.lane_scale)));
    sums = two || four + two < RUNS<D> ? sums + (vf)product : (vf)product;
  }
  return sums;
#else
  return (vf)total;
#endif
#else
  vf sums = {};
  for (int r = 0, many = 0; r < RUNS<D>; r += many) {
    many = runs_at_once(RUNS<D> - r);
    for (int run = r; run < r + many; ++run) {
      uint8_t mine[RUN];
      codes_of<4>(codes + 16 * run, mine);
      int32_t whole = 0;
      for (int i = 0; i < RUN; ++i) {
        const int at = r * RUN + i / 16 * 16 * many + (run - r) * 16 + i % 16;
        whole += int32_t(mine[i]) * q.codes[at];
      }
      const float zero = half_at(scales, RUNS<D> + run);
      sums[0] += half_at(scales, run) * (q.scale[run] * whole - zero * q.sum[run]);
    }
  }
  return sums;
#endif
}

#if defined(__AVX2__)
// Sums of codes * query of a head of four runs: two lanes each of runs 0, 2 | 1, 3.
static inline __m256i dot_codes(const char* codes, const int8_t* query) {
  const __m256i low = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
  const __m256i* q = reinterpret_cast<const __m256i*>(query);
  __m256i sums[2];
  for (int i = 0; i < 2; ++i) {
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes) + i);
    const __m256i first = _mm256_maddubs_epi16(_mm256_and_si256(all, low), q[2 * i]);
    const __m256i second =
        _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(all, 4), low), q[2 * i + 1]);
    sums[i] = _mm256_madd_epi16(_mm256_add_epi16(first, second), one);
  }
  return _mm256_hadd_epi32(sums[0], sums[1]);
}

// Of two tokens the products with runs 0, 2 of each | 1, 3 of each.
template <int D>
static inline __m256 dot_pair(const char* a, const char* b, int64_t codes, int64_t scales,
                              const Rounded<D>& q) {
  const __m256i whole =
      _mm256_hadd_epi32(dot_codes(a + codes, q.codes), dot_codes(b + codes, q.codes));
  const __m128i mine = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + scales));
  const __m128i other = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + scales));
  const __m128i order = _mm_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0);
  const __m256 scale = _mm256_cvtph_ps(_mm_shuffle_epi8(_mm_unpacklo_epi64(mine, other), order));
  const __m256 zero = _mm256_cvtph_ps(_mm_shuffle_epi8(_mm_unpackhi_epi64(mine, other), order));
  const __m256 net = _mm256_fnmadd_ps(zero, _mm256_load_ps(q.pair_sum), _mm256_cvtepi32_ps(whole));
  return _mm256_mul_ps(net, _mm256_mul_ps(scale, _mm256_load_ps(q.pair_scale)));
}

// q . k of four tokens for a head of four runs in q4: without the sums across lanes that one token
// takes, and with its scales beside those of another, in half the instructions.
template <int D>
static inline void dot_four(const char* const* k, int64_t codes, int64_t scales,
                            const Rounded<D>& q, float* to) {
  const __m256 halves = _mm256_hadd_ps(dot_pair<D>(k[0], k[1], codes, scales, q),
                                       dot_pair<D>(k[2], k[3], codes, scales, q));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}
#else
template <int D>
void dot_four(const char* const*, int64_t, int64_t, const Rounded<D>&, float*);  // not called
#endif

// q . k of a head in q2 by channel: `q` is the query times the channels' scales, `base` its product
// with their zeros.
template <int D>
static inline float dot_q2(const char* codes, const Rounded<D>& q, float base) {
  float total = 0;
  for (int r = 0; r < RUNS<D>; ++r) {
#if defined(__AVX2__)
    const __m256i whole = dot_run(codes_of_2(codes + 8 * r), q.codes + r * RUN);
    total += q.scale[r] * lane_sum(_mm256_cvtepi32_ps(whole));
#else
    uint8_t mine[RUN];
    codes_of<2>(codes + 8 * r, mine);
    int32_t whole = 0;
    for (int i = 0; i < RUN; ++i) whole += int32_t(mine[i]) * q.codes[r * RUN + i];
    total += q.scale[r] * whole;
#endif
  }
  return total - base;
}

// q . k of a head in q8.
template <int D>
static inline vf dot_q8(const char* codes, const Rounded<D>& q) {
  vf total = {};
  for (int b = 0; b * Q8_RUN < RUNS<D> * RUN; ++b) {
    const int8_t* mine = reinterpret_cast<const int8_t*>(codes) + b * Q8_RUN;
    code16 wide[PARTS];
    for (int i = 0; i < PARTS; ++i) wide[i] = widen(mine + i * CODES);
    total += dot(wide, q.wide + b * Q8_RUN) * q.wide_scale[b];
  }
  return total;
}

// A query head times a page's channel scales, rounded; returns its product with their zeros.
template <class T, int D>
static float by_channel(const T* from, const char* channels, Rounded<D>* to) {
  alignas(64) float x[RUNS<D> * RUN] = {};
  float base = 0;
  for (int d = 0; d < D; ++d) {
    x[d] = to_float(from[d]) * half_at(channels, d);
    base += x[d] * half_at(channels, RUNS<D> * RUN + d);
  }
  for (int r = 0; r < RUNS<D>; ++r) {
    float unused;
    to->scale[r] = round_to_8(x + r * RUN, to->codes + r * RUN, &unused);
  }
  return base;
}

// W codes of a run from number `first` on, as floats; 4 bits.
static inline vf codes_as_floats(const char* p, int first, std::integral_constant<int, 4>) {
#if defined(__AVX512F__)
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i mine = _mm_and_si128(first ? _mm_srli_epi16(both, 4) : both, _mm_set1_epi8(15));
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(mine));
#elif defined(__AVX2__)
  const __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + first % 16));
  const __m128i mine =
      _mm_and_si128(first >= 16 ? _mm_srli_epi16(both, 4) : both, _mm_set1_epi8(15));
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(mine));
#else
  vf x;
  for (int i = 0; i < W; ++i) x[i] = uint8_t(p[(first + i) % 16]) >> (first / 16 * 4) & 15;
  return x;
#endif
}

// The same of 2 bits.
static inline vf codes_as_floats(const char* p, int first, std::integral_constant<int, 2>) {
#if defined(__AVX2__)
  uint64_t all;
  __builtin_memcpy(&all, p, sizeof all);
  const uint64_t three = 0x0303030303030303u;
  const int64_t low = all >> (first / 8 * 2) & three;
#if defined(__AVX512F__)
  const int64_t high = all >> (first / 8 * 2 + 2) & three;
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_set_epi64x(high, low)));
#else
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(low)));
#endif
#else
  vf x;
  for (int i = 0; i < W; ++i) x[i] = uint8_t(p[(first + i) % 8]) >> ((first + i) / 8 * 2) & 3;
  return x;
#endif
}

// acc = acc * keep + sum of weight[t] * v over n tokens: a head's values in q4 or q2.
template <int bits, int D>
static void weigh_runs(const Tokens& tokens, int64_t codes, int64_t scales, const float* weight,
                       float keep, float* acc) {
  float scaled[BLOCK][8], base[8] = {};  // weight * scale of each run, and that * zero summed up
  for (int t = 0; t < tokens.n; ++t) {
    const char* beside = tokens.v[t] + scales;
#if defined(__AVX2__)
    const __m256 both = scales_and_zeros<D>(beside), mine = both * weight[t];
    const __m256i at =
        _mm256_add_epi32(_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), _mm256_set1_epi32(RUNS<D>));
    _mm256_storeu_ps(scaled[t], mine);  // of runs first
    const __m256 zeros = _mm256_permutevar8x32_ps(both, at);
    _mm256_storeu_ps(base, _mm256_fmadd_ps(mine, zeros, _mm256_loadu_ps(base)));
#else
    for (int r = 0; r < RUNS<D>; ++r) {
      scaled[t][r] = weight[t] * half_at(beside, r);
      base[r] += scaled[t][r] * half_at(beside, RUNS<D> + r);
    }
#endif
  }
  vf x[D / W];
  for (int i = 0; i < D / W; ++i) x[i] = load(acc + i * W) * keep - base[i * W / RUN];
  for (int t = 0; t < tokens.n; ++t) {
    const char* mine = tokens.v[t] + codes;
    for (int r = 0; r < RUNS<D>; ++r)
      for (int i = 0; i < RUN && r * RUN + i < D; i += W)
        x[(r * RUN + i) / W] +=
            codes_as_floats(mine + 4 * bits * r, i, std::integral_constant<int, bits>()) *
            scaled[t][r];
  }
  for (int i = 0; i < D / W; ++i) store(acc + i * W, x[i]);
}

// The same of values in q8.
template <int D>
static void weigh_q8(const Tokens& tokens, int64_t codes, int64_t scales, const float* weight,
                     float keep, float* acc) {
  vf x[D / W];
  for (int i = 0; i < D / W; ++i) x[i] = load(acc + i * W) * keep;
  for (int t = 0; t < tokens.n; ++t) {
    const int8_t* mine = reinterpret_cast<const int8_t*>(tokens.v[t] + codes);
    const float scale = weight[t] * half_at(tokens.v[t] + scales, 0);
    for (int i = 0; i < D / W; ++i) x[i] += load(mine + i * W) * scale;
  }
  for (int i = 0; i < D / W; ++i) store(acc + i * W, x[i]);
}

}  // namespace AVL_ISA
}  // namespace avl
