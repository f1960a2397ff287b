// The small kernels as a Python module that runs them in the block emulator: the same sources, the
// same checks of arguments, tensors in the host's memory.
#define AVL_EMULATED
#define AVL_WITH_CUDA 1
#include "../../cuda/bind_fused.cpp"
#include "../../cuda/bind_gemv.cpp"
#include "../../cuda/fused.cu"
#include "../../cuda/gemv.cu"

const char* avl::cuda_error_text() {
  return "emulated";
}

PYBIND11_MODULE(emulated_fused, m) {
  m.attr("with_cuda") = true;
  m.def("set_order", [](int order) { emulator::order = order; });
  avl::bind_fused(m);
  avl::bind_gemv(m);
  for (const char* op : {"add_norm", "rope_write", "silu_mul", "argmax"})
    m.attr(op) = m.attr("cuda_fused").attr(op);
}
