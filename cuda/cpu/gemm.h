// y = x W^T + bias for many rows of x: a prefill, a picture in its tower. Every weight meets every
// row, so that what counts is arithmetic, and W and x must be where it finds them at once.
//
// As BLIS does it (Van Zee and van de Geijn 2015): a task is a panel of outputs and a chunk of
// rows. It takes W and x a stretch of their inputs at a time, W converted and transposed into the
// second-level cache, a few rows of x into the first-level one; a tile of sums then stays in
// registers for the whole stretch. Between stretches sums wait in float, and are rounded once at
// the end. W is converted as it is packed: no more than a panel of it ever exists twice.
#pragma once

#include "kernels.h"
#include "q4.h"
#include "vec.h"

namespace avl {
namespace AVL_ISA {

// A tile of sums is ROWS x TILE: as many vectors as registers hold beside two of W and one of x.
constexpr int ROWS = W == 16 ? 12 : 6, TILE = 2 * W;
constexpr int DEPTH = 256;  // cells of a stretch
constexpr int PANEL = 192;  // outputs of a task
constexpr int CHUNK = 384,
              FEW = 96;  // rows of a task at most, and at least where threads lack tasks
static_assert(PANEL % TILE == 0 && CHUNK % ROWS == 0);

// Numbers are packed in cells of four bytes: a float, or a pair of bf16 where the processor
// multiplies those.
template <class X>
using Cells = Lane<X, X>;
template <class X>
constexpr int PAIR = Cells<X>::width / W;  // numbers in a cell
// What weights in T become beside x in Y: q4's are numbers of Y.
template <class T, class Y>
using CellOf = typename Lane<std::conditional_t<std::is_same_v<T, Q4Block>, Y, T>, Y>::X;

// W cells of a row of which n numbers are left; zero beyond those.
template <class X, class T>
static inline vf cells_of(const T* row, int64_t n) {
  vf cells = {};
  if (n <= 0) return cells;
  if constexpr (std::is_same_v<X, float>) return load(row, n < W ? n : W);
  if constexpr (std::is_same_v<T, int8_t> && !std::is_same_v<X, float>) {
    T some[Cells<X>::width] = {};
    __builtin_memcpy(some, row, n < Cells<X>::width ? n : Cells<X>::width);
    return (vf)Lane<T, X>::weight(some).value;
  }
  if (n >= Cells<X>::width)
    __builtin_memcpy(&cells, row, sizeof cells);
  else
    __builtin_memcpy(&cells, row, n * sizeof(T));
  return cells;
}

// Rows become columns: log2(W) times the first half of the rows is interleaved with the second.
template <int... I>
static inline void transpose(vf* rows, std::integer_sequence<int, I...>) {
  for (int step = 1; step < W; step *= 2) {
    vf next[W];
    for (int i = 0; i < W / 2; ++i) {
      const vf a = rows[i], b = rows[i + W / 2];
      next[2 * i] = __builtin_shufflevector(a, b, (I / 2 + I % 2 * W)...);
      next[2 * i + 1] = __builtin_shufflevector(a, b, (W / 2 + I / 2 + I % 2 * W)...);
    }
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

// One stretch of W, `numbers` long, for `outs` outputs: tiles of [DEPTH][TILE] cells.
template <class X, class T>
static void pack_weights(const T* weight, int64_t in, int64_t k0, int64_t numbers, int outs,
                         vf* to) {
  weight += k0;
  for (int first = 0; first < outs; first += W)
    for (int64_t k = 0; k < numbers; k += Cells<X>::width) {
      vf cells[W];
      for (int o = 0; o < W; ++o)
        cells[o] = cells_of<X>(weight + (first + o) * in + k, first + o < outs ? numbers - k : 0);
      transpose(cells, std::make_integer_sequence<int, W>());
      vf* tile = to + (first / TILE * DEPTH + k / PAIR<X>)*2 + first / W % 2;
      for (int i = 0; i < W; ++i) tile[2 * i] = cells[i];
    }
}

// The same of q4: eight outputs' numbers lie side by side as they are unpacked.
template <class X>
static void pack_weights(const Q4Block* weight, int64_t in, int64_t k0, int64_t numbers, int outs,
                         vf* to) {
  for (int first = 0; first < outs; first += 8)
    for (int64_t k = 0; k < numbers; k += 32) {
      vf* tile = to + (first / TILE * DEPTH + k / PAIR<X>)*2;
      q4_cells<X, TILE>(weight[first / 8 * (in / 32) + (k0 + k) / 32],
                        reinterpret_cast<X*>(tile) + first % TILE * PAIR<X>);
    }
}

// The same stretch of a few rows of x: [ROWS][DEPTH] cells, zero where there is no row.
template <class X, class Y>
static void pack_rows(const Y* x, int64_t x_row, int64_t numbers, int rows, vf* to) {
  for (int r = 0; r < ROWS; ++r)
    for (int64_t k = 0; k < numbers; k += Cells<X>::width)
      to[(r * DEPTH + k / PAIR<X>) / W] =
          cells_of<X>(x + r * x_row + k, r < rows ? numbers - k : 0);
}

// sums[ROWS][TILE], PANEL apart, += a stretch of x by a stretch of W.
template <class X>
static void multiply(const X* x, const X* w, int cells, bool first, float* sums) {
  using L = Cells<X>;
  vf acc[ROWS][2] = {};
  if (!first)
    for (int r = 0; r < ROWS; ++r)
      for (int j = 0; j < 2; ++j) acc[r][j] = load(sums + r * PANEL + j * W);
  for (int k = 0; k < cells; ++k) {
    const L left = L::weight(w + k * 2 * L::width), right = L::weight(w + (k * 2 + 1) * L::width);
    for (int r = 0; r < ROWS; ++r) {
      const L one = L::everywhere(x + (r * DEPTH + k) * PAIR<X>);
      acc[r][0] = L::multiply_add(acc[r][0], left, one);
      acc[r][1] = L::multiply_add(acc[r][1], right, one);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < 2; ++j) store(sums + r * PANEL + j * W, acc[r][j]);
}

// y = sums + bias, rounded.
template <class Y>
static void finish(const GemvPart& part, int64_t out, int outs, int64_t row, int rows,
                   const float* sums) {
  const Y* bias = static_cast<const Y*>(part.bias);
  for (int r = 0; r < rows; ++r) {
    Y* y = static_cast<Y*>(part.y) + (row + r) * part.out + out;
    for (int o = 0; o < outs; o += W) {
      const int n = outs - o < W ? outs - o : W;
      vf sum = load(sums + r * PANEL + o);
      if (part.scale) sum *= load(part.scale + out + o, n);
      if (bias) sum += load(bias + out + o, n);
      store(y + o, sum, n);
    }
  }
}

// Where a task packs and sums.
struct GemmSpace {
  vf weights[PANEL / W * DEPTH], rows[ROWS * DEPTH / W];
  float sums[CHUNK * PANEL];
};

template <class T, class Y>
static void gemm_task(const GemvArgs& a, const GemvPart& part, int64_t out, int64_t row, int rows,
                      GemmSpace& s) {
  using X = CellOf<T, Y>;
  const int outs = part.out - out < PANEL ? part.out - out : PANEL;
  constexpr int run = std::is_same_v<T, Q4Block> ? 8 * 32 : 1;  // numbers of a T
  const T* weight = static_cast<const T*>(part.weight) + out * a.in / run;
  const Y* x = static_cast<const Y*>(a.x) + row * a.x_row;
  constexpr int stretch = DEPTH * PAIR<X>;
  for (int64_t k = 0; k < a.in; k += stretch) {
    const int64_t numbers = a.in - k < stretch ? a.in - k : stretch;
    const int cells = (numbers + PAIR<X> - 1) / PAIR<X>;
    pack_weights<X>(weight, a.in, k, numbers, outs, s.weights);
    for (int r = 0; r < rows; r += ROWS) {
      pack_rows<X>(x + r * a.x_row + k, a.x_row, numbers, rows - r, s.rows);
      for (int o = 0; o < outs; o += TILE)
        multiply(reinterpret_cast<const X*>(s.rows),
                 reinterpret_cast<const X*>(s.weights + o / W * DEPTH), cells, k == 0,
                 s.sums + r * PANEL + o);
    }
  }
  finish<Y>(part, out, outs, row, rows, s.sums);
}

// Rows of a task: chunks are even, and as many as give each thread three tasks.
static inline int chunk_rows(const GemvArgs& a, int64_t panels) {
  const int64_t wanted = (3 * a.threads + panels - 1) / panels, most = (a.rows + FEW - 1) / FEW;
  const int64_t least = (a.rows + CHUNK - 1) / CHUNK, many = wanted < most ? wanted : most;
  const int64_t chunks = many > least ? many : least;
  return ((a.rows + chunks - 1) / chunks + ROWS - 1) / ROWS * ROWS;
}

// All parts in one parallel run: who is done with one goes on with the next.
template <class T, class Y>
static int gemm(const GemvArgs& a) {
  GemmSpace* spaces = reinterpret_cast<GemmSpace*>(a.scratch);
  int threads = 0;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    GemmSpace& mine = spaces[__atomic_fetch_add(&threads, 1, __ATOMIC_RELAXED)];
    for (int p = 0; p < a.part_count; ++p) {
      const GemvPart& part = a.parts[p];
      const int64_t panels = (part.out + PANEL - 1) / PANEL, chunk = chunk_rows(a, panels);
      const int64_t chunks = (a.rows + chunk - 1) / chunk;
#pragma omp for schedule(dynamic) nowait
      for (int64_t task = 0; task < panels * chunks; ++task) {
        const int64_t row = task % chunks * chunk, left = a.rows - row;
        gemm_task<T, Y>(a, part, task / chunks * PANEL, row, left < chunk ? left : chunk, mine);
      }
    }
  }
  return ok;
}

}  // namespace AVL_ISA
}  // namespace avl
