// Runs a CUDA kernel on the host, so that every machine can test the very sources of the kernels.
//
// A thread is a fiber: a stack of its own, entered through ucontext, left and resumed by the
// compiler's setjmp and longjmp, which need no system call. The blocks of a grid run one after
// another. __syncthreads and the shuffles are the points where a fiber gives way: between two of
// them it runs alone, so a missing barrier shows when fibers run in another order (`order`:
// forward, backward, shuffled). A barrier or shuffle that not all threads reach ends the program
// with a message instead of hanging. Memory order between blocks and speed are not emulated.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // blocks run one at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t STACK = 64 * 1024;
constexpr int WARP = 32;

// A meeting of `size` fibers. `round` tells meetings apart: a fiber can be one round ahead at most.
struct Meeting {
  int size = 0, arrived = 0;
  unsigned round = 0;
};

struct Fiber {
  ucontext_t context;  // where it starts
  void* resume[5];     // where it gave way
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
};

struct Block {
  explicit Block(std::deque<Fiber>& fibers) : fibers(fibers) {}

  std::deque<Fiber>& fibers;
  std::vector<Meeting> warps;
  std::vector<float> lanes;  // two values for each thread: this round's and the next one's
  Meeting all;
  void* scheduler[5];
  std::function<void()> kernel;
  unsigned current = 0;
  bool moved = false;  // did anything happen in this turn around the fibers?
};

inline Block* block = nullptr;
inline int order = 0;  // 0 forward, 1 backward, 2 shuffled

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s in block (%u, %u, %u), thread %u\n", what, blockIdx.x,
               blockIdx.y, blockIdx.z, threadIdx.x);
  std::_Exit(3);
}

// Not for the sanitizer, which would take a jump to another stack for the end of this one.
#define AVL_SWITCH __attribute__((noipa, no_sanitize("address")))

AVL_SWITCH inline void jump(void** where) {
  __builtin_longjmp(where, 1);
}

// From a fiber back to the scheduler; returns when the scheduler resumes this fiber.
AVL_SWITCH inline void give_way() {
  if (!__builtin_setjmp(block->fibers[block->current].resume)) jump(block->scheduler);
}

// From the scheduler to a fiber; returns when that gives way.
AVL_SWITCH inline void resume(Fiber& f) {
  if (__builtin_setjmp(block->scheduler)) return;
  if (f.started) jump(f.resume);
  f.started = true;
  setcontext(&f.context);
}

// Returns the round that ended once all fibers of the meeting are here.
inline unsigned meet(Meeting& m) {
  const unsigned mine = m.round;
  block->moved = true;
  if (++m.arrived == m.size) {
    m.arrived = 0;
    ++m.round;
  } else {
    while (m.round == mine) give_way();
  }
  return mine;
}

// What a fiber does: its thread's part of one block after another.
inline void start() {
  for (;;) {
    block->kernel();
    block->fibers[block->current].done = true;
    block->moved = true;
    give_way();
  }
}

inline void prepare(Fiber& f) {
  f.stack.reset(new char[STACK]);
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = STACK;
  f.context.uc_link = nullptr;
  makecontext(&f.context, start, 0);
}

inline std::vector<unsigned> turn_order(unsigned threads, unsigned turn) {
  std::vector<unsigned> ids(threads);
  for (unsigned i = 0; i < threads; ++i) ids[i] = order == 1 ? threads - 1 - i : i;
  uint32_t random = 2463534242u + turn;
  for (unsigned i = threads - 1; order == 2 && i > 0; --i) {
    random ^= random << 13, random ^= random >> 17, random ^= random << 5;
    std::swap(ids[i], ids[random % (i + 1)]);
  }
  return ids;
}

inline void run_block(unsigned threads) {
  Block& b = *block;
  for (unsigned t = 0; t < threads; ++t) b.fibers[t].done = false;
  for (unsigned turn = 0, left = threads; left > 0; ++turn) {
    b.moved = false;
    for (unsigned t : turn_order(threads, turn)) {
      if (b.fibers[t].done) continue;
      b.current = t;
      threadIdx = dim3(t);
      resume(b.fibers[t]);
      if (b.fibers[t].done) --left;
    }
    if (!b.moved && left > 0) fail("a barrier or a shuffle was not reached by all threads");
  }
}

template <class Kernel>
void launch(dim3 grid, dim3 threads, Kernel kernel) {
  static std::deque<Fiber> fibers;  // kept from launch to launch
  const unsigned n = threads.x;
  while (fibers.size() < n) prepare(fibers.emplace_back());
  Block b(fibers);
  block = &b;
  b.kernel = kernel;
  b.lanes.resize(2 * n);
  gridDim = grid, blockDim = threads;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        b.all = Meeting{int(n)};
        b.warps.assign((n + WARP - 1) / WARP, Meeting{int(std::min<unsigned>(n, WARP))});
        run_block(n);
      }
}

// Tells a value to the warp's other threads; what they have told is found with what is returned.
inline unsigned exchange(unsigned mask, float value) {
  Block& b = *block;
  if (mask != 0xffffffffu) fail("a shuffle of part of a warp");
  Meeting& warp = b.warps[b.current / WARP];
  b.lanes[2 * b.current + warp.round % 2] = value;
  return meet(warp) % 2;
}

// Byte i, or half i, of a word as a number.
inline int byte_of(int x, int i) {
  return static_cast<int8_t>(unsigned(x) >> 8 * i);
}
inline int half_of(int x, int i) {
  return static_cast<int16_t>(unsigned(x) >> 16 * i);
}
}  // namespace emulator

#define AVL_LAUNCH(kernel, grid, block_size, stream, ...) \
  (void)(stream), emulator::launch(grid, block_size, [&] { kernel(__VA_ARGS__); })

// -- what kernels call ----------------------------------------------------------------------------

inline void __syncthreads() {
  emulator::meet(emulator::block->all);
}
inline void __threadfence() {}

inline float __shfl_xor_sync(unsigned mask, float value, int step) {
  const unsigned me = emulator::block->current, turn = emulator::exchange(mask, value);
  return emulator::block->lanes[2 * (me ^ unsigned(step)) + turn];
}
inline bool __any_sync(unsigned mask, bool value) {
  const unsigned first = emulator::block->current / emulator::WARP * emulator::WARP;
  const unsigned turn = emulator::exchange(mask, value);
  bool any = false;
  for (unsigned i = first; i < first + emulator::WARP; ++i)
    any |= emulator::block->lanes[2 * i + turn] != 0;
  return any;
}

inline unsigned atomicInc(unsigned* p, unsigned limit) {
  const unsigned old = *p;
  *p = old >= limit ? 0 : old + 1;
  return old;
}
inline int atomicAdd(int* p, int x) {
  const int old = *p;
  *p += x;
  return old;
}

inline float atomicAdd(float* p, float x) {
  const float old = *p;
  *p += x;
  return old;
}

// Sums of products of small whole numbers: four of 8 bits, or two of 16 bits with the lower or the
// upper two of 8.
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) sum += emulator::byte_of(a, i) * emulator::byte_of(b, i);
  return sum;
}
inline int __dp2a_lo(int a, int b, int sum) {
  return sum + emulator::half_of(a, 0) * emulator::byte_of(b, 0) +
         emulator::half_of(a, 1) * emulator::byte_of(b, 1);
}
inline int __dp2a_hi(int a, int b, int sum) {
  return sum + emulator::half_of(a, 0) * emulator::byte_of(b, 2) +
         emulator::half_of(a, 1) * emulator::byte_of(b, 3);
}
// Four of the eight bytes of two words: which ones, the digits of `places` say.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t places) {
  const uint64_t both = uint64_t(high) << 32 | low;
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word |= (both >> (places >> 4 * i & 7) * 8 & 255) << 8 * i;
  return word;
}
inline int __float2int_rn(float x) {
  return x == x ? static_cast<int>(std::lrint(x)) : 0;
}

inline float __ldcg(const float* p) {
  return *p;
}
inline float __expf(float x) {
  return std::exp(x);
}
using std::max;
using std::min;
