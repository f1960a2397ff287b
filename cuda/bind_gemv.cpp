// The numbers of a product, checked, and the product of few bits on a GPU as a function of the
// Python module. engine/ops/products.py checks the tensors.
#include <pybind11/stl.h>

#include "bind.h"
#include "gemv.h"

namespace py = pybind11;

namespace avl {

// Numbers one by one, not in a dict: this is called for every linear layer of a step.
GemvArgs product_args(int dtype, int x_dtype, int64_t rows, int64_t in, uintptr_t x, int64_t x_row,
                      int threads) {
  require(rows >= 1 && rows <= INT32_MAX, "product: wrong rows");
  require(in >= 1 && x && x_row >= 0 && threads >= 1, "product: wrong sizes");
  GemvArgs a{};
  a.dtype = dtype_of(dtype), a.x_dtype = dtype_of(x_dtype);
  require(a.dtype != DType::q4 || in % 32 == 0, "product: q4 takes runs of 32");
  a.rows = static_cast<int32_t>(rows), a.in = in;
  a.x = reinterpret_cast<void*>(x), a.x_row = x_row;
  a.threads = threads;
  return a;
}

std::vector<GemvPart> product_parts(DType dtype, const std::vector<Part>& given) {
  std::vector<GemvPart> parts;
  for (const auto& [out, weight, bias, y, scale] : given) {
    require(out >= 1 && weight && y, "product: weight and y must not be null");
    require((dtype == DType::q8) == (scale != 0), "product: q8 has scales, and no other format");
    parts.push_back({out, reinterpret_cast<void*>(weight), reinterpret_cast<void*>(bias),
                     reinterpret_cast<void*>(y), reinterpret_cast<float*>(scale)});
  }
  return parts;
}

#if AVL_WITH_CUDA
static void gemv_on_gpu(int dtype, int x_dtype, int64_t rows, int64_t in, uintptr_t x,
                        int64_t x_row, const std::vector<Part>& given, int device,
                        uintptr_t stream) {
  GemvArgs a = product_args(dtype, x_dtype, rows, in, x, x_row, 1);
  require(in % 16 || (x % 16 == 0 && x_row % 8 == 0), "gemv: x begins at multiples of 16 bytes");
  require(x_row * rows <= INT32_MAX, "gemv: x is too large");
  a.device = device;
  const std::vector<GemvPart> parts = product_parts(a.dtype, given);
  a.parts = parts.data(), a.part_count = static_cast<int32_t>(parts.size());
  raise_for(cuda_gemv(a, reinterpret_cast<void*>(stream)), "gemv");
}
#endif

void bind_gemv(py::module_& m) {
#if AVL_WITH_CUDA
  m.def("cuda_gemv", &gemv_on_gpu);
#endif
}

}  // namespace avl
