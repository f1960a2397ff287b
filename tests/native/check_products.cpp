// Runs the CPU's products of few rows against a reference in double, for every instruction set that
// is linked and that the processor has. Buffers have exactly the size they need; outputs start as
// NaN.
//
//   check_products     prints one line for each mistake; exit code 1 if there was one
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
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

template <class Y>
constexpr DType DTYPE = sizeof(Y) == 4            ? DType::f32
                        : std::is_same_v<Y, bf16> ? DType::bf16
                                                  : DType::f16;

// A matrix as a kernel gets it, and as the numbers that it stands for.
struct Matrix {
  DType dtype;
  int64_t out, in;
  std::vector<char> bytes;
  std::vector<float> scale;  // of q8
  std::vector<double> numbers;
};

template <class T>
Matrix plain(int64_t out, int64_t in, std::mt19937& random) {
  const std::vector<T> drawn_ones = drawn<T>(out * in, random);
  Matrix m{DTYPE<T>, out, in, std::vector<char>(sizeof(T) * out * in), {}, {}};
  std::memcpy(m.bytes.data(), drawn_ones.data(), m.bytes.size());
  for (T number : drawn_ones) m.numbers.push_back(to_float(number));
  return m;
}

Matrix eight_bits(int64_t out, int64_t in, std::mt19937& random) {
  Matrix m{DType::q8, out, in, std::vector<char>(out * in), drawn<float>(out, random), {}};
  for (char& code : m.bytes) code = char(int(random() % 255) - 127);
  for (int64_t i = 0; i < out * in; ++i)
    m.numbers.push_back(double(m.scale[i / in]) * static_cast<int8_t>(m.bytes[i]));
  return m;
}

Matrix four_bits(int64_t out, int64_t in, std::mt19937& random) {
  const int64_t blocks = (out + 7) / 8, runs = in / 32;
  Matrix m{DType::q4, out, in, std::vector<char>(blocks * runs * sizeof(Q4Block)), {}, {}};
  m.numbers.resize(out * in);
  auto* block = reinterpret_cast<Q4Block*>(m.bytes.data());
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t run = 0; run < runs; ++run, ++block)
      for (int row = 0; row < 8; ++row) {
        block->scale[row] = fp16_bits(float(random() % 100) / 512 - 0.1f);
        block->zero[row] = fp16_bits(float(random() % 64) / 4);
        for (int i = 0; i < 32; ++i) {
          const int code = random() % 16, byte = i % 16 / 4 * 32 + row * 4 + i % 4;
          if (i < 16) block->codes[byte] = 0;
          block->codes[byte] |= code << (i < 16 ? 0 : 4);
          if (b * 8 + row < out)
            m.numbers[(b * 8 + row) * in + run * 32 + i] =
                double(to_float(fp16{block->scale[row]})) *
                (code - to_float(fp16{block->zero[row]}));
        }
      }
  return m;
}

// Inputs of one row as few rows see them: of q4 in 8 bits, in runs of 32, of q8 in 16 bits, of 64.
std::vector<double> seen(const float* x, int64_t in, DType dtype) {
  std::vector<double> as(x, x + in);
  const float largest = dtype == DType::q4 ? 127 : 32767;
  const int run = dtype == DType::q4 ? 32 : dtype == DType::q8 ? 64 : 0;
  for (int64_t at = 0; run && at < in; at += run) {
    const int64_t end = at + run < in ? at + run : in;
    float most = 0;
    for (int64_t i = at; i < end; ++i) most = std::fmax(most, std::fabs(x[i]));
    for (int64_t i = at; i < end && most > 0; ++i)
      as[i] = std::nearbyint(x[i] * (largest / most)) * (most / largest);
  }
  return as;
}

// One product with inputs and outputs Y; the error is judged by the sum of magnitudes.
template <class Y>
void check(const CpuKernels& kernels, const Matrix& m, int rows) {
  const DType dtype = m.dtype;
  const int64_t in = m.in, out = m.out;
  std::mt19937 random(1);
  const std::vector<Y> x = drawn<Y>(rows * in, random), bias = drawn<Y>(out, random);
  std::vector<Y> y(rows * out, from_float<Y>(std::nanf("")));
  std::vector<float> scratch(gemv_scratch(rows, in)), wide_x;
  for (Y number : x) wide_x.push_back(to_float(number));
  const float* scale = m.scale.empty() ? nullptr : m.scale.data();
  const GemvPart part = {out, m.bytes.data(), bias.data(), y.data(), scale};
  const int wide = int(DTYPE<Y>);
  const GemvArgs args = {dtype, DTYPE<Y>, rows, in, x.data(), in, &part, 1, scratch.data(), 2};
  const int status = kernels.gemv(args);
  const double rounding = sizeof(Y) == 4 ? 0 : DTYPE<Y> == DType::bf16 ? 1.0 / 256 : 1.0 / 2048;
  for (int r = 0; r < rows; ++r) {
    const std::vector<double> inputs = seen(wide_x.data() + r * in, in, dtype);
    for (int64_t o = 0; o < out; ++o) {
      double exact = to_float(bias[o]), size = std::fabs(exact);
      for (int64_t i = 0; i < in; ++i) {
        const double term = m.numbers[o * in + i] * inputs[i];
        exact += term, size += std::fabs(term);
      }
      const double error = std::fabs(to_float(y[r * out + o]) - exact);
      if (!status && error <= rounding * std::fabs(exact) + 1e-6 * size) continue;
      std::printf("%s: dtype %d inputs %d rows %d, %d x %d: status %d, error %g of %g\n",
                  kernels.name, int(dtype), wide, rows, int(out), int(in), status, error, exact);
      if (++mistakes == 20) std::exit(1);
      return;
    }
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
          std::mt19937 random(2);
          check<float>(*kernels, plain<float>(out, in, random), rows);
          check<fp16>(*kernels, plain<fp16>(out, in, random), rows);
          check<bf16>(*kernels, plain<bf16>(out, in, random), rows);
          check<float>(*kernels, plain<fp16>(out, in, random), rows);
          check<float>(*kernels, plain<bf16>(out, in, random), rows);
          const Matrix few[] = {eight_bits(out, in, random),
                                four_bits(out, (in + 31) / 32 * 32, random)};
          for (const Matrix& m : few) {
            check<float>(*kernels, m, rows);
            check<fp16>(*kernels, m, rows);
            check<bf16>(*kernels, m, rows);
          }
        }
    std::printf("%s: products checked\n", isa);
  }
  std::printf("%d mistakes\n", mistakes);
  return mistakes > 0;
}
