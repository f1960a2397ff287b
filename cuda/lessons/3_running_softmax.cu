// Lesson 3: many warps for each head, each with a running softmax.
//
//   nvcc 3_running_softmax.cu -o lesson && ./lesson          on a GPU
//   g++ -x c++ 3_running_softmax.cu -o lesson && ./lesson    on any machine, in the block emulator
//
// A warp need not know the maximum of all scores: it takes the largest so far, and when a larger
// one comes it scales what it has summed by exp(old - new) (Milakov and Gimelshein 2018). So K and
// V are read once, side by side, by as many warps as one likes, and no warp waits for another until
// the end: then their sums are scaled to the common maximum in the same way, and added.
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

constexpr int WARPS = 8;

// What a lane knows of the rows its warp has seen: the largest score, the sum of exp(score - top),
// and the sum of the values so weighted, four numbers of it.
struct Running {
  float top, sum, mixed[4];
};

// The lane's part of row `row` of the list.
__device__ float4 part_of(const float* pool, const Call& c, int row) {
  const float* from = pool + (c.slots[row] * KV_HEADS + blockIdx.x / GROUP) * SIZE;
  return reinterpret_cast<const float4*>(from)[threadIdx.x % 32];
}

// The score of a row: every lane ends with the sum over all.
__device__ float score_of(float4 q, float4 k) {
  float sum = q.x * k.x + q.y * k.y + q.z * k.z + q.w * k.w;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum * SCALE;
}

__device__ void take_in(Running& r, float score, float4 v) {
  const float top = fmaxf(r.top, score);
  const float keep = expf(r.top - top), weight = expf(score - top);
  r.top = top, r.sum = r.sum * keep + weight;
  r.mixed[0] = r.mixed[0] * keep + weight * v.x, r.mixed[1] = r.mixed[1] * keep + weight * v.y;
  r.mixed[2] = r.mixed[2] * keep + weight * v.z, r.mixed[3] = r.mixed[3] * keep + weight * v.w;
}

__global__ void running_softmax(const Call c) {
  __shared__ Running seen[WARPS * 32];
  const int lane = threadIdx.x % 32;
  const float4 q = reinterpret_cast<const float4*>(c.q + blockIdx.x * SIZE)[lane];
  Running mine{-INFINITY, 0, {0, 0, 0, 0}};
  for (int i = threadIdx.x / 32; i < LISTED; i += WARPS)  // the same for all lanes of a warp
    take_in(mine, score_of(q, part_of(c.k, c, i)), part_of(c.v, c, i));
  seen[threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  float top = -INFINITY, sum = 0, mixed[4] = {0, 0, 0, 0};
  for (int w = 0; w < WARPS; ++w) top = fmaxf(top, seen[w * 32 + lane].top);
  for (int w = 0; w < WARPS; ++w) {
    const Running& r = seen[w * 32 + lane];
    const float share = expf(r.top - top);
    sum += share * r.sum;
    for (int j = 0; j < 4; ++j) mixed[j] += share * r.mixed[j];
  }
  for (int j = 0; j < 4; ++j) c.out[blockIdx.x * SIZE + lane * 4 + j] = mixed[j] / sum;
}

void attend(const Call& call) {
  LAUNCH(running_softmax, HEADS, WARPS * 32, call);
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
