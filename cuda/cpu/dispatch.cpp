// Chooses at run time among the instruction sets the kernels were compiled for.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(AVL_ARM) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(AVL_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace avl {
#ifndef AVL_ARM  // where every processor has NEON, nothing plainer is needed
namespace baseline {
extern const CpuKernels table;
}
#endif
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
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
static bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
#endif

#ifdef AVL_ARM
namespace neon {
extern const CpuKernels table;
}
namespace neon_bf16 {
extern const CpuKernels table;
}

// Whether the processor multiplies pairs of bf16 (Armv8.6, as Apple's M2 and Neoverse V1 do).
static bool has_arm_bf16() {
#if defined(__linux__)
  return getauxval(AT_HWCAP2) & 1 << 14;  // HWCAP2_BF16
#elif defined(__APPLE__)
  int there = 0;
  size_t size = sizeof there;
  return !sysctlbyname("hw.optional.arm.FEAT_BF16", &there, &size, nullptr, 0) && there;
#else
  return false;
#endif
}
#endif

// The best that the processor runs, unless the environment variable AVL_ISA names another.
static const char* chosen() {
  static const char* forced = std::getenv("AVL_ISA");
  return forced && *forced ? forced : nullptr;
}

const CpuKernels* cpu_kernels(const char* name) {
  if (!name) name = chosen();
  auto wanted = [&](const CpuKernels& k) { return !name || !std::strcmp(name, k.name); };
#ifdef AVL_X86
  if (has_avx512() && wanted(avx512::table)) return &avx512::table;
  if (has_avx2() && wanted(avx2::table)) return &avx2::table;
#endif
#ifdef AVL_ARM
  if (has_arm_bf16() && wanted(neon_bf16::table)) return &neon_bf16::table;
  return wanted(neon::table) ? &neon::table : nullptr;
#else
  return wanted(baseline::table) ? &baseline::table : nullptr;
#endif
}

int32_t cpu_splits(const AttentionArgs& a) {
  if (a.threads <= 1 || a.rows == 0) return 1;
  const int32_t heads = cpu_heads_per_task(a);
  const int64_t tasks = int64_t(a.rows) * ((a.kv_heads + heads - 1) / heads);
  const int64_t wanted = (4 * a.threads + tasks - 1) / tasks, longest = a.width / 64 + 1;
  return static_cast<int32_t>(std::min(wanted, longest));
}

}  // namespace avl
