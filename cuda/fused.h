// What the small kernels around a decoder layer's products are told; engine/ops/fused.py defines
// them.
#pragma once

#include "args.h"

namespace avl {

// sum = hidden + delta; normed = sum / sqrt(mean(sum^2) + eps) * weight.
struct AddNormArgs {
  DType dtype;
  int32_t rows, size;
  const void *hidden, *delta;  // [rows, size]
  int64_t hidden_row, delta_row;
  const void* weight;  // [size]
  void *sum, *normed;  // [rows, size] contiguous
  float eps;
  int32_t device;  // the GPU's number; on a CPU how many threads may serve
};

// Rotate q into out; rotate k and write it, and v as it is, to their rows of the pool.
struct RopeWriteArgs {
  DType dtype;  // of q, k, v, scale, out and the pool
  bool wide;    // the tables are float, else of dtype
  int32_t rows, heads, kv_heads, head_dim;
  const void *q, *k, *v;  // [rows, heads or kv_heads, head_dim], heads side by side
  int64_t q_row, k_row, v_row;
  const void *cos, *sin;  // [rows, head_dim] contiguous, the sine's first half negated
  const void* scale;      // [rows] or null: multiplies the rotated q
  void* out;              // [rows, heads, head_dim] contiguous
  void *k_pool, *v_pool;  // [places, head_dim] contiguous
  int64_t places;         // slots of the pool times kv_heads
  const int64_t* write;   // [rows, kv_heads] contiguous: slot * kv_heads + head
  int32_t* error;  // or null; set to 1 where a place is out of range: nothing is written there
  int32_t device;
};

// out = gate / (1 + exp(-gate)) * up.
struct SiluMulArgs {
  DType dtype;
  int32_t rows, size;
  const void *gate, *up;  // [rows, size]
  int64_t gate_row, up_row;
  const float* scale;  // [rows], or null: 1
  float factor;        // of all rows
  void* out;           // [rows, size] contiguous
  int32_t device;
};

// Where each row is largest: the lowest index if tied; a NaN is larger than every number.
struct ArgmaxArgs {
  DType dtype;
  int32_t rows, size;
  const void* x;  // [rows, size]
  int64_t x_row;
  int64_t* out;  // [rows]
  int32_t device;
};

// One implementation of all four; a CPU's takes no stream, refuses a bad place and writes nothing.
struct FusedKernels {
  int (*add_norm)(const AddNormArgs&, void* stream);
  int (*rope_write)(const RopeWriteArgs&, void* stream);
  int (*silu_mul)(const SiluMulArgs&, void* stream);
  int (*argmax)(const ArgmaxArgs&, void* stream);
};

int cuda_add_norm(const AddNormArgs& a, void* stream);
int cuda_rope_write(const RopeWriteArgs& a, void* stream);
int cuda_silu_mul(const SiluMulArgs& a, void* stream);
int cuda_argmax(const ArgmaxArgs& a, void* stream);

}  // namespace avl
