// The launchers: each starts one kernel on a stream and returns a Status without waiting.
#pragma once

#include "args.h"

namespace avl {

int cuda_attention(const AttentionArgs& a, void* stream);
int cuda_qk(const AttentionArgs& a, void* stream);
int cuda_pv(const AttentionArgs& a, void* stream);

// What the last CUDA call of this thread that failed said, and forget it.
const char* cuda_error_text();

}  // namespace avl
