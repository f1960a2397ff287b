// The launchers: each starts one kernel on a stream and returns a Status without waiting.
#pragma once

#include "args.h"

namespace avl {

int cuda_attention(const AttentionArgs& a, void* stream);
int cuda_qk(const AttentionArgs& a, void* stream);
int cuda_pv(const AttentionArgs& a, void* stream);

// cuda_attention over pages, or where a tier is sifted (sift.cu): one launch, or three.
int cuda_staged_attention(const AttentionArgs& a, void* stream);

// Whether it is that which serves.
static inline bool in_stages(const AttentionArgs& a) {
  for (int tier = 0; tier < a.tier_count; ++tier)
    if (a.tiers[tier].paged || a.tiers[tier].sifting.most) return true;
  return false;
}

// What the last CUDA call of this thread that failed said, and forget it.
const char* cuda_error_text();

}  // namespace avl
