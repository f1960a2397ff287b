// Runs the CPU's products of few rows against a reference in double, for every instruction set that
// is linked and that the processor has. Buffers have exactly the size they need; outputs start as
// NaN.
//
//   check_products     prints one line for each mistake; exit code 1 if there was one
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "../../cuda/cpu/kernels.h"
#include "../../cuda/numeric.h"

namespace {

using namespace avl;

const char* const ISAS[] = {"baseline", "avx2", "avx512", "neon", "neon_bf16"};
int mistakes = 0;

template <class T>
std::vector<T> drawn(int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<T> numbers;
  for (int64_t i = 0; i < count; ++i) numbers.push_back(from_float<T>(normal(random)));
  return numbers;
}

// One product of weights T with inputs and outputs Y; the error is judged by the sum of magnitudes.
template <class T, class Y>
void check(const CpuKernels& kernels, DType dtype, int rows, int64_t in, int64_t out) {
  std::mt19937 random(1);
  const std::vector<T> weight = drawn<T>(out * in, random);
  const std::vector<Y> x = drawn<Y>(rows * in, random), bias = drawn<Y>(out, random);
  std::vector<Y> y(rows * out, from_float<Y>(std::nanf("")));
  std::vector<float> scratch(gemv_scratch(rows, in));
  const GemvPart part = {out, weight.data(), bias.data(), y.data()};
  const bool wide = sizeof(T) != sizeof(Y);
  const GemvArgs args = {dtype, rows, in, x.data(), in, &part, 1, scratch.data(), 2, wide};
  const int status = kernels.gemv(args);
  const double rounding = sizeof(Y) == 4 ? 0 : dtype == DType::bf16 ? 1.0 / 256 : 1.0 / 2048;
  for (int r = 0; r < rows; ++r)
    for (int64_t o = 0; o < out; ++o) {
      double exact = to_float(bias[o]), size = std::fabs(exact);
      for (int64_t i = 0; i < in; ++i) {
        const double term = double(to_float(weight[o * in + i])) * to_float(x[r * in + i]);
        exact += term, size += std::fabs(term);
      }
      const double error = std::fabs(to_float(y[r * out + o]) - exact);
      if (!status && error <= rounding * std::fabs(exact) + 1e-6 * size) continue;
      std::printf("%s: dtype %d wide %d rows %d, %d x %d: status %d, error %g of %g\n",
                  kernels.name, int(dtype), wide, rows, int(out), int(in), status, error, exact);
      if (++mistakes == 20) std::exit(1);
      return;
    }
}

}  // namespace

int main() {
  for (const char* isa : ISAS) {
    const CpuKernels* kernels = cpu_kernels(isa);
    if (!kernels) continue;
    for (int rows : {1, 2, 3, 7, 8, 9, 32})
      for (int64_t in : {1, 31, 64, 200})
        for (int64_t out : {1, 13}) {
          check<float, float>(*kernels, DType::f32, rows, in, out);
          check<fp16, fp16>(*kernels, DType::f16, rows, in, out);
          check<bf16, bf16>(*kernels, DType::bf16, rows, in, out);
          check<fp16, float>(*kernels, DType::f16, rows, in, out);
          check<bf16, float>(*kernels, DType::bf16, rows, in, out);
        }
    std::printf("%s: products checked\n", isa);
  }
  std::printf("%d mistakes\n", mistakes);
  return mistakes > 0;
}
