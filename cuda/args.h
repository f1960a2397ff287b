// What a kernel is told: plain structs of pointers, sizes and strides, the same for CPU and CUDA.
#pragma once

#include <cstdint>

#include "formats.h"

namespace avl {

// How a launch ended. Every launcher returns one of these; bind.cpp turns it into an exception.
// bad_slot + 1 + i: it is tier i that is wrong, of several.
enum Status : int { ok = 0, unsupported = 1, cuda_error = 2, bad_slot = 3 };

constexpr int MAX_TIERS = 8;

// How the keys, or the values, of a page's 32 tokens lie, see engine/ops/pages.py: a token's block
// are the codes of all heads and then their scales. Keys in q2 have theirs behind all blocks.
struct Side {
  DType format;
  int32_t block, codes, scales;  // bytes of a token, of a head's codes, of a head's scales
};
constexpr int PAGE = 32;

// Which values of a tier are read, and what becomes of the others: engine/ops/native.py has it.
struct Sifting {
  const float* most;  // [rows], 0: all are read; null: of no row
  const float* mean;  // [rows, kv_heads, head_dim]
  float* spent;       // [rows, kv_heads, 2]
  int64_t mean_row, spent_row;
};

// A pool and the lists of its slots that rows attend to.
//
// Strides count elements; the last dimension is contiguous. Entry i of (row, list) is
// slots[row * slots_row + list * slots_list + i], list = 0 or the kv head (slots_list = 0: shared).
// slots null: the pool in its own order; count null: `width` entries each.
struct Tier {
  const void *k, *v;
  int32_t pool_slots, k_slot, v_slot;
  int64_t k_head, v_head;
  const int32_t *slots, *count;
  int64_t slots_row, slots_list, count_row, count_list;
  int32_t width;  // entries in each list
  int32_t at;     // where its logits begin
  int32_t paged;  // 0: as above
  Side key, value;
  int64_t page;  // bytes from one page to the next; k and v are where the first one's begin
  Sifting sifting;
};

// Attention of `rows` queries over a few tiers, one after the other under one softmax; also its two
// halves, qk and pv, over the first tier alone.
struct AttentionArgs {
  DType dtype;  // of q, of every k and v, and of out
  int32_t rows, heads, kv_heads, head_dim;
  int32_t width;  // of logits: the tiers' widths together
  int32_t tier_count;
  Tier tiers[MAX_TIERS];
  float scale;
  const void* q;
  int64_t q_row, q_head;
  void* out;        // [rows, heads, head_dim] contiguous
  float* logits;    // [rows, heads, width] or null
  float* lse;       // [rows, heads] or null
  const float* p;   // pv only: [rows, heads, width]
  int32_t* error;   // set to 1 + i where a slot or a count of tier i is out of range; never reset
  int32_t threads;  // CPU
  int32_t device;   // CUDA: which
  int32_t splits;   // CUDA: thread blocks along one list
  float* partials;  // CUDA: [rows, heads, splits, head_dim + 2] when splits > 1
  float* sieve;     // over pages on CUDA, and where a tier is sifted: [rows, heads, width], logits
  int32_t*
      chosen;   // where a tier is sifted: [rows, kv_heads, width], entries whose values are read
  float* rest;  // ... [rows, heads, MAX_TIERS + 1, 2], see cpu/sift.h and sift.cuh
  int32_t* tickets;  // CUDA: [rows, heads], zero before and after every run
};

// One linear layer of a product.
struct GemvPart {
  int64_t out;
  const void* weight;  // [out, in] contiguous; q4: Q4Block [out / 8, in / 32]
  const void* bias;    // [out] or null
  void* y;             // [rows, out] contiguous
  const float* scale;  // q8: [out]
};

// 32 numbers of eight rows of a matrix in q4, so that lanes of a vector are outputs. Byte
// 32 v + 4 r + i has number 4 v + i of row r in its low half and number 16 + 4 v + i in its high
// one.
struct Q4Block {
  uint16_t scale[8], zero[8];  // as fp16
  uint8_t codes[128];
};
static_assert(sizeof(Q4Block) == 8 * 20, "eight runs of q4");

// y = x * weight^T + bias, for one linear layer or several of one input.
struct GemvArgs {
  DType dtype;    // of the weights
  DType x_dtype;  // of x, bias and y: fp32, or that of 16-bit weights; any of three beside few bits
  int32_t rows;   // gemv: 1 to 32
  int64_t in;
  const void* x;  // [rows, in]
  int64_t x_row;
  const GemvPart* parts;
  int32_t part_count;
  float* scratch;   // gemv: gemv_scratch(rows, in); gemm: gemm_scratch bytes for each thread
  int32_t threads;  // CPU
  int32_t device;   // CUDA: which
};

}  // namespace avl
