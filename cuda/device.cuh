// What every kernel uses: loads of eight numbers, sums over lanes and blocks, lists, the ticket.
//
// The same source runs on a GPU and, with AVL_EMULATED, on the host (emulator/block.h).
#pragma once

#include "args.h"

#ifdef AVL_EMULATED
#include "emulator/block.h"
#else
#define AVL_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

#include "numeric.h"

namespace avl {

constexpr int THREADS = 256;  // of every block
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int CHUNK = 8;  // numbers one lane holds of a row
#define AVL_LOWEST (-INFINITY)

// Eight numbers as they lie in memory. K and V are read once: do not let them fill the L1 cache.
template <class T>
struct Eight {
  static constexpr int WORDS = sizeof(T) * CHUNK / 16;
  uint4 word[WORDS];
};

__device__ __forceinline__ uint4 load_once(const uint4* p) {
#ifdef AVL_EMULATED
  return *p;
#else
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p));
  return x;
#endif
}

__device__ __forceinline__ uint2 load_once(const uint2* p) {
#ifdef AVL_EMULATED
  return *p;
#else
  uint2 x;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(x.x), "=r"(x.y)
               : "l"(p));
  return x;
#endif
}

template <class T>
__device__ __forceinline__ Eight<T> load_eight(const T* p) {
  Eight<T> x;
#pragma unroll
  for (int i = 0; i < Eight<T>::WORDS; ++i)
    x.word[i] = load_once(reinterpret_cast<const uint4*>(p) + i);
  return x;
}

template <class T>
__device__ __forceinline__ Eight<T> zero_eight() {
  Eight<T> x;
#pragma unroll
  for (int i = 0; i < Eight<T>::WORDS; ++i) x.word[i] = uint4{0, 0, 0, 0};
  return x;
}

__device__ __forceinline__ float number(const Eight<float>& x, int i) {
  const uint4& w = x.word[i / 4];
  return float_of(i % 4 == 0 ? w.x : i % 4 == 1 ? w.y : i % 4 == 2 ? w.z : w.w);
}

template <class T>  // bf16 and fp16: two in each 32-bit word
__device__ __forceinline__ float number(const Eight<T>& x, int i) {
  const uint4& w = x.word[0];
  const uint32_t pair = i < 2 ? w.x : i < 4 ? w.y : i < 6 ? w.z : w.w;
  return to_float(T{static_cast<uint16_t>(i % 2 ? pair >> 16 : pair & 0xffff)});
}

// The number that the code `bits` < 2^23 stands for: 2^23 + bits, less 2^23. Faster than a
// conversion, of which a multiprocessor does a quarter as many.
__device__ __forceinline__ float small(uint32_t bits) {
  return float_of(0x4b000000u | bits) - 8388608.0f;
}
// That of byte i of a word: one instruction puts the byte where `bits` are.
__device__ __forceinline__ float small_byte(uint32_t word, int i) {
  return float_of(__byte_perm(word, 0x4b000000u, 0x7440 + i)) - 8388608.0f;
}

// Numbers that one thread moves at once: 16 bytes where the rows allow it, else a single number.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T x[N];
};

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <class T, int N>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// Sum over LANES neighbouring lanes; every lane of the warp must call it.
template <int LANES>
__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}

// What `join` makes of the numbers of all threads of a block, in every thread; may be called again.
template <class Join>
__device__ __forceinline__ float block_join(float x, const Join& join) {
  __shared__ float warps[THREADS / 32];
  for (int step = 16; step > 0; step /= 2) x = join(x, __shfl_xor_sync(ALL_LANES, x, step));
  __syncthreads();  // the last call's numbers have been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = warps[0];
  for (int w = 1; w < THREADS / 32; ++w) x = join(x, warps[w]);
  return x;
}

__device__ __forceinline__ float block_sum(float x) {
  return block_join(x, [](float one, float other) { return one + other; });
}

// The entries of a tier's list, checked: a slot or a count out of range sets the flag and is left
// out.
struct List {
  const int32_t* slots;  // null: identity
  int count;
  int pool_slots;
  int32_t* error;
  int tier;

  __device__ __forceinline__ List(const AttentionArgs& a, int tier, int row, int kv_head)
      : pool_slots(a.tiers[tier].pool_slots), error(a.error), tier(tier) {
    const Tier& t = a.tiers[tier];
    slots = t.slots ? t.slots + row * t.slots_row + kv_head * t.slots_list : nullptr;
    count = t.count ? t.count[row * t.count_row + kv_head * t.count_list] : t.width;
    if (count < 0 || count > t.width) {
      *error = 1 + tier;
      count = 0;
    }
  }

  // The slot of entry i < count, or -1 where there is none to use.
  __device__ __forceinline__ int operator[](int i) const {
    const int slot = slots ? slots[i] : i;
    if (slot >= 0 && slot < pool_slots) return slot;
    *error = 1 + tier;
    return -1;
  }
};

// True in the last of `blocks` thread blocks to arrive, which then sees what the others wrote. The
// ticket counts to blocks - 1 and wraps to zero, ready for the next launch. Every thread must call.
__device__ __forceinline__ bool last_to_arrive(int32_t* ticket, int blocks) {
  __shared__ bool last;
  __threadfence();  // publish what this thread wrote ...
  __syncthreads();  // ... and wait until all threads of the block have
  if (threadIdx.x == 0)
    last = atomicInc(reinterpret_cast<unsigned*>(ticket), blocks - 1) == unsigned(blocks - 1);
  __syncthreads();
  __threadfence();
  return last;
}

}  // namespace avl
