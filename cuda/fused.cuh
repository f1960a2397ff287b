// The small kernels around a decoder layer's products: each replaces several launches of torch.
//
// At one token per row they move a few kilobytes: what counts is how many there are, and that each
// reads what it needs once. All arithmetic is in float, rounded once where it is stored.
#pragma once

#include "device.cuh"
#include "fused.h"

namespace avl {

// grid (rows). The norm is that of the sum as it is stored, rounded to T.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) add_norm_kernel(const AddNormArgs a) {
  const int64_t row = blockIdx.x, at = row * a.size;
  const T* hidden = static_cast<const T*>(a.hidden) + row * a.hidden_row;
  const T* delta = static_cast<const T*>(a.delta) + row * a.delta_row;
  const T* weight = static_cast<const T*>(a.weight);
  T *sum = static_cast<T*>(a.sum) + at, *normed = static_cast<T*>(a.normed) + at;
  float squares = 0;
  for (int i = threadIdx.x * N; i < a.size; i += THREADS * N) {
    Pack<T, N> x = load_pack<N>(hidden + i);
    const Pack<T, N> added = load_pack<N>(delta + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      assign(x.x[j], to_float(x.x[j]) + to_float(added.x[j]));
      squares += to_float(x.x[j]) * to_float(x.x[j]);
    }
    store_pack(sum + i, x);
  }
  const float scale = 1 / sqrtf(block_sum(squares) / a.size + a.eps);
  for (int i = threadIdx.x * N; i < a.size; i += THREADS * N) {
    Pack<T, N> x = load_pack<N>(sum + i);  // what this very thread wrote
    const Pack<T, N> w = load_pack<N>(weight + i);
#pragma unroll
    for (int j = 0; j < N; ++j) assign(x.x[j], to_float(x.x[j]) * scale * to_float(w.x[j]));
    store_pack(normed + i, x);
  }
}

// The pool's row for a kv head's new token, or -1 with the flag set.
__device__ __forceinline__ int64_t place_to_write(const RopeWriteArgs& a, int row, int kv_head) {
  const int64_t place = a.write[int64_t(row) * a.kv_heads + kv_head];
  if (place >= 0 && place < a.places) return place;
  if (a.error) *a.error = 1;
  return -1;
}

// grid (rows, parts of the heads of q, k and v together): a thread has element i of one head and
// the element half a head further on, which a rotation turns into each other. A: the tables' type.
template <class T, class A>
__global__ void __launch_bounds__(THREADS) rope_write_kernel(const RopeWriteArgs a) {
  const int half = a.head_dim / 2, row = blockIdx.x;
  const int pair = blockIdx.y * THREADS + threadIdx.x, i = pair % half;
  const int head = pair / half, kv_head = (head - a.heads) % a.kv_heads;
  if (head >= a.heads + 2 * a.kv_heads) return;
  const bool query = head < a.heads, value = head >= a.heads + a.kv_heads;
  const int64_t place = query ? int64_t(row) * a.heads + head : place_to_write(a, row, kv_head);
  if (place < 0) return;
  const T* from = static_cast<const T*>(query   ? a.q
                                        : value ? a.v
                                                : a.k) +
                  row * (query   ? a.q_row
                         : value ? a.v_row
                                 : a.k_row) +
                  int64_t(query ? head : kv_head) * a.head_dim + i;
  T* to = static_cast<T*>(query ? a.out : value ? a.v_pool : a.k_pool) + place * a.head_dim + i;
  if (value) {
    to[0] = from[0];
    to[half] = from[half];
    return;
  }
  const A* cos = static_cast<const A*>(a.cos) + int64_t(row) * a.head_dim + i;
  const A* sin = static_cast<const A*>(a.sin) + int64_t(row) * a.head_dim + i;
  const float scale = query && a.scale ? to_float(static_cast<const T*>(a.scale)[row]) : 1;
  const float low = to_float(from[0]), high = to_float(from[half]);
  assign(to[0], (low * to_float(cos[0]) + high * to_float(sin[0])) * scale);
  assign(to[half], (high * to_float(cos[half]) + low * to_float(sin[half])) * scale);
}

// grid (rows, parts of a row).
template <class T, int N>
__global__ void __launch_bounds__(THREADS) silu_mul_kernel(const SiluMulArgs a) {
  const int64_t row = blockIdx.x, i = (int64_t(blockIdx.y) * THREADS + threadIdx.x) * N;
  if (i >= a.size) return;
  Pack<T, N> gate = load_pack<N>(static_cast<const T*>(a.gate) + row * a.gate_row + i);
  const Pack<T, N> up = load_pack<N>(static_cast<const T*>(a.up) + row * a.up_row + i);
  const float scale = a.scale ? a.scale[row] * a.factor : a.factor;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float x = to_float(gate.x[j]);
    assign(gate.x[j], x / (1 + __expf(-x)) * to_float(up.x[j]) * scale);
  }
  store_pack(static_cast<T*>(a.out) + row * a.size + i, gate);
}

__device__ __forceinline__ bool above(float x, int at, float y, int other) {
  const bool x_nan = x != x, y_nan = y != y;
  if (x_nan != y_nan) return x_nan;
  if (!x_nan && x != y) return x > y;
  return at < other;
}

constexpr int ARGMAX_THREADS = 1024;  // a row has one block: many loads in flight

// grid (rows): every thread its own best, then half of the threads compare with the other half.
template <class T, int N>
__global__ void __launch_bounds__(ARGMAX_THREADS) argmax_kernel(const ArgmaxArgs a) {
  __shared__ float best[ARGMAX_THREADS];
  __shared__ int best_at[ARGMAX_THREADS];
  const T* x = static_cast<const T*>(a.x) + blockIdx.x * a.x_row;
  float mine = AVL_LOWEST;
  int mine_at = INT32_MAX;
  for (int64_t i = int64_t(threadIdx.x) * N; i < a.size; i += ARGMAX_THREADS * N) {
    const Pack<T, N> pack = load_pack<N>(x + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (!above(to_float(pack.x[j]), int(i) + j, mine, mine_at)) continue;
      mine = to_float(pack.x[j]);
      mine_at = int(i) + j;
    }
  }
  best[threadIdx.x] = mine;
  best_at[threadIdx.x] = mine_at;
  for (int step = ARGMAX_THREADS / 2; step > 0; step /= 2) {
    __syncthreads();
    const int other = threadIdx.x + step;
    if (int(threadIdx.x) >= step) continue;
    if (!above(best[other], best_at[other], best[threadIdx.x], best_at[threadIdx.x])) continue;
    best[threadIdx.x] = best[other];
    best_at[threadIdx.x] = best_at[other];
  }
  if (threadIdx.x == 0) a.out[blockIdx.x] = best_at[0];
}

}  // namespace avl
