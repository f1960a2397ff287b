// The CPU kernels as a table of functions: kernels.cpp fills one for each instruction set.
#pragma once

#include "../args.h"
#include "../fused.h"
#include "../policy.h"

namespace avl {

struct CpuKernels {
  const char* name;
  int (*attention)(const AttentionArgs&);  // partials: [rows, heads, splits, head_dim + 2]
  int (*qk)(const AttentionArgs&);         // writes logits, unscaled
  int (*pv)(const AttentionArgs&);         // reads p, writes out as float; partials as above
  int (*gemv)(const GemvArgs&);
  int (*gemm)(const GemvArgs&);
  int64_t gemm_scratch;  // bytes that gemm needs for each thread, on a 64-byte boundary
  FusedKernels fused;
  PolicyKernels policy;
  double (*read)(const float* data, int64_t count, int32_t threads);  // sum, to time reading
};

// The best table for the processor this runs on, or the named one (tests); null if not available.
const CpuKernels* cpu_kernels(const char* name = nullptr);

// Floats that gemv needs: rows by whole stretches, of which the last pass may repeat some.
static inline int64_t gemv_scratch(int64_t rows, int64_t in) {
  return (rows + 7) * 2 * (in + 64);
}

constexpr int MAX_HEADS = 64;  // query heads of one task of attention

// kv heads that one task reads: many, since a token's heads are one run of memory; one where every
// head has a list of its own.
static inline int32_t cpu_heads_per_task(const AttentionArgs& a) {
  for (int tier = 0; tier < a.tier_count; ++tier)
    if (a.tiers[tier].slots_list || a.tiers[tier].count_list) return 1;
  const int32_t most = MAX_HEADS / (a.heads / a.kv_heads);
  return most < 1 ? 1 : most;
}

// Lists are cut into this many parts, so that every thread has a few tasks.
int32_t cpu_splits(const AttentionArgs& a);

}  // namespace avl
