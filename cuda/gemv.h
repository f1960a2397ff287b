// The product of few rows with weights in few bits on a GPU.
#pragma once

#include "args.h"

namespace avl {

constexpr int CUDA_GEMV_ROWS = 8;

// Where 16 divides `in`, x and its rows begin at multiples of 16 bytes.
int cuda_gemv(const GemvArgs& a, void* stream);

}  // namespace avl
