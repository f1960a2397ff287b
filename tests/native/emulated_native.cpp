// The whole native module with CUDA's kernels in the block emulator, tensors in the host's memory.
// There are no CPU kernels in it. Its types are no others than those of the module that the process
// may have loaded besides, which pybind11 must not take for the same.
#define avl emulated_avl
#define AVL_EMULATED
#define AVL_WITH_CUDA 1
#include "../../cuda/bind.cpp"
#include "../../cuda/bind_fused.cpp"
#include "../../cuda/bind_gemv.cpp"
#include "../../cuda/fused.cu"
#include "../../cuda/gemv.cu"
#include "../../cuda/launch.cu"
#include "../../cuda/sift.cu"

const avl::CpuKernels* avl::cpu_kernels(const char*) {
  static const CpuKernels none{"none"};
  return &none;
}

int32_t avl::cpu_splits(const AttentionArgs&) {
  return 1;
}

extern "C" __attribute__((visibility("default"))) void set_order(int order) {
  emulator::order = order;
}
