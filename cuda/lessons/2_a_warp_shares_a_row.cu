// Lesson 2: the 32 lanes of a warp share a row.
//
//   nvcc 2_a_warp_shares_a_row.cu -o lesson && ./lesson          on a GPU
//   g++ -x c++ 2_a_warp_shares_a_row.cu -o lesson && ./lesson    on any machine, in the block
//   emulator
//
// Lane j holds numbers 4 j to 4 j + 3 of every row, so a row arrives in 16-byte loads side by side
// and all that is fetched is used: rows may lie anywhere, which makes a list of slots nearly free.
// The lanes add up their parts of a product by shuffles. Nothing is kept but the maximum: the
// second pass computes the scores again. But one warp for a head waits for every load, one after
// the other.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#ifdef __CUDACC__
#define LAUNCH(kernel, blocks, threads, ...) kernel<<<blocks, threads>>>(__VA_ARGS__)
#else
#include "../emulator/block.h"
#define LAUNCH(kernel, blocks, threads, ...) AVL_LAUNCH(kernel, blocks, threads, 0, __VA_ARGS__)
#endif

constexpr int HEADS = 8, KV_HEADS = 2, GROUP = HEADS / KV_HEADS, SIZE = 128;
constexpr int SLOTS = 1000, LISTED = 577;
constexpr float SCALE = 0.088388348f;  // 1 / sqrt(SIZE)

// One query for each head attends to LISTED rows of a pool of SLOTS.
struct Call {
  const float *q, *k, *v;  // [HEADS, SIZE], [SLOTS, KV_HEADS, SIZE], the same
  const int* slots;        // [LISTED]
  float *scores, *out;     // scratch [HEADS, LISTED], result [HEADS, SIZE]
};

// The lane's part of row `row` of the list.
__device__ float4 part_of(const float* pool, const Call& c, int row) {
  const float* from = pool + (c.slots[row] * KV_HEADS + blockIdx.x / GROUP) * SIZE;
  return reinterpret_cast<const float4*>(from)[threadIdx.x];
}

// The score of a row: every lane ends with the sum over all.
__device__ float score_of(float4 q, float4 k) {
  float sum = q.x * k.x + q.y * k.y + q.z * k.z + q.w * k.w;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum * SCALE;
}

__global__ void a_warp_shares_a_row(const Call c) {
  const float4 q = reinterpret_cast<const float4*>(c.q + blockIdx.x * SIZE)[threadIdx.x];
  float top = -INFINITY, sum = 0;
  for (int i = 0; i < LISTED; ++i) top = fmaxf(top, score_of(q, part_of(c.k, c, i)));
  float4 mixed{0, 0, 0, 0};
  for (int i = 0; i < LISTED; ++i) {
    const float weight = expf(score_of(q, part_of(c.k, c, i)) - top);
    const float4 v = part_of(c.v, c, i);
    sum += weight;
    mixed.x += weight * v.x, mixed.y += weight * v.y;
    mixed.z += weight * v.z, mixed.w += weight * v.w;
  }
  float* out = c.out + blockIdx.x * SIZE + threadIdx.x * 4;
  out[0] = mixed.x / sum, out[1] = mixed.y / sum, out[2] = mixed.z / sum, out[3] = mixed.w / sum;
}

void attend(const Call& call) {
  LAUNCH(a_warp_shares_a_row, HEADS, 32, call);
}

// -- around the kernel: the same in every lesson --------------------------------------------------

template <class T>
T* memory(size_t count) {
#ifdef __CUDACC__
  T* made = nullptr;
  if (cudaMallocManaged(&made, count * sizeof(T)) != cudaSuccess) {
    std::puts("no CUDA device");
    std::exit(2);
  }
  return made;
#else
  return new T[count];
#endif
}

// Waits for the kernel; false where it could not run.
bool finished() {
#ifdef __CUDACC__
  return cudaDeviceSynchronize() == cudaSuccess;
#else
  return true;
#endif
}

float* drawn(size_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  float* made = memory<float>(count);
  for (size_t i = 0; i < count; ++i) made[i] = normal(random);
  return made;
}

Call inputs() {
  std::mt19937 random(1);
  int* slots = memory<int>(LISTED);
  for (int i = 0; i < LISTED; ++i) slots[i] = i * 7 % SLOTS;
  float *q = drawn(HEADS * SIZE, random), *k = drawn(SLOTS * KV_HEADS * SIZE, random);
  float *v = drawn(SLOTS * KV_HEADS * SIZE, random), *out = memory<float>(HEADS * SIZE);
  for (int i = 0; i < HEADS * SIZE; ++i) out[i] = NAN;
  return {q, k, v, slots, memory<float>(HEADS * LISTED), out};
}

// What a head's output should be: the formula, in double.
std::vector<double> reference(const Call& c, int head) {
  std::vector<double> weights(LISTED), out(SIZE);
  double sum = 0;
  for (int i = 0; i < LISTED; ++i) {
    const size_t at = (size_t(c.slots[i]) * KV_HEADS + head / GROUP) * SIZE;
    double score = 0;
    for (int d = 0; d < SIZE; ++d) score += double(c.q[head * SIZE + d]) * c.k[at + d];
    sum += weights[i] = std::exp(score * SCALE);
  }
  for (int i = 0; i < LISTED; ++i) {
    const size_t at = (size_t(c.slots[i]) * KV_HEADS + head / GROUP) * SIZE;
    for (int d = 0; d < SIZE; ++d) out[d] += weights[i] / sum * c.v[at + d];
  }
  return out;
}

// How many numbers of the result are wrong; a NaN is.
int mistakes(const Call& c) {
  int found = 0;
  for (int head = 0; head < HEADS; ++head) {
    const std::vector<double> want = reference(c, head);
    for (int d = 0; d < SIZE; ++d) found += !(std::fabs(c.out[head * SIZE + d] - want[d]) < 1e-5);
  }
  return found;
}

// `--break` spoils one number, to show that a wrong result is noticed.
int main(int argc, char** argv) {
  const Call call = inputs();
  attend(call);
  if (!finished()) return std::puts("the kernel could not run"), 2;
  const auto begun = std::chrono::steady_clock::now();
  attend(call);
  finished();
  const std::chrono::duration<double, std::micro> spent = std::chrono::steady_clock::now() - begun;
  if (argc > 1 && !std::strcmp(argv[1], "--break")) call.out[SIZE] += 1;
  const int wrong = mistakes(call);
  std::printf("%d of %d numbers wrong, %.0f us\n", wrong, HEADS * SIZE, spent.count());
  return wrong > 0;
}
