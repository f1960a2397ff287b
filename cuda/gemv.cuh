// Products of one to eight rows with weights in few bits: a decode step reads every weight once.
//
// A lane turns the codes of its 16 bytes into floats once and multiplies all rows by them; sums are
// in float. Larger batches are a matter of arithmetic: their weights are unpacked for cuBLAS.
#pragma once

#include "device.cuh"

namespace avl {

constexpr int WARPS = THREADS / 32;

// Where row r of x begins; rows that a template has too many repeat the last one.
template <class X>
__device__ __forceinline__ const X* x_at(const GemvArgs& a, int r) {
  return static_cast<const X*>(a.x) + min(r, a.rows - 1) * int(a.x_row);
}

template <class X>
__device__ __forceinline__ void store(const GemvArgs& a, const GemvPart& part, int r, int64_t o,
                                      float sum) {
  if (part.bias) sum += to_float(static_cast<const X*>(part.bias)[o]);
  if (r < a.rows) assign(static_cast<X*>(part.y)[r * part.out + o], sum);
}

// grid (parts of the outputs): every warp has one, its lanes 16 inputs each.
template <class X, int ROWS>
__global__ void __launch_bounds__(THREADS) gemv_q8_kernel(const GemvArgs a, const GemvPart part) {
  const int lane = threadIdx.x % 32;
  const int64_t o = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (o >= part.out) return;
  const int8_t* codes = static_cast<const int8_t*>(part.weight) + o * a.in;
  const int64_t even = a.in % 16 ? 0 : a.in;  // only then do all rows begin at 16 bytes
  float sums[ROWS] = {};
  for (int64_t i = lane * 16; i < even; i += 32 * 16) {
    const uint4 read = load_once(reinterpret_cast<const uint4*>(codes + i));
    const uint32_t words[4] = {read.x, read.y, read.z, read.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float w[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) w[n] = small((words[j] >> n * 8 & 255) ^ 128) - 128;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const Pack<X, 4> x = load_pack<4>(x_at<X>(a, r) + i + j * 4);
#pragma unroll
        for (int n = 0; n < 4; ++n) sums[r] += to_float(x.x[n]) * w[n];
      }
    }
  }
  for (int64_t i = even + lane; i < a.in; i += 32)
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sums[r] += to_float(x_at<X>(a, r)[i]) * codes[i];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float sum = lane_sum<32>(sums[r]);
    if (lane == 0) store<X>(a, part, r, o, sum * part.scale[o]);
  }
}

// grid (groups of eight outputs, as they lie interleaved): the warps of a block share out the
// inputs. Of four Q4Blocks side by side a lane has 16 bytes: eight inputs of four outputs.
template <class X, int ROWS>
__global__ void __launch_bounds__(THREADS) gemv_q4_kernel(const GemvArgs a, const GemvPart part) {
  __shared__ float shares[WARPS][ROWS][8];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunk = lane % 8;
  const int first = chunk % 2 * 4, from = chunk / 2 * 4;  // its outputs, its inputs
  const int64_t runs = a.in / 32;
  const Q4Block* blocks = static_cast<const Q4Block*>(part.weight) + blockIdx.x * runs;
  float sums[ROWS][4] = {};
  for (int64_t run = warp * 4 + lane / 8; run < runs; run += WARPS * 4) {
    const Q4Block& block = blocks[run];
    const uint4 read = load_once(reinterpret_cast<const uint4*>(block.codes) + chunk);
    const uint32_t words[4] = {read.x, read.y, read.z, read.w};
    const Pack<uint16_t, 4> scale = load_pack<4>(block.scale + first);
    const Pack<uint16_t, 4> zero = load_pack<4>(block.zero + first);
    float x[ROWS][8], total[ROWS] = {};
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const X* row = x_at<X>(a, r) + run * 32 + from;
      const Pack<X, 4> low = load_pack<4>(row), high = load_pack<4>(row + 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[r][i] = to_float(low.x[i]);
        x[r][4 + i] = to_float(high.x[i]);
        total[r] += x[r][i] + x[r][4 + i];
      }
    }
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      float w[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        w[i] = small(words[o] >> i * 8 & 15);
        w[4 + i] = small(words[o] >> (i * 8 + 4) & 15);
      }
      const float step = to_float(fp16{scale.x[o]}), none = to_float(fp16{zero.x[o]});
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float dot = -none * total[r];
#pragma unroll
        for (int i = 0; i < 8; ++i) dot += w[i] * x[r][i];
        sums[r][o] += step * dot;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      float sum = sums[r][o];
      for (int step = 16; step > 1; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
      if (lane < 2) shares[warp][r][first + o] = sum;
    }
  __syncthreads();
  const int r = threadIdx.x / 8, of = threadIdx.x % 8;
  const int64_t o = int64_t(blockIdx.x) * 8 + of;
  if (r >= ROWS || o >= part.out) return;
  float sum = 0;
  for (int w = 0; w < WARPS; ++w) sum += shares[w][r][of];
  store<X>(a, part, r, o, sum);
}

}  // namespace avl
