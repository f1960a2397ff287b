// Lesson 1: one thread for each query head. It is correct, and that is all.
//
//   nvcc 1_one_thread.cu -o lesson && ./lesson          on a GPU
//   g++ -x c++ 1_one_thread.cu -o lesson && ./lesson    on any machine, in the block emulator
//
// Three passes over the list, in the order of the formula: scores, the sum of their exponentials,
// the weighted values. Every lane of a warp waits while one computes, and each load fetches 32
// bytes of which 4 are used.
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

__global__ void one_thread(const Call c) {
  const int head = blockIdx.x;
  const float* q = c.q + head * SIZE;
  float *scores = c.scores + head * LISTED, *out = c.out + head * SIZE;
  float top = -INFINITY, sum = 0;
  for (int i = 0; i < LISTED; ++i) {
    const float* k = c.k + (c.slots[i] * KV_HEADS + head / GROUP) * SIZE;
    float score = 0;
    for (int d = 0; d < SIZE; ++d) score += q[d] * k[d];
    scores[i] = score * SCALE;
    top = fmaxf(top, scores[i]);  // subtracted below, so that no exponential overflows
  }
  for (int i = 0; i < LISTED; ++i) sum += scores[i] = expf(scores[i] - top);
  for (int d = 0; d < SIZE; ++d) {
    float mixed = 0;
    for (int i = 0; i < LISTED; ++i)
      mixed += scores[i] * c.v[(c.slots[i] * KV_HEADS + head / GROUP) * SIZE + d];
    out[d] = mixed / sum;
  }
}

void attend(const Call& call) {
  LAUNCH(one_thread, HEADS, 1, call);
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
