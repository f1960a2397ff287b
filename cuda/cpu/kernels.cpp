// Compiled once for each instruction set: picks the kernel for a dtype and a head size.
#include "kernels.h"

#include "attention.h"
#include "fused.h"
#include "gemm.h"
#include "gemv.h"
#include "policy.h"

namespace avl {
namespace AVL_ISA {

// Calls op<T, D>(a) for the T and D that the arguments name.
#define AVL_FOR_SIZE(op, T)         \
  switch (a.head_dim) {             \
    case 16: return op<T, 16>(a);   \
    case 32: return op<T, 32>(a);   \
    case 64: return op<T, 64>(a);   \
    case 80: return op<T, 80>(a);   \
    case 96: return op<T, 96>(a);   \
    case 128: return op<T, 128>(a); \
    default: return unsupported;    \
  }
#define AVL_FOR_TYPE(op)                     \
  switch (a.dtype) {                         \
    case DType::f32: AVL_FOR_SIZE(op, float) \
    case DType::f16: AVL_FOR_SIZE(op, fp16)  \
    case DType::bf16: AVL_FOR_SIZE(op, bf16) \
    default: return unsupported;             \
  }                                          \
  return unsupported;

static int run_attention(const AttentionArgs& a) {
  AVL_FOR_TYPE(attention)
}
static int run_qk(const AttentionArgs& a) {
  AVL_FOR_TYPE(qk)
}
static int run_pv(const AttentionArgs& a){AVL_FOR_TYPE(pv)}
// Calls op<T, Y>(a) for a T of weights and the Y of x that the arguments name.
#define AVL_FOR_X(op, T)                     \
  switch (a.x_dtype) {                       \
    case DType::f32: return op<T, float>(a); \
    case DType::f16: return op<T, fp16>(a);  \
    case DType::bf16: return op<T, bf16>(a); \
    default: return unsupported;             \
  }
#define AVL_FOR_WEIGHTS(op)                                                     \
  const bool wide = a.x_dtype == DType::f32;                                    \
  if (a.dtype < DType::q8 && !wide && a.x_dtype != a.dtype) return unsupported; \
  switch (a.dtype) {                                                            \
    case DType::f32: return op<float, float>(a);                                \
    case DType::f16: return wide ? op<fp16, float>(a) : op<fp16, fp16>(a);      \
    case DType::bf16: return wide ? op<bf16, float>(a) : op<bf16, bf16>(a);     \
    case DType::q8: AVL_FOR_X(op, int8_t)                                       \
    case DType::q4: AVL_FOR_X(op, Q4Block)                                      \
    case DType::q2: break;                                                      \
  }                                                                             \
  return unsupported;

static int run_gemv(const GemvArgs& a) {
  AVL_FOR_WEIGHTS(gemv)
}
static int run_gemm(const GemvArgs& a){AVL_FOR_WEIGHTS(gemm)}
// Calls op<T>(a) for the T that the arguments name.
#define AVL_BY_TYPE(op)                   \
  switch (a.dtype) {                      \
    case DType::f32: return op<float>(a); \
    case DType::f16: return op<fp16>(a);  \
    case DType::bf16: return op<bf16>(a); \
    default: return unsupported;          \
  }                                       \
  return unsupported;

static int run_add_norm(const AddNormArgs& a, void*) {
  AVL_BY_TYPE(add_norm)
}
template <class T>
static int rope_write_by_table(const RopeWriteArgs& a) {
  return a.wide ? rope_write<T, float>(a) : rope_write<T, T>(a);
}
static int run_rope_write(const RopeWriteArgs& a, void*) {
  AVL_BY_TYPE(rope_write_by_table)
}
static int run_silu_mul(const SiluMulArgs& a, void*) {
  AVL_BY_TYPE(silu_mul)
}
static int run_argmax(const ArgmaxArgs& a, void*){AVL_BY_TYPE(argmax)}

#define AVL_TEXT(x) AVL_TEXT_(x)
#define AVL_TEXT_(x) #x
extern const CpuKernels table;
const CpuKernels table = {AVL_TEXT(AVL_ISA),
                          run_attention,
                          run_qk,
                          run_pv,
                          run_gemv,
                          run_gemm,
                          sizeof(GemmSpace),
                          {run_add_norm, run_rope_write, run_silu_mul, run_argmax},
                          {rank, age},
                          read};

}  // namespace AVL_ISA
}  // namespace avl
