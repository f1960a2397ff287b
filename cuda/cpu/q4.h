// y = x W^T + bias for W in four bits and a few rows of x. Eight rows of W lie interleaved, so that
// the lanes of a vector are outputs and nothing is summed across; x is rounded to eight bits in
// groups of 32, as the products are integers then: with floats the loop would take twice as long as
// reading W does.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace avl {
namespace AVL_ISA {

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));

// 32 numbers of a row of x: scale * code; sum is that of the codes.
struct X8Block {
  float scale, sum;
  int8_t codes[32];
};

// Bits of the nearest bf16 in the upper halves; ties to even.
static inline i8 rounded(v8 x) {
  const i8 bits = (i8)x;
  return bits + 0x7fff + (bits >> 16 & 1);
}

// A row of x in whole runs; a run with a number that is none becomes NaN.
template <class Y>
static void round_row(const Y* x, int64_t in, X8Block* to) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
  for (int64_t b = 0; b < in / 32; ++b, x += 32, ++to) {
    vf most = {}, total = {}, wrong = {};
    for (int i = 0; i < 32; i += W) {
      const vf one = load(x + i), size = larger(one, -one);
      most = larger(size, most), wrong += one * 0;
    }
    const float top = largest(most);
    const float inverse = top > 0 ? 127 / top : 0;
    for (int i = 0; i < 32; i += W) {
      typedef int8_t vb __attribute__((vector_size(W)));
      const vf shifted = rounded_product(load(x + i), vf{} + inverse) + magic;
      const vb codes = __builtin_convertvector((vi)shifted & 0xff, vb);
      __builtin_memcpy(to->codes + i, &codes, sizeof codes);
      total += shifted - magic;
    }
    to->scale = top / 127 + sum(wrong);
    to->sum = sum(total);
  }
}

#if defined(__AVX2__)
static inline v8 halves(const uint16_t* p) {
  return (v8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

typedef __m256i code8;

// The codes of a block, number 4 c to 4 c + 3 of each row in vector c.
static inline void unpack(const Q4Block& w, __m256i* codes) {
  const __m256i low = _mm256_set1_epi8(15);
  for (int v = 0; v < 4; ++v) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.codes + 32 * v));
    codes[v] = _mm256_and_si256(both, low);
    codes[v + 4] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
  }
}

static inline v8 dot(const __m256i* codes, const X8Block& x) {
  auto four = [&](int c) {
    int32_t bits;
    __builtin_memcpy(&bits, x.codes + 4 * c, 4);
    return _mm256_set1_epi32(bits);
  };
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  __m256i a = _mm256_setzero_si256(), b = a;
  for (int c = 0; c < 8; c += 2) {
    a = _mm256_dpbusd_epi32(a, codes[c], four(c));
    b = _mm256_dpbusd_epi32(b, codes[c + 1], four(c + 1));
  }
  return (v8)_mm256_cvtepi32_ps(_mm256_add_epi32(a, b));
#else
  __m256i a = _mm256_maddubs_epi16(codes[0], four(0));  // 8 sums of 2 * 15 * 127 fit 16 bits
  for (int c = 1; c < 8; ++c) a = _mm256_add_epi16(a, _mm256_maddubs_epi16(codes[c], four(c)));
  return (v8)_mm256_cvtepi32_ps(_mm256_madd_epi16(a, _mm256_set1_epi16(1)));
#endif
}

// Number k of the eight rows.
static inline v8 numbers(const Q4Block& w, int k) {
  const __m256i both =
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.codes + k % 16 / 4 * 32));
  const __m128i by = _mm_cvtsi32_si128(k % 4 * 8 + k / 16 * 4);
  return (v8)_mm256_cvtepi32_ps(
      _mm256_and_si256(_mm256_srl_epi32(both, by), _mm256_set1_epi32(15)));
}
#else
static inline v8 halves(const uint16_t* p) {
  v8 x;
  for (int r = 0; r < 8; ++r) x[r] = to_float(fp16{p[r]});
  return x;
}

// Number k of the eight rows.
static inline v8 numbers(const Q4Block& w, int k) {
  v8 x;
  const uint8_t* codes = w.codes + k % 16 / 4 * 32 + k % 4;
  for (int r = 0; r < 8; ++r) x[r] = static_cast<float>(codes[4 * r] >> (k / 16 * 4) & 15);
  return x;
}

#if defined(__ARM_NEON)
struct code8 {
  int8x16_t half[2];  // of four rows each
};

static inline void unpack(const Q4Block& w, code8* codes) {
  for (int v = 0; v < 4; ++v)
    for (int h = 0; h < 2; ++h) {
      const uint8x16_t both = vld1q_u8(w.codes + 32 * v + 16 * h);
      codes[v].half[h] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
      codes[v + 4].half[h] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
    }
}

static inline v8 dot(const code8* codes, const X8Block& x) {
  int32x4_t sums[2] = {};
  for (int c = 0; c < 8; ++c) {
    int32_t bits;
    __builtin_memcpy(&bits, x.codes + 4 * c, 4);
    const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(bits));
    for (int h = 0; h < 2; ++h) {
#if defined(__ARM_FEATURE_DOTPROD)
      sums[h] = vdotq_s32(sums[h], codes[c].half[h], four);
#else
      const int8x16_t w = codes[c].half[h];
      const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(four));
      const int16x8_t high = vmull_high_s8(w, four);
      sums[h] = vpadalq_s16(sums[h], vpaddq_s16(low, high));
#endif
    }
  }
  const float32x4_t a = vcvtq_f32_s32(sums[0]), b = vcvtq_f32_s32(sums[1]);
  return v8{a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]};
}
#else
struct code8 {
  uint8_t of[8][4];  // row, number
};

static inline void unpack(const Q4Block& w, code8* codes) {
  for (int v = 0; v < 4; ++v)
    for (int i = 0; i < 32; ++i) {
      codes[v].of[i / 4][i % 4] = w.codes[32 * v + i] & 15;
      codes[v + 4].of[i / 4][i % 4] = w.codes[32 * v + i] >> 4;
    }
}

static inline v8 dot(const code8* codes, const X8Block& x) {
  v8 sums;
  for (int r = 0; r < 8; ++r) {
    int sum = 0;
    for (int c = 0; c < 8; ++c)
      for (int i = 0; i < 4; ++i) sum += codes[c].of[r][i] * x.codes[4 * c + i];
    sums[r] = static_cast<float>(sum);
  }
  return sums;
}
#endif
#endif

// A row's outputs from `first`, as many of a vector as there are.
template <class Y, class V>
static inline void put_outputs(const GemvPart& part, V total, int64_t first, int row) {
  const int64_t left = part.out - first, width = sizeof(V) / sizeof(float);
  const Y* bias = static_cast<const Y*>(part.bias);
  Y* y = static_cast<Y*>(part.y) + row * part.out + first;
  for (int64_t o = 0; o < (left < width ? left : width); ++o)
    y[o] = from_float<Y>(total[o] + (bias ? to_float(bias[first + o]) : 0));
}

// Eight outputs from `first` for R rows of x from `row`.
template <class Y, int R>
static void q4_eight(const GemvArgs& a, const GemvPart& part, int64_t first, int row) {
  const int64_t blocks = a.in / 32;
  const Q4Block* w = static_cast<const Q4Block*>(part.weight) + first / 8 * blocks;
  const X8Block* x = reinterpret_cast<const X8Block*>(a.scratch) + row * blocks;
  v8 acc[R] = {};
  for (int64_t b = 0; b < blocks; ++b, ++w) {
    for (int line = 0; line < 3; ++line)
      __builtin_prefetch(reinterpret_cast<const char*>(w) + 4096 + 64 * line, 0, 2);
    code8 codes[8];
    unpack(*w, codes);
    const v8 scale = halves(w->scale), zero = halves(w->zero);
    for (int r = 0; r < R; ++r) {
      const X8Block& mine = x[r * blocks + b];
      acc[r] += scale * mine.scale * (dot(codes, mine) - zero * mine.sum);
    }
  }
  for (int r = 0; r < R; ++r) put_outputs<Y>(part, acc[r], first, row + r);
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define AVL_Q4_SIXTEEN
// Two registers' worth of memory as one.
static inline __m512i side_by_side(const void* low, const void* high) {
  const __m256i first = _mm256_loadu_si256(static_cast<const __m256i*>(low));
  const __m256i second = _mm256_loadu_si256(static_cast<const __m256i*>(high));
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

static inline __m512 halves_side_by_side(const uint16_t* low, const uint16_t* high) {
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
  const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high));
  return _mm512_cvtph_ps(_mm256_set_m128i(second, first));
}

// Sixteen outputs from `first` for R rows of x from `row`: an instruction does twice as much. With
// fewer rows than four, memory is what is waited for, and one stream of it is read faster than two.
template <class Y, int R>
static void q4_sixteen(const GemvArgs& a, const GemvPart& part, int64_t first, int row) {
  const int64_t blocks = a.in / 32;
  const Q4Block* w = static_cast<const Q4Block*>(part.weight) + first / 8 * blocks;
  // Past the end the last eight are repeated, and their results dropped.
  const Q4Block* v = first + 8 < part.out ? w + blocks : w;
  const X8Block* x = reinterpret_cast<const X8Block*>(a.scratch) + row * blocks;
  const __m512i low = _mm512_set1_epi8(15);
  __m512 acc[R];
  for (int r = 0; r < R; ++r) acc[r] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, ++w, ++v) {
    for (int line = 0; line < 3; ++line) {
      __builtin_prefetch(reinterpret_cast<const char*>(w) + 4096 + 64 * line, 0, 2);
      __builtin_prefetch(reinterpret_cast<const char*>(v) + 4096 + 64 * line, 0, 2);
    }
    __m512i codes[8];
    for (int c = 0; c < 4; ++c) {
      const __m512i both = side_by_side(w->codes + 32 * c, v->codes + 32 * c);
      codes[c] = _mm512_and_si512(both, low);
      codes[c + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    }
    const __m512 scale = halves_side_by_side(w->scale, v->scale);
    const __m512 zero = halves_side_by_side(w->zero, v->zero);
    for (int r = 0; r < R; ++r) {
      const X8Block& mine = x[r * blocks + b];
      __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      for (int c = 0; c < 8; ++c) {
        int32_t four;
        __builtin_memcpy(&four, mine.codes + 4 * c, 4);
        sums[c % 2] = _mm512_dpbusd_epi32(sums[c % 2], codes[c], _mm512_set1_epi32(four));
      }
      const __m512 whole = _mm512_cvtepi32_ps(_mm512_add_epi32(sums[0], sums[1]));
      const __m512 net = _mm512_fnmadd_ps(zero, _mm512_set1_ps(mine.sum), whole);
      acc[r] = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(mine.scale)), net, acc[r]);
    }
  }
  for (int r = 0; r < R; ++r) put_outputs<Y>(part, acc[r], first, row + r);
}
#endif

constexpr int Q4_OUTS = 16;  // of a grab

// All rows for a grab's outputs: a few at a time, which find the weights in the cache after the
// first.
template <class Y>
static void q4_outputs(const GemvArgs& a, const GemvPart& part, int64_t first) {
  int row = 0;
#if defined(AVL_Q4_SIXTEEN)
  for (; row + 8 <= a.rows; row += 8) q4_sixteen<Y, 8>(a, part, first, row);
  for (; row + 4 <= a.rows; row += 4) q4_sixteen<Y, 4>(a, part, first, row);
#endif
  for (int64_t out = first; out < first + Q4_OUTS && out < part.out; out += 8) {
    int next = row;
    for (; next + 4 <= a.rows; next += 4) q4_eight<Y, 4>(a, part, out, next);
    switch (a.rows - next) {
      case 1: q4_eight<Y, 1>(a, part, out, next); break;
      case 2: q4_eight<Y, 2>(a, part, out, next); break;
      case 3: q4_eight<Y, 3>(a, part, out, next); break;
    }
  }
}

template <class Y>
static int q4_gemv(const GemvArgs& a) {
  if (a.in % 32) return unsupported;
  X8Block* x8 = reinterpret_cast<X8Block*>(a.scratch);
  for (int r = 0; r < a.rows; ++r)
    round_row(static_cast<const Y*>(a.x) + r * a.x_row, a.in, x8 + r * (a.in / 32));
  const int64_t bytes = a.in / 32 * int64_t(sizeof(Q4Block)) * (Q4_OUTS / 8);
  const int64_t run = (1 << 18) / bytes + 1;  // 256 KB for a grab
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  for (int p = 0; p < a.part_count; ++p) {
    const GemvPart& part = a.parts[p];
#pragma omp for schedule(dynamic, run) nowait
    for (int64_t b = 0; b < (part.out + Q4_OUTS - 1) / Q4_OUTS; ++b)
      q4_outputs<Y>(a, part, Q4_OUTS * b);
  }
  return ok;
}

// A block as cells of a product of many rows (gemm.h): X is float or, in pairs, bf16. Cell c of the
// eight outputs lies at `to` + c * stride cells.
template <class X, int stride>
static void q4_cells(const Q4Block& w, X* to) {
  const v8 scale = halves(w.scale), zero = halves(w.zero);
  auto number = [&](int k)
                    __attribute__((always_inline)) { return scale * (numbers(w, k) - zero); };
  if constexpr (std::is_same_v<X, float>) {
    for (int k = 0; k < 32; ++k) {
      const v8 x = number(k);
      __builtin_memcpy(to + k * stride, &x, sizeof x);
    }
  } else {
    for (int k = 0; k < 32; k += 2) {
      const i8 low = rounded(number(k)), high = rounded(number(k + 1));
      const i8 pair = (low >> 16 & 0xffff) | (high & ~0xffff);
      __builtin_memcpy(to + k * stride, &pair, sizeof pair);
    }
  }
}

}  // namespace AVL_ISA
}  // namespace avl
