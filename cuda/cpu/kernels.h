// The CPU kernels as a table of functions: kernels.cpp fills one for each instruction set.
#pragma once

#include "../args.h"

namespace avl {

struct CpuKernels {
  const char* name;
  int (*attention)(const AttentionArgs&);  // partials: [rows, heads, splits, head_dim + 2]
  int (*qk)(const AttentionArgs&);         // writes logits, unscaled
  int (*pv)(const AttentionArgs&);         // reads p, writes out as float; partials as above
  int (*gemv)(const GemvArgs&);
  double (*read)(const float* data, int64_t count, int32_t threads);  // sum, to time reading
};

// The best table for the processor this runs on, or the named one (tests); null if not available.
const CpuKernels* cpu_kernels(const char* name = nullptr);

// Lists cut into this many parts so that every thread has work.
int32_t cpu_splits(const AttentionArgs& a);

}  // namespace avl
