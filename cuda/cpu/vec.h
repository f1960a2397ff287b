// One vector of floats, as wide as the instruction set this file is compiled for (AVL_ISA).
//
// GCC's vector types give + - * and comparisons; only loads of 16-bit numbers and the sum of the
// lanes need instructions by name. Everything is static or in a namespace named after the
// instruction set: a function shared between differently compiled objects would be chosen by the
// linker, and an AVX-512 one could then run on a machine without AVX-512.
#pragma once

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include <type_traits>
#include <utility>

#include "../numeric.h"

namespace avl {
namespace AVL_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

static inline vf load(const float* p) {
  vf x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

static inline vf load(const bf16* p) {
  vh half;
  __builtin_memcpy(&half, p, sizeof half);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}

static inline vf load(const fp16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf x;
  for (int i = 0; i < W; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

// By name: GCC widens bytes four times over one by one.
static inline vf load(const int8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  typedef int8_t vb __attribute__((vector_size(W)));
  typedef int16_t vs __attribute__((vector_size(2 * W)));
  vb bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  const vs twice = __builtin_convertvector(bytes, vs);
  return __builtin_convertvector(__builtin_convertvector(twice, vi), vf);
#endif
}

static inline void store(float* p, vf x) {
  __builtin_memcpy(p, &x, sizeof x);
}

// Round to nearest, ties to even, as assign() of numeric.h does for one number.
static inline void store(bf16* p, vf x) {
  const vu bits = (vu)x, rounded = bits + 0x7fff + (bits >> 16 & 1);
  const vh half = __builtin_convertvector((x == x ? rounded : bits | 0x400000) >> 16, vh);
  __builtin_memcpy(p, &half, sizeof half);
}

static inline void store(fp16* p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; ++i) assign(p[i], x[i]);
#endif
}

// 2 W numbers as two vectors: in order, but of bf16 those at even and at odd places, which takes a
// shift and a mask and no shuffle.
template <class T>
static inline void load_two(const T* p, vf& first, vf& second) {
  first = load(p);
  second = load(p + W);
}

static inline void load_two(const bf16* p, vf& even, vf& odd) {
  vu both;
  __builtin_memcpy(&both, p, sizeof both);
  even = (vf)(both << 16);
  odd = (vf)(both & 0xffff0000u);
}

// Where number i of a row that was loaded by load_two lies in the vectors.
template <class T>
static inline int place_of(int i) {
  if (!std::is_same_v<T, bf16>) return i;
  const int within = i % (2 * W);
  return i - within + within % 2 * W + within / 2;
}

// The same for the first n lanes, n <= W: the other lanes are zero, and their places not touched.
template <class T>
static inline vf load(const T* p, int64_t n) {
  if (n == W) return load(p);
  T some[W] = {};
  __builtin_memcpy(some, p, n * sizeof(T));
  return load(some);
}

template <class T>
static inline void store(T* p, vf x, int64_t n) {
  if (n == W) return store(p, x);
  T some[W];
  store(some, x);
  __builtin_memcpy(p, some, n * sizeof(T));
}

static inline float sum(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX2__)
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// The sums of four vectors' lanes, in about half the instructions of four sums.
static inline void four_sums(vf a, vf b, vf c, vf d, float* to) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  auto half = [](vf x) {
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  };
#else
  auto half = [](vf x) { return (__m256)x; };
#endif
  const __m256 ab = _mm256_hadd_ps(half(a), half(b)), cd = _mm256_hadd_ps(half(c), half(d));
  const __m256 all = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d);
#endif
}

// The sums of n vectors' lanes.
static inline void all_sums(const vf* x, int n, float* to) {
  int i = 0;
  for (; i + 4 <= n; i += 4) four_sums(x[i], x[i + 1], x[i + 2], x[i + 3], to + i);
  for (; i < n; ++i) to[i] = sum(x[i]);
}

// A product that is rounded: no addition behind it is fused with it.
static inline vf rounded_product(vf a, vf b) {
  vf product = a * b;
#if defined(__aarch64__)
  __asm__("" : "+w"(product));
#elif defined(__x86_64__)
  __asm__("" : "+v"(product));
#endif
  return product;
}

// Where either is NaN: b.
static inline vf larger(vf a, vf b) {
  return a > b ? a : b;
}

static inline float largest(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float top = x[0];
  for (int i = 1; i < W; ++i) top = x[i] > top ? x[i] : top;
  return top;
#endif
}

// What one step of a dot product loads of its two sides and how it multiplies: W floats, or W pairs
// of bf16 where the processor multiplies those. T is the stored side's type (a weight's, a key's),
// Y the other's: the same, or float.
template <class T, class Y>
struct Lane {
  static constexpr int width = W, parts = 1;
  using X = float;
  vf value;
  static Lane weight(const T* p, int = 0) { return {load(p)}; }
  static Lane input(const float* p) { return {load(p)}; }
  static Lane everywhere(const float* p) { return {*p - vf{}}; }  // in every lane
  // A step of x, of which n numbers are left, as `input` wants it; zero beyond those.
  template <class From>
  static void pack(const From* p, int64_t n, float* to) {
    store(to, n <= 0 ? vf{} : load(p, n < W ? n : W));
  }
  static vf multiply_add(vf acc, Lane w, Lane x) { return acc + w.value * x.value; }
};

// 2 W numbers in order become those at even places and then those at odd ones.
template <int... I>
static inline void part_two(const float* p, float* to, std::integer_sequence<int, I...>) {
  const vf a = load(p), b = load(p + W);
  store(to, __builtin_shufflevector(a, b, 2 * I...));
  store(to + W, __builtin_shufflevector(a, b, (2 * I + 1)...));
}

// The same for bf16 against floats, a vector of those at even places and then one at odd places.
struct EvenOdd : Lane<float, float> {
  static constexpr int width = 2 * W, parts = 2;
  static Lane weight(const bf16* p, int part) {
    vu both;
    __builtin_memcpy(&both, p, sizeof both);
    return {(vf)(part == 0 ? both << 16 : both & 0xffff0000u)};
  }
  template <class From>
  static void pack(const From* p, int64_t n, float* to) {
    if constexpr (std::is_same_v<From, bf16>)
      if (n >= width) return store(to, weight(p, 0).value), store(to + W, weight(p, 1).value);
    float some[width] = {};
    for (int at = 0; at < width; at += W)
      if (n > at) store(some + at, load(p + at, n - at < W ? n - at : W));
    part_two(some, to, std::make_integer_sequence<int, W>());
  }
};

#if defined(__AVX512BF16__)
template <>
struct Lane<bf16, bf16> {
  static constexpr int width = 2 * W, parts = 1;
  using X = bf16;
  __m512bh value;
  static Lane weight(const bf16* p, int = 0) { return {(__m512bh)_mm512_loadu_si512(p)}; }
  static Lane input(const bf16* p) { return weight(p); }
  static Lane everywhere(const bf16* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return {(__m512bh)_mm512_set1_epi32(pair)};
  }
  static void pack(const bf16* p, int64_t n, bf16* to) {
    _mm512_storeu_si512(
        to, n <= 0 ? __m512i{} : _mm512_maskz_loadu_epi16(n < width ? (1u << n) - 1 : ~0u, p));
  }
  static vf multiply_add(vf acc, Lane w, Lane x) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, w.value, x.value);
  }
};

// Codes of q8 are whole in bf16.
template <>
struct Lane<int8_t, bf16> : Lane<bf16, bf16> {
  using Base = Lane<bf16, bf16>;
  static Base weight(const int8_t* p, int = 0) {
    return {_mm512_cvtne2ps_pbh((__m512)load(p + W), (__m512)load(p))};
  }
};
#endif

// What a long dot product of T with Y loads at a time: two vectors of bf16, unless the processor
// multiplies pairs of them.
template <class T, class Y>
using Step =
    std::conditional_t<std::is_same_v<T, bf16> && Lane<T, Y>::width == W, EvenOdd, Lane<T, Y>>;

// e^x for x <= 0, relative error below 2e-7: 2^n by its exponent bits times a polynomial on
// |r| <= ln(2)/2. Below -87 the result stays at e^-87 = 1.6e-38.
static inline vf exp(vf x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const vf given = x;
  x = larger(vf{} - 87.0f, x);
  vf shifted = x * 1.44269504088896f + magic;
  vf n = shifted - magic;
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = r * 1.9841270e-4f + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  vi exponent = (vi)shifted - (vi)(vf{} + magic);
  return given == given ? (vf)((vi)p + (exponent << 23)) : given;  // NaN stays NaN
}

}  // namespace AVL_ISA
}  // namespace avl
