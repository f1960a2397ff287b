// What every launcher needs: the tensors' device, how many blocks, whether the launch went well.
#pragma once

#include "args.h"
#include "device.cuh"

namespace avl {

#ifdef AVL_EMULATED
static inline int launched() {
  return ok;
}
struct OnDevice {
  explicit OnDevice(int) {}
};
#else
static inline int launched() {
  return cudaPeekAtLastError() == cudaSuccess ? ok : cuda_error;
}

// Launch on the tensors' device, then return to the one that was current.
struct OnDevice {
  int before = 0;
  explicit OnDevice(int device) {
    cudaGetDevice(&before);
    cudaSetDevice(device);
  }
  ~OnDevice() { cudaSetDevice(before); }
};
#endif

static inline unsigned parts(int64_t n, int64_t each) {
  return unsigned((n + each - 1) / each);
}

// Calls start<T, LANES>: 8 lanes hold heads of up to 64 numbers, 16 lanes up to 128.
#define AVL_CHOOSE(start, T) a.head_dim <= 64 ? start<T, 8>(a, stream) : start<T, 16>(a, stream)
#define AVL_START(start)                                                            \
  if (a.head_dim % CHUNK || a.head_dim > 128 || a.rows > 65535) return unsupported; \
  if (a.rows == 0) return ok;                                                       \
  const OnDevice here(a.device);                                                    \
  switch (a.dtype) {                                                                \
    case DType::f32: AVL_CHOOSE(start, float); break;                               \
    case DType::f16: AVL_CHOOSE(start, fp16); break;                                \
    case DType::bf16: AVL_CHOOSE(start, bf16); break;                               \
    default: return unsupported;                                                    \
  }                                                                                 \
  return launched();

}  // namespace avl
