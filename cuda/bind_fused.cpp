// The small kernels as functions of the Python module: numbers one by one, since they are called
// several times in every layer of every step. engine/ops/fused.py checks the tensors; what can be
// checked from numbers is checked here again.
#include "bind.h"
#include "fused.h"

namespace py = pybind11;

namespace avl {
namespace {

constexpr int64_t MOST = 1 << 23;  // numbers in a row: 256 at a time, they fit a grid

int32_t within(int64_t value, int64_t least, int64_t most, const char* name) {
  require(value >= least && value <= most, std::string(name) + " must be within " +
                                               std::to_string(least) + ".." + std::to_string(most) +
                                               ", got " + std::to_string(value));
  return static_cast<int32_t>(value);
}

// A stride: rows may not overlap.
int64_t stride(int64_t value, int64_t least, const char* name) {
  require(value >= least, std::string(name) + " is a stride of " + std::to_string(value) +
                              " for rows of " + std::to_string(least));
  return value;
}

template <class T>
T* given(uintptr_t address, const char* name) {
  require(address != 0, std::string(name) + " must not be null");
  return reinterpret_cast<T*>(address);
}

template <class Args>
void launch(const char* op, const Args& a, uintptr_t stream, int (*start)(const Args&, void*)) {
  const int status = call_and_record(op, [=] { return start(a, reinterpret_cast<void*>(stream)); });
  if (status == bad_slot) throw py::index_error(std::string(op) + ": a place is out of range");
  raise_for(status, op);
}

void add_norm(const FusedKernels& kernels, int dtype, int64_t rows, int64_t size, uintptr_t hidden,
              int64_t hidden_row, uintptr_t delta, int64_t delta_row, uintptr_t weight,
              uintptr_t sum, uintptr_t normed, float eps, int device, uintptr_t stream) {
  AddNormArgs a{};
  a.dtype = plain_dtype_of(dtype);
  a.rows = within(rows, 1, INT32_MAX, "rows");
  a.size = within(size, 1, MOST, "size");
  a.hidden = given<void>(hidden, "hidden");
  a.delta = given<void>(delta, "delta");
  a.hidden_row = stride(hidden_row, size, "hidden");
  a.delta_row = stride(delta_row, size, "delta");
  a.weight = given<void>(weight, "weight");
  a.sum = given<void>(sum, "sum");
  a.normed = given<void>(normed, "normed");
  require(eps >= 0, "eps must not be negative");
  a.eps = eps;
  a.device = within(device, 0, 1024, "device");
  launch<AddNormArgs>("add_norm", a, stream, kernels.add_norm);
}

void rope_write(const FusedKernels& kernels, int dtype, bool wide, int64_t rows, int64_t heads,
                int64_t kv_heads, int64_t head_dim, uintptr_t q, int64_t q_row, uintptr_t k,
                int64_t k_row, uintptr_t v, int64_t v_row, uintptr_t cos, uintptr_t sin,
                uintptr_t scale, uintptr_t out, uintptr_t k_pool, uintptr_t v_pool, int64_t places,
                uintptr_t write, uintptr_t error, int device, uintptr_t stream) {
  RopeWriteArgs a{};
  a.dtype = plain_dtype_of(dtype);
  a.wide = wide;
  a.rows = within(rows, 1, INT32_MAX, "rows");
  a.heads = within(heads, 1, 1 << 12, "heads");
  a.kv_heads = within(kv_heads, 1, heads, "kv_heads");
  a.head_dim = within(head_dim, 2, 1024, "head_dim");
  require(head_dim % 2 == 0, "head_dim must be even, got " + std::to_string(head_dim));
  a.q = given<void>(q, "q");
  a.k = given<void>(k, "k");
  a.v = given<void>(v, "v");
  a.q_row = stride(q_row, heads * head_dim, "q");
  a.k_row = stride(k_row, kv_heads * head_dim, "k");
  a.v_row = stride(v_row, kv_heads * head_dim, "v");
  a.cos = given<void>(cos, "cos");
  a.sin = given<void>(sin, "sin");
  a.scale = reinterpret_cast<void*>(scale);
  a.out = given<void>(out, "out");
  a.k_pool = given<void>(k_pool, "k_pool");
  a.v_pool = given<void>(v_pool, "v_pool");
  require(places >= 0, "places must not be negative");
  a.places = places;
  a.write = given<int64_t>(write, "write");
  a.error = reinterpret_cast<int32_t*>(error);
  a.device = within(device, 0, 1024, "device");
  launch<RopeWriteArgs>("rope_write", a, stream, kernels.rope_write);
}

void silu_mul(const FusedKernels& kernels, int dtype, int64_t rows, int64_t size, uintptr_t gate,
              int64_t gate_row, uintptr_t up, int64_t up_row, uintptr_t scale, float factor,
              uintptr_t out, int device, uintptr_t stream) {
  SiluMulArgs a{};
  a.dtype = plain_dtype_of(dtype);
  a.rows = within(rows, 1, INT32_MAX, "rows");
  a.size = within(size, 1, MOST, "size");
  a.gate = given<void>(gate, "gate");
  a.up = given<void>(up, "up");
  a.gate_row = stride(gate_row, size, "gate");
  a.up_row = stride(up_row, size, "up");
  a.scale = reinterpret_cast<const float*>(scale);
  a.factor = factor;
  a.out = given<void>(out, "out");
  a.device = within(device, 0, 1024, "device");
  launch<SiluMulArgs>("silu_mul", a, stream, kernels.silu_mul);
}

void argmax(const FusedKernels& kernels, int dtype, int64_t rows, int64_t size, uintptr_t x,
            int64_t x_row, uintptr_t out, int device, uintptr_t stream) {
  ArgmaxArgs a{};
  a.dtype = plain_dtype_of(dtype);
  a.rows = within(rows, 1, INT32_MAX, "rows");
  a.size = within(size, 1, MOST, "size");
  a.x = given<void>(x, "x");
  a.x_row = stride(x_row, size, "x");
  a.out = given<int64_t>(out, "out");
  a.device = within(device, 0, 1024, "device");
  launch<ArgmaxArgs>("argmax", a, stream, kernels.argmax);
}

}  // namespace

void bind_fused(py::module_& m) {
  py::class_<FusedKernels>(m, "FusedKernels", py::module_local())
      .def("add_norm", &add_norm)
      .def("rope_write", &rope_write)
      .def("silu_mul", &silu_mul)
      .def("argmax", &argmax);
#if AVL_WITH_CUDA
  m.attr("cuda_fused") = FusedKernels{cuda_add_norm, cuda_rope_write, cuda_silu_mul, cuda_argmax};
#endif
}

}  // namespace avl
