// Starts the small kernels: chooses the dtype, and 16-byte accesses where every row allows them.
#include "fused.h"

#include <initializer_list>

#include "fused.cuh"
#include "start.cuh"

namespace avl {

// Whether rows of `size` numbers at these addresses and strides can be moved 16 bytes at a time.
template <class T>
static bool in_sixteens(int64_t size, std::initializer_list<const void*> addresses,
                        std::initializer_list<int64_t> strides) {
  uint64_t all = uint64_t(size) * sizeof(T);
  for (const void* p : addresses) all |= reinterpret_cast<uintptr_t>(p);
  for (int64_t stride : strides) all |= uint64_t(stride) * sizeof(T);
  return all % 16 == 0;
}

template <class T>
static void start(const AddNormArgs& a, void* stream) {
  constexpr int WIDE = 16 / sizeof(T);
  if (in_sixteens<T>(a.size, {a.hidden, a.delta, a.weight, a.sum, a.normed},
                     {a.hidden_row, a.delta_row}))
    AVL_LAUNCH((add_norm_kernel<T, WIDE>), a.rows, THREADS, stream, a);
  else
    AVL_LAUNCH((add_norm_kernel<T, 1>), a.rows, THREADS, stream, a);
}

template <class T>
static void start(const RopeWriteArgs& a, void* stream) {
  const int64_t pairs = int64_t(a.heads + 2 * a.kv_heads) * (a.head_dim / 2);
  const dim3 grid(a.rows, parts(pairs, THREADS));
  if (a.wide)
    AVL_LAUNCH((rope_write_kernel<T, float>), grid, THREADS, stream, a);
  else
    AVL_LAUNCH((rope_write_kernel<T, T>), grid, THREADS, stream, a);
}

template <class T>
static void start(const SiluMulArgs& a, void* stream) {
  constexpr int WIDE = 16 / sizeof(T);
  if (in_sixteens<T>(a.size, {a.gate, a.up, a.out}, {a.gate_row, a.up_row}))
    AVL_LAUNCH((silu_mul_kernel<T, WIDE>), dim3(a.rows, parts(a.size, THREADS * WIDE)), THREADS,
               stream, a);
  else
    AVL_LAUNCH((silu_mul_kernel<T, 1>), dim3(a.rows, parts(a.size, THREADS)), THREADS, stream, a);
}

template <class T>
static void start(const ArgmaxArgs& a, void* stream) {
  constexpr int WIDE = 16 / sizeof(T);
  if (in_sixteens<T>(a.size, {a.x}, {a.x_row}))
    AVL_LAUNCH((argmax_kernel<T, WIDE>), a.rows, ARGMAX_THREADS, stream, a);
  else
    AVL_LAUNCH((argmax_kernel<T, 1>), a.rows, ARGMAX_THREADS, stream, a);
}

template <class Args>
static int run(const Args& a, void* stream) {
  if (a.rows == 0) return ok;
  const OnDevice here(a.device);
  switch (a.dtype) {
    case DType::f32: start<float>(a, stream); break;
    case DType::f16: start<fp16>(a, stream); break;
    case DType::bf16: start<bf16>(a, stream); break;
  }
  return launched();
}

int cuda_add_norm(const AddNormArgs& a, void* stream) {
  return run(a, stream);
}
int cuda_rope_write(const RopeWriteArgs& a, void* stream) {
  return run(a, stream);
}
int cuda_silu_mul(const SiluMulArgs& a, void* stream) {
  return run(a, stream);
}
int cuda_argmax(const ArgmaxArgs& a, void* stream) {
  return run(a, stream);
}

}  // namespace avl
