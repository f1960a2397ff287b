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

}  // namespace avl
