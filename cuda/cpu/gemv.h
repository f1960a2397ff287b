// y = x W^T + bias for 1 to 32 rows of x: decoding reads every weight once and computes little, so
// all that matters is to keep memory busy. A few rows of W are read side by side, each by one long
// run, and meet all rows of x in registers, while the rows after them are fetched into the
// second-level cache: the processor's own fetching stops at the end of a page, and a row is few
// pages long. With AVX512-BF16 two products fit one instruction.
#pragma once

#include "vec.h"

namespace avl {
namespace AVL_ISA {

// Rows of W side by side: eight runs keep memory busiest, so long as their sums fit 32 registers,
// or nearly: a few that are spilled cost less than fewer runs do.
template <int R>
constexpr int OUTS = R <= 4   ? 8
                     : R <= 6 ? 6
                              : 4;

template <class T, class Y>
static inline const typename Lane<T, Y>::X* input_row(const GemvArgs& a, int row) {
  if constexpr (sizeof(typename Lane<T, Y>::X) == sizeof(Y))
    return static_cast<const typename Lane<T, Y>::X*>(a.x) + row * a.x_row;
  else
    return reinterpret_cast<const typename Lane<T, Y>::X*>(a.scratch + row * a.in);
}

// `outs` outputs from `first` for R rows of x from `row`.
template <class T, class Y, int R, int outs>
static void gemv_block(const GemvArgs& a, const GemvPart& part, int64_t first, int row = 0) {
  using L = Lane<T, Y>;
  const T* w[outs];
  for (int o = 0; o < outs; ++o) {  // past the end: repeat the last row, drop its result below
    const int64_t out = first + o < part.out ? first + o : part.out - 1;
    w[o] = static_cast<const T*>(part.weight) + out * a.in;
  }
  const typename L::X* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = input_row<T, Y>(a, row + r);
  const int64_t ahead = outs * a.in;
  vf acc[outs][R] = {};
  int64_t i = 0;
  for (; i + L::width <= a.in; i += L::width) {
    L weight[outs];
    for (int o = 0; o < outs; ++o) {
      __builtin_prefetch(w[o] + i + ahead, 0, 2);  // harmless past the end
      weight[o] = L::weight(w[o] + i);
    }
    for (int r = 0; r < R; ++r) {
      const L x = L::input(rows[r] + i);
      for (int o = 0; o < outs; ++o) acc[o][r] = L::multiply_add(acc[o][r], weight[o], x);
    }
  }
  for (int o = 0; o < outs && first + o < part.out; ++o)
    for (int r = 0; r < R; ++r) {
      float y = sum(acc[o][r]);
      for (int64_t j = i; j < a.in; ++j) y += to_float(w[o][j]) * to_float(rows[r][j]);
      if (part.bias) y += to_float(static_cast<const Y*>(part.bias)[first + o]);
      static_cast<Y*>(part.y)[(row + r) * part.out + first + o] = from_float<Y>(y);
    }
}

// Calls block(part, first) for every `outs` outputs of all parts, in one parallel run: who is done
// with one part goes on with the next.
template <class T, int outs, class Block>
static void for_blocks(const GemvArgs& a, Block block) {
  const int64_t run = (1 << 18) / (a.in * outs * int64_t(sizeof(T))) + 1;  // 256 KB for each grab
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  for (int p = 0; p < a.part_count; ++p) {
    const GemvPart& part = a.parts[p];
    const int64_t blocks = (part.out + outs - 1) / outs;
#pragma omp for schedule(dynamic, run) nowait
    for (int64_t b = 0; b < blocks; ++b) block(part, b * outs);
  }
}

// R rows of x, or eight at a time and then R, which find W in the cache.
template <class T, class Y, int R>
static int gemv_rows(const GemvArgs& a) {
  if (a.rows <= 8)
    for_blocks<T, OUTS<R>>(a, [&](const GemvPart& part, int64_t first) {
      gemv_block<T, Y, R, OUTS<R>>(a, part, first);
    });
  else
    for_blocks<T, OUTS<8>>(a, [&](const GemvPart& part, int64_t first) {
      for (int row = 0; row < a.rows - R; row += 8)
        gemv_block<T, Y, 8, OUTS<8>>(a, part, first, row);
      gemv_block<T, Y, R, OUTS<8>>(a, part, first, a.rows - R);
    });
  return ok;
}

template <class T, class Y = T>
static int gemv(const GemvArgs& a) {
  if constexpr (sizeof(typename Lane<T, Y>::X) != sizeof(Y))
    for (int64_t i = 0; i < a.rows * a.in; ++i)
      a.scratch[i] = to_float(static_cast<const Y*>(a.x)[i / a.in * a.x_row + i % a.in]);
  switch ((a.rows - 1) % 8) {
    case 0: return gemv_rows<T, Y, 1>(a);
    case 1: return gemv_rows<T, Y, 2>(a);
    case 2: return gemv_rows<T, Y, 3>(a);
    case 3: return gemv_rows<T, Y, 4>(a);
    case 4: return gemv_rows<T, Y, 5>(a);
    case 5: return gemv_rows<T, Y, 6>(a);
    case 6: return gemv_rows<T, Y, 7>(a);
    case 7: return gemv_rows<T, Y, 8>(a);
  }
  return unsupported;
}

// Read memory and do next to nothing else: the peak that efficiency is quoted against.
static double read(const float* data, int64_t count, int32_t threads) {
  double total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total) num_threads(threads)
  for (int64_t block = 0; block < count / 4096; ++block) {
    vf x[4] = {};
    const float* p = data + block * 4096;
    for (int i = 0; i < 4096; i += 4 * W)
      for (int j = 0; j < 4; ++j) {
        __builtin_prefetch(p + 4096 + i + j * W, 0, 2);
        x[j] += load(p + i + j * W);
      }
    total += sum(x[0] + x[1] + x[2] + x[3]);
  }
  return total;
}

}  // namespace AVL_ISA
}  // namespace avl
