// 16-bit numbers as bits, and how to turn them into float and back; no library needed on any side.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define AVL_BOTH __host__ __device__ static inline
#else
#define AVL_BOTH static inline
#endif

namespace avl {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

AVL_BOTH float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

AVL_BOTH uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}

AVL_BOTH float to_float(float x) {
  return x;
}

// bf16 is the upper half of a float.
AVL_BOTH float to_float(bf16 x) {
  return float_of(static_cast<uint32_t>(x.bits) << 16);
}

AVL_BOTH float to_float(fp16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  uint32_t rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // inf, NaN
  if (rest >= 0x0400) return float_of(sign | ((rest << 13) + (112u << 23)));      // normal
  float tiny = static_cast<float>(rest) * 5.9604644775390625e-8f;                 // rest * 2^-24
  return sign ? -tiny : tiny;
#endif
}

AVL_BOTH void assign(float& to, float x) {
  to = x;
}

// Round to nearest, ties to even; a NaN stays a NaN.
AVL_BOTH void assign(bf16& to, float x) {
  uint32_t bits = bits_of(x);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  bits = nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
  to.bits = static_cast<uint16_t>(bits >> 16);
}

// The same rounding for fp16, by hand where there is no instruction at hand.
AVL_BOTH uint16_t fp16_bits(float x) {
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rn(x));
#else
  uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000;
  uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (rest >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);  // 65536 and more
  if (rest < 0x38800000) {  // below 2^-14: let the adder round to a multiple of 2^-24
    float shifted = float_of(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000));
  }
  uint32_t rounded = rest + 0xfff + (rest >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
#endif
}

AVL_BOTH void assign(fp16& to, float x) {
  to.bits = fp16_bits(x);
}

template <class T>
AVL_BOTH T from_float(float x) {
  T to;
  assign(to, x);
  return to;
}

}  // namespace avl
