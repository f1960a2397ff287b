// Starts the kernels: chooses the template for dtype, head size and heads per kv head.
#include "launch.h"

namespace avl {

int cuda_attention(const AttentionArgs&, void*) {
  return unsupported;
}
int cuda_qk(const AttentionArgs&, void*) {
  return unsupported;
}
int cuda_pv(const AttentionArgs&, void*) {
  return unsupported;
}

const char* cuda_error_text() {
  return cudaGetErrorString(cudaGetLastError());
}

}  // namespace avl
