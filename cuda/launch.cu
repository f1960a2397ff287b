// Starts the kernels: chooses the template for dtype, head size and query heads per kv head.
#include "launch.h"

#include "attention.cuh"
#include "policy.cuh"
#include "products.cuh"
#include "start.cuh"

namespace avl {

#ifdef AVL_EMULATED
const char* cuda_error_text() {
  return "emulated";
}
#else
const char* cuda_error_text() {
  return cudaGetErrorString(cudaGetLastError());
}
#endif

template <class T, int LANES>
static void start_attention(const AttentionArgs& a, void* stream) {
  const int group = a.heads / a.kv_heads;
  if (group == 1) {
    const dim3 grid(a.splits, a.kv_heads, a.rows);
    AVL_LAUNCH((attention_kernel<T, LANES, 1>), grid, THREADS, stream, a, 1);
  } else {
    const int chunks = (group + 3) / 4;
    const dim3 grid(a.splits, a.kv_heads * chunks, a.rows);
    AVL_LAUNCH((attention_kernel<T, LANES, 4>), grid, THREADS, stream, a, chunks);
  }
}

template <class T, int LANES>
static void start_qk(const AttentionArgs& a, void* stream) {
  const dim3 grid(parts(a.width, 4 * THREADS / LANES), a.kv_heads, a.rows);
  AVL_LAUNCH((qk_kernel<T, LANES>), grid, THREADS, stream, a);
}

template <class T, int LANES>
static void start_pv(const AttentionArgs& a, void* stream) {
  AVL_LAUNCH((pv_kernel<T, LANES>), dim3(a.heads, a.rows), THREADS, stream, a);
}

int cuda_attention(const AttentionArgs& a, void* stream) {
  if (in_stages(a)) return cuda_staged_attention(a, stream);
  AVL_START(start_attention)
}

int cuda_qk(const AttentionArgs& a, void* stream) {
  if (a.width == 0) return ok;
  AVL_START(start_qk)
}

int cuda_pv(const AttentionArgs& a, void* stream) {
  AVL_START(start_pv)
}

int cuda_rank(const RankArgs& a, void* stream) {
  const OnDevice here(a.device);
  AVL_LAUNCH(rank_kernel, dim3(a.problems), THREADS, stream, a);
  return launched();
}

int cuda_age(const AgeArgs& a, void* stream) {
  const OnDevice here(a.device);
  AVL_LAUNCH(age_kernel, dim3(a.kv_heads, a.problems), THREADS, stream, a);
  return launched();
}

}  // namespace avl
