// Chooses at run time among the instruction sets the kernels were compiled for.
#include <cstring>

#include "kernels.h"

namespace avl {
namespace baseline {
extern const CpuKernels table;
}
#ifdef AVL_X86
namespace avx2 {
extern const CpuKernels table;
}
namespace avx512 {
extern const CpuKernels table;
}

static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16");
}
static bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
#endif

const CpuKernels* cpu_kernels(const char* name) {
  auto wanted = [&](const CpuKernels& k) { return !name || !std::strcmp(name, k.name); };
#ifdef AVL_X86
  if (has_avx512() && wanted(avx512::table)) return &avx512::table;
  if (has_avx2() && wanted(avx2::table)) return &avx2::table;
#endif
  return wanted(baseline::table) ? &baseline::table : nullptr;
}

int32_t cpu_splits(const AttentionArgs& a) {
  const int64_t heads = int64_t(a.rows) * a.kv_heads;
  if (a.threads <= 1 || heads >= 2 * a.threads) return 1;
  const int64_t longest = a.width / 128 + 1, wanted = (2 * a.threads + heads - 1) / heads;
  return static_cast<int32_t>(wanted < longest ? wanted : longest);
}

}  // namespace avl
