// y = x W^T + bias for 1 to 32 rows of x: decoding reads every weight once and computes little, so
// all that matters is to keep memory busy. A few rows of W are read side by side, each by a long
// run, and meet a few rows of x in registers, while the rows after them are fetched into the
// second-level cache: the processor's own fetching stops at the end of a page, and a row is few
// pages long. With several rows of x the runs are a stretch of W: so much of x stays in the
// first-level cache. With AVX512-BF16 two products fit one instruction. Weights in q8 are whole
// numbers, whose scale waits for the end of their row.
#pragma once

#include "kernels.h"
#include "q4.h"
#include "q8.h"
#include "vec.h"

namespace avl {
namespace AVL_ISA {

// Rows of W side by side with R rows of x: eight runs keep memory busiest, so long as their sums
// fit the registers (32 of AVX512, else 16).
template <int R>
constexpr int OUTS = W < 16   ? (R == 1   ? 10
                                 : R == 2 ? 4
                                          : 3)
                     : R <= 3 ? 8
                              : 24 / R;
// Whether the rows of W after them are fetched. Machines that end at AVX2 (measured: Zen 3) follow
// ten runs by themselves and read a third more of one row's weights when left alone.
template <int R>
constexpr bool FETCHED = W != 8 || R > 1;
constexpr int MOST_ROWS = W < 16 ? 4 : 8, GROUPS = 4;  // R at most; groups of OUTS that a block has

// Numbers of a stretch: x's of all rows fill a first-level cache.
template <class X>
static inline int64_t depth_of(const GemvArgs& a) {
  const int64_t fitting = (1 << 15) / int64_t(sizeof(X)) / a.rows / 64 * 64;
  const int64_t depth = fitting < 256 ? 256 : fitting, whole = (a.in + 63) / 64 * 64;
  return depth < whole ? depth : whole;
}

// How many times R rows of x it takes, the last of which may begin earlier.
template <int R>
struct Passes {
  int rows, count;
  explicit Passes(int rows) : rows(rows), count((rows + R - 1) / R) {}
  int row(int pass) const { return pass + 1 < count ? pass * R : rows - R; }
};

// x as [stretch][pass][step][R] of what a step takes, zero beyond its end.
template <class T, class Y, int R>
static void pack_input(const GemvArgs& a, int64_t depth) {
  using L = Step<T, Y>;
  const Passes<R> passes(a.rows);
  typename L::X* to = reinterpret_cast<typename L::X*>(a.scratch);
  for (int64_t k = 0; k < a.in; k += depth)
    for (int p = 0; p < passes.count; ++p) {
      const Y* x = static_cast<const Y*>(a.x) + passes.row(p) * a.x_row;
      for (int64_t i = k; i < k + depth; i += L::width)
        for (int r = 0; r < R; ++r, to += L::width) L::pack(x + r * a.x_row + i, a.in - i, to);
    }
}

// sums[outs][R] += a stretch of W, of `n` numbers, by one of x; `fresh`: the first.
template <class L, int R, int outs, bool fetch, class T>
static inline __attribute__((always_inline)) void gemv_tile(const T* const* w,
                                                            const typename L::X* x, int64_t n,
                                                            int64_t ahead, bool fresh, vf* sums) {
  constexpr int line = 64 / sizeof(T);
  const T* from[outs];
  vf acc[outs][R];
  for (int o = 0; o < outs; ++o) {
    from[o] = w[o];
    for (int r = 0; r < R; ++r) acc[o][r] = fresh ? vf{} : sums[o * R + r];
  }
  auto part = [&](int64_t at, int64_t i, int number) __attribute__((always_inline)) {
    if constexpr (R == 1) {  // one weight after the other: sums take the registers
      const auto one = L::input(x + i + number * W);
      for (int o = 0; o < outs; ++o)
        acc[o][0] = L::multiply_add(acc[o][0], L::weight(from[o] + at, number), one);
      return;
    }
    decltype(L::weight(from[0], 0)) weight[outs];
    for (int o = 0; o < outs; ++o) weight[o] = L::weight(from[o] + at, number);
    for (int r = 0; r < R; ++r) {
      const auto one = L::input(x + i * R + r * L::width + number * W);
      for (int o = 0; o < outs; ++o) acc[o][r] = L::multiply_add(acc[o][r], weight[o], one);
    }
    // Loads of what comes next would take registers that sums need.
    if constexpr (R > 2) __asm__ volatile("" ::: "memory");
  };
  auto step = [&](int64_t at, int64_t i) __attribute__((always_inline)) {
    part(at, i, 0);
    if constexpr (L::parts == 2) part(at, i, 1);
  };
  int64_t i = 0;
  for (; i + line <= n; i += line) {
    if constexpr (fetch)
      for (int o = 0; o < outs; ++o)
        __builtin_prefetch(from[o] + i + ahead, 0, 2);  // harmless past the end
    for (int j = 0; j < line; j += L::width) step(i + j, i + j);
  }
  for (; i < n; i += L::width) {  // the end of a row: zero beyond it
    T some[outs][L::width] = {};
    for (int o = 0; o < outs; ++o) {
      __builtin_memcpy(some[o], w[o] + i, (n - i < L::width ? n - i : L::width) * sizeof(T));
      from[o] = some[o];
    }
    step(0, i);
  }
  for (int o = 0; o < outs; ++o)
    for (int r = 0; r < R; ++r) sums[o * R + r] = acc[o][r];
}

// y of outputs from `first` for R rows from `row`.
template <class Y, int R>
static void gemv_finish(const GemvPart& part, const vf* sums, int64_t first, int row) {
  constexpr int outs = OUTS<R>;
  const Y* bias = static_cast<const Y*>(part.bias);
  Y* y = static_cast<Y*>(part.y) + row * part.out;
  float totals[outs * R];
  all_sums(sums, outs * R, totals);
  for (int64_t o = 0, at = first; o < outs && at < part.out; ++o, ++at) {
    const float scale = part.scale ? part.scale[at] : 1, start = bias ? to_float(bias[at]) : 0;
    for (int r = 0; r < R; ++r)
      y[r * part.out + at] = from_float<Y>(scale * totals[o * R + r] + start);
  }
}

// A block of outputs from `first` for all rows of x.
template <class T, class Y, int R>
static void gemv_block(const GemvArgs& a, const GemvPart& part, int64_t first, int64_t depth) {
  using L = Step<T, Y>;
  constexpr int outs = OUTS<R>;
  const Passes<R> passes(a.rows);
  const int64_t left = (part.out - first + outs - 1) / outs, groups = left < GROUPS ? left : GROUPS;
  const typename L::X* x = reinterpret_cast<const typename L::X*>(a.scratch);
  vf sums[GROUPS][32 / MOST_ROWS][outs * R];
  for (int64_t k = 0; k < a.in; k += depth, x += passes.count * R * depth) {
    const int64_t n = a.in - k < depth ? a.in - k : depth;
    for (int64_t g = 0; g < groups; ++g) {
      const T* w[outs];
      for (int o = 0; o < outs; ++o) {  // past the end: repeat the last row, drop its result below
        const int64_t out = first + g * outs + o;
        w[o] =
            static_cast<const T*>(part.weight) + (out < part.out ? out : part.out - 1) * a.in + k;
      }
      const int64_t ahead = g + 1 < groups     ? outs * a.in
                            : k + depth < a.in ? depth - (groups - 1) * outs * a.in
                                               : outs * a.in - k;
      for (int p = 0; p < passes.count; ++p) {
        vf* mine = depth < a.in ? sums[g][p] : sums[0][0];  // between stretches they wait
        if (p == 0)
          gemv_tile<L, R, outs, FETCHED<R>>(w, x, n, ahead, k == 0, mine);
        else
          gemv_tile<L, R, outs, false>(w, x + p * R * depth, n, 0, k == 0, mine);
        if (k + n == a.in) gemv_finish<Y, R>(part, mine, first + g * outs, passes.row(p));
      }
    }
  }
}

// All parts in one parallel run: who is done with one goes on with the next.
template <class T, class Y, int R>
static int gemv_rows(const GemvArgs& a) {
  constexpr int block = OUTS<R> * GROUPS;
  const int64_t depth = depth_of<typename Step<T, Y>::X>(a);
  const int64_t run = (1 << 18) / (a.in * block * int64_t(sizeof(T))) + 1;  // 256 KB for each grab
  pack_input<T, Y, R>(a, depth);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  for (int p = 0; p < a.part_count; ++p) {
    const GemvPart& part = a.parts[p];
#pragma omp for schedule(dynamic, run) nowait
    for (int64_t b = 0; b < (part.out + block - 1) / block; ++b)
      gemv_block<T, Y, R>(a, part, b * block, depth);
  }
  return ok;
}

// As few passes as there can be, and as even.
template <class T, class Y, int R = MOST_ROWS>
static int gemv_passes(const GemvArgs& a) {
  const int passes = (a.rows + MOST_ROWS - 1) / MOST_ROWS;
  if constexpr (R > 1)
    if ((a.rows + passes - 1) / passes < R) return gemv_passes<T, Y, R - 1>(a);
  return gemv_rows<T, Y, R>(a);
}

template <class T, class Y>
static int gemv(const GemvArgs& a) {
  if constexpr (std::is_same_v<T, Q4Block>)
    return q4_gemv<Y>(a);
  else if constexpr (std::is_same_v<T, int8_t>)
    return q8_gemv<Y>(a);
  else
    return gemv_passes<T, Y>(a);
}

// Read memory and do next to nothing else: the peak that efficiency is quoted against. Eight runs
// side by side, as above: one alone does not keep memory as busy.
static double read(const float* data, int64_t count, int32_t threads) {
  constexpr int runs = 8, length = 4096, block = runs * length;
  double total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total) num_threads(threads)
  for (int64_t at = 0; at < count / block; ++at) {
    vf x[runs] = {};
    const float* p = data + at * block;
    for (int i = 0; i < length; i += 16)
      for (int j = 0; j < runs; ++j) {
        __builtin_prefetch(p + block + j * length + i, 0, 2);
        for (int k = 0; k < 16; k += W) x[j] += load(p + j * length + i + k);
      }
    for (const vf& each : x) total += sum(each);
  }
  return total;
}

}  // namespace AVL_ISA
}  // namespace avl
