// Starts the products of few rows with weights in few bits: one launch for each linear layer.
#include "gemv.h"

#include "gemv.cuh"
#include "start.cuh"

namespace avl {

template <class X, int ROWS>
static void start(const GemvArgs& a, const GemvPart& part, void* stream) {
  if (a.dtype == DType::q8)
    AVL_LAUNCH((gemv_q8_kernel<X, ROWS>), parts(part.out, WARPS), THREADS, stream, a, part);
  else
    AVL_LAUNCH((gemv_q4_kernel<X, ROWS>), parts(part.out, 8), THREADS, stream, a, part);
}

template <class X>
static void start(const GemvArgs& a, const GemvPart& part, void* stream) {
  if (a.rows == 1)
    start<X, 1>(a, part, stream);
  else if (a.rows == 2)
    start<X, 2>(a, part, stream);
  else if (a.rows <= 4)
    start<X, 4>(a, part, stream);
  else
    start<X, 8>(a, part, stream);
}

int cuda_gemv(const GemvArgs& a, void* stream) {
  if ((a.dtype != DType::q8 && a.dtype != DType::q4) || a.rows > CUDA_GEMV_ROWS) return unsupported;
  const OnDevice here(a.device);
  for (const GemvPart* part = a.parts; part < a.parts + a.part_count; ++part) {
    switch (a.x_dtype) {
      case DType::f32: start<float>(a, *part, stream); break;
      case DType::f16: start<fp16>(a, *part, stream); break;
      case DType::bf16: start<bf16>(a, *part, stream); break;
      default: return unsupported;
    }
  }
  return launched();
}

}  // namespace avl
