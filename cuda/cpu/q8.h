// y = x W^T + bias for W in eight bits and a few rows of x. Codes are widened to 16 bits and x is
// rounded to 16 bits in runs of 64: whole numbers multiply two at a time, where as floats every
// code would be widened four times over and converted, which takes longer than reading it does.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace avl {
namespace AVL_ISA {

constexpr int Q8_RUN = 64;

// 64 numbers of a row of x: scale * code, zeros beyond its end.
struct X16Block {
  int16_t codes[Q8_RUN];
  float scale;
};

static inline int64_t q8_runs(const GemvArgs& a) {
  return (a.in + Q8_RUN - 1) / Q8_RUN;
}

// A row of x; a run with a number that is none becomes NaN.
template <class Y>
static void round_to_16(const Y* x, int64_t in, X16Block* to) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
  for (int64_t left = in; left > 0; left -= Q8_RUN, x += Q8_RUN, ++to) {
    float numbers[Q8_RUN] = {};
    for (int i = 0; i < Q8_RUN && i < left; i += W)
      store(numbers + i, load(x + i, left - i < W ? left - i : W));
    vf most = {}, wrong = {};
    for (int i = 0; i < Q8_RUN; i += W) {
      const vf one = load(numbers + i), size = larger(one, -one);
      most = larger(size, most), wrong += one * 0;
    }
    const float top = largest(most), inverse = top > 0 ? 32767 / top : 0;
    for (int i = 0; i < Q8_RUN; i += W) {
      typedef int16_t vs __attribute__((vector_size(2 * W)));
      const vf shifted = rounded_product(load(numbers + i), vf{} + inverse) + magic;
      const vs codes = __builtin_convertvector((vi)shifted & 0xffff, vs);
      __builtin_memcpy(to->codes + i, &codes, sizeof codes);
    }
    to->scale = top / 32767 + sum(wrong);
  }
}

#if defined(__AVX512BW__)
typedef __m512i code16;  // 32 codes
static inline code16 widen(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline vf dot(const code16* w, const int16_t* x) {
  const __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(x + 32);
#if defined(__AVX512VNNI__)
  const __m512i sums = _mm512_dpwssd_epi32(_mm512_madd_epi16(w[0], a), w[1], b);
#else
  const __m512i sums = _mm512_add_epi32(_mm512_madd_epi16(w[0], a), _mm512_madd_epi16(w[1], b));
#endif
  return (vf)_mm512_cvtepi32_ps(sums);
}
#elif defined(__AVX2__)
typedef __m256i code16;  // 16 codes
static inline code16 widen(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline vf dot(const code16* w, const int16_t* x) {
  auto part = [&](int i) {
    return _mm256_madd_epi16(w[i], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x) + i));
  };
  return (vf)_mm256_cvtepi32_ps(
      _mm256_add_epi32(_mm256_add_epi32(part(0), part(1)), _mm256_add_epi32(part(2), part(3))));
}
#else
struct code16 {  // four lanes' codes, one after the other
  int16_t of[Q8_RUN];
};
static inline code16 widen(const int8_t* p) {
  code16 w;
  for (int i = 0; i < Q8_RUN; ++i) w.of[i] = p[i];
  return w;
}
static inline vf dot(const code16* w, const int16_t* x) {
  vi sums = {};
  for (int lane = 0; lane < W; ++lane) {
    int32_t sum = 0;
    for (int i = 0; i < Q8_RUN / W; ++i) {
      const int at = lane * (Q8_RUN / W) + i;
      sum += int32_t(w->of[at]) * x[at];
    }
    sums[lane] = sum;
  }
  return __builtin_convertvector(sums, vf);
}
#endif
constexpr int CODES = sizeof(code16) / sizeof(int16_t), PARTS = Q8_RUN / CODES;

// Some outputs from `first` for R rows of x from `row`; the rows of W after them are fetched.
template <class Y, int R, int outs>
static void q8_block(const GemvArgs& a, const GemvPart& part, int64_t first, int row) {
  const int64_t runs = q8_runs(a);
  const X16Block* x = reinterpret_cast<const X16Block*>(a.scratch) + row * runs;
  const int8_t* w[outs];
  vf acc[outs][R] = {};
  for (int o = 0; o < outs; ++o) {  // past the end: repeat the last row, drop its result below
    const int64_t out = first + o < part.out ? first + o : part.out - 1;
    w[o] = static_cast<const int8_t*>(part.weight) + out * a.in;
  }
  for (int64_t b = 0; b < runs; ++b, ++x)
    for (int o = 0; o < outs; ++o) {
      const int8_t* codes = w[o] + b * Q8_RUN;
      int8_t rest[Q8_RUN];
      if ((b + 1) * Q8_RUN > a.in) {
        __builtin_memset(rest, 0, Q8_RUN);
        __builtin_memcpy(rest, codes, a.in - b * Q8_RUN);
        codes = rest;
      } else if (row == 0) {
        __builtin_prefetch(codes + outs * a.in, 0, 2);  // harmless past the end
      }
      code16 wide[PARTS];
      for (int i = 0; i < PARTS; ++i) wide[i] = widen(codes + i * CODES);
      for (int r = 0; r < R; ++r) {
        const X16Block& mine = x[r * runs];
        acc[o][r] += dot(wide, mine.codes) * mine.scale;
      }
    }
  const Y* bias = static_cast<const Y*>(part.bias);
  for (int o = 0; o < outs && first + o < part.out; ++o)
    for (int r = 0; r < R; ++r) {
      const int64_t at = first + o;
      const float total = sum(acc[o][r]) * part.scale[at] + (bias ? to_float(bias[at]) : 0);
      static_cast<Y*>(part.y)[(row + r) * part.out + at] = from_float<Y>(total);
    }
}

constexpr int Q8_OUTS = 8;  // rows of W that are read side by side

// All rows for a few outputs: a few at a time, which find the weights in the cache after the first.
template <class Y>
static void q8_outputs(const GemvArgs& a, const GemvPart& part, int64_t first) {
  auto few = [&](auto rows, auto outs, int row) {
    for (int o = 0; o < Q8_OUTS && first + o < part.out; o += outs.value)
      q8_block<Y, rows.value, outs.value>(a, part, first + o, row);
  };
  int row = 0;
  for (; row + 4 <= a.rows; row += 4)
    few(std::integral_constant<int, 4>(), std::integral_constant<int, 2>(), row);
  switch (a.rows - row) {
    case 1:
      return few(std::integral_constant<int, 1>(), std::integral_constant<int, Q8_OUTS>(), row);
    case 2: return few(std::integral_constant<int, 2>(), std::integral_constant<int, 4>(), row);
    case 3: return few(std::integral_constant<int, 3>(), std::integral_constant<int, 2>(), row);
  }
}

template <class Y>
static int q8_gemv(const GemvArgs& a) {
  X16Block* x16 = reinterpret_cast<X16Block*>(a.scratch);
  for (int r = 0; r < a.rows; ++r)
    round_to_16(static_cast<const Y*>(a.x) + r * a.x_row, a.in, x16 + r * q8_runs(a));
  const int64_t run = (1 << 18) / (a.in * Q8_OUTS) + 1;  // 256 KB for each grab
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  for (int p = 0; p < a.part_count; ++p) {
    const GemvPart& part = a.parts[p];
#pragma omp for schedule(dynamic, run) nowait
    for (int64_t b = 0; b < (part.out + Q8_OUTS - 1) / Q8_OUTS; ++b)
      q8_outputs<Y>(a, part, b * Q8_OUTS);
  }
  return ok;
}

}  // namespace AVL_ISA
}  // namespace avl
