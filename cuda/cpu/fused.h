// The small steps between a decoder layer's products, one pass over memory each; see ../fused.h.
//
// Torch takes several operations for what one loop does here, and each costs more to start than a
// single token's few kilobytes cost to read. Arithmetic is in float, rounded once where it is
// stored. `device` is the number of threads that may serve.
#pragma once

#include "../fused.h"
#include "vec.h"

namespace avl {
namespace AVL_ISA {

constexpr int64_t ONE_THREAD = 1 << 15;  // numbers that one thread is quicker alone with

// How many lanes of the vector from number i of a row are the row's.
static inline int64_t lanes(int64_t size, int64_t i) {
  return size - i < W ? size - i : W;
}

// Calls row(i) for all rows, on several threads where that pays.
template <class F>
static void for_rows(int64_t rows, int64_t size, int threads, F row) {
  if (rows * size < ONE_THREAD) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < rows; ++i) row(i);
}

template <class T>
static int add_norm(const AddNormArgs& a) {
  const T* weight = static_cast<const T*>(a.weight);
  for_rows(a.rows, a.size, a.device, [&](int64_t row) {
    const T* hidden = static_cast<const T*>(a.hidden) + row * a.hidden_row;
    const T* delta = static_cast<const T*>(a.delta) + row * a.delta_row;
    T* sum_of = static_cast<T*>(a.sum) + row * a.size;
    T* normed = static_cast<T*>(a.normed) + row * a.size;
    vf squares = {};
    for (int64_t i = 0; i < a.size; i += W) {
      const int64_t n = lanes(a.size, i);
      store(sum_of + i, load(hidden + i, n) + load(delta + i, n), n);
      const vf stored = load(sum_of + i, n);  // the norm is that of the sum as it is rounded
      squares += stored * stored;
    }
    const float scale = 1 / __builtin_sqrtf(sum(squares) / a.size + a.eps);
    for (int64_t i = 0; i < a.size; i += W) {
      const int64_t n = lanes(a.size, i);
      store(normed + i, load(sum_of + i, n) * scale * load(weight + i, n), n);
    }
  });
  return ok;
}

// One head: numbers i and half + i turn into each other. A: the tables' type.
template <class T, class A>
static void rotate_head(const T* x, const A* cos, const A* sin, int64_t half, float scale, T* to) {
  for (int64_t i = 0; i < half; i += W) {
    const int64_t n = lanes(half, i);
    const vf low = load(x + i, n), high = load(x + half + i, n);
    const vf cos_low = load(cos + i, n), cos_high = load(cos + half + i, n);
    const vf sin_low = load(sin + i, n), sin_high = load(sin + half + i, n);
    store(to + i, (low * cos_low + high * sin_low) * scale, n);
    store(to + half + i, (high * cos_high + low * sin_high) * scale, n);
  }
}

template <class T, class A>
static int rope_write(const RopeWriteArgs& a) {
  const int64_t dim = a.head_dim, half = dim / 2;
  for (int64_t i = 0; i < int64_t(a.rows) * a.kv_heads; ++i)
    if (a.write[i] < 0 || a.write[i] >= a.places) return bad_slot;
  for_rows(a.rows, (a.heads + 2 * a.kv_heads) * dim, a.device, [&](int64_t row) {
    const A* cos = static_cast<const A*>(a.cos) + row * dim;
    const A* sin = static_cast<const A*>(a.sin) + row * dim;
    const float scale = a.scale ? to_float(static_cast<const T*>(a.scale)[row]) : 1;
    const T* q = static_cast<const T*>(a.q) + row * a.q_row;
    const T* k = static_cast<const T*>(a.k) + row * a.k_row;
    const T* v = static_cast<const T*>(a.v) + row * a.v_row;
    T* out = static_cast<T*>(a.out) + row * a.heads * dim;
    for (int64_t h = 0; h < a.heads; ++h)
      rotate_head(q + h * dim, cos, sin, half, scale, out + h * dim);
    for (int64_t h = 0; h < a.kv_heads; ++h) {
      const int64_t place = a.write[row * a.kv_heads + h] * dim;
      rotate_head(k + h * dim, cos, sin, half, 1, static_cast<T*>(a.k_pool) + place);
      __builtin_memcpy(static_cast<T*>(a.v_pool) + place, v + h * dim, dim * sizeof(T));
    }
  });
  return ok;
}

// 1 / (1 + e^-x), by e^-|x|, which cannot overflow.
static inline vf sigmoid(vf x) {
  const vf small = exp(x < 0 ? x : -x);
  return (x < 0 ? small : vf{} + 1.0f) / (1 + small);
}

template <class T>
static int silu_mul(const SiluMulArgs& a) {
  for_rows(a.rows, a.size, a.device, [&](int64_t row) {
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_row;
    const T* up = static_cast<const T*>(a.up) + row * a.up_row;
    T* out = static_cast<T*>(a.out) + row * a.size;
    const float scale = a.scale ? a.scale[row] * a.factor : a.factor;
    for (int64_t i = 0; i < a.size; i += W) {
      const int64_t n = lanes(a.size, i);
      const vf x = load(gate + i, n);
      store(out + i, x * sigmoid(x) * load(up + i, n) * scale, n);
    }
  });
  return ok;
}

// The first of the row's largest numbers; a NaN is larger than all.
template <class T>
static int argmax(const ArgmaxArgs& a) {
  for_rows(a.rows, a.size, a.device, [&](int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_row;
    int64_t best = 0;
    float top = to_float(x[0]);
    for (int64_t i = 1; i < a.size && top == top; ++i) {
      const float here = to_float(x[i]);
      if (here > top || here != here) best = i, top = here;
    }
    a.out[row] = best;
  });
  return ok;
}

}  // namespace AVL_ISA
}  // namespace avl
