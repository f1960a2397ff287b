// What the policy launch is told: rank image entries, age text entries, for all layers at once.
//
// A problem is one layer of one row of the batch: problem p is of row p % rows. Weights are
// exp(logit - lse): the probabilities of the step's attention, whose logits and lse every layer
// left behind.
#pragma once

#include <cstdint>

#include "args.h"

namespace avl {

// Where a row is wanted: of entries first..last of each of its lists, the slots of the `keep` with
// the highest head-mean weight go to `out`, from entry `at` on, in the list's order. Ties: the
// lower entry. NaN counts as 0.
struct RankArgs {
  int32_t problems, rows, heads, width;
  const float* logits;                      // [problems, heads, width]
  const float* lse;                         // [problems, heads]
  const int32_t* slots;                     // [problems, width]
  int32_t* out;                             // [problems, width]
  const int32_t *first, *last, *keep, *at;  // [problems]
  const int32_t* wanted;                    // [rows]
  int32_t* error;  // on a GPU set to 1 where a number does not fit; a CPU returns bad_slot
  int32_t threads, device;
};

// Add this step's weights of the text entries (first.., `used` of them) to their scores, summed
// over the query heads of each kv head. Then every kv head gets a place for the next token: where
// used > budget that of the token with the lowest score, the youngest if tied, outside the `recent`
// last positions; else the one behind. Its score is 0 from then on, its position the next one.
struct AgeArgs {
  int32_t problems, rows, heads, kv_heads, width, places;  // places: room for text, more than used
  const float* logits;                                     // [problems, heads, width]
  const float* lse;                                        // [problems, heads]
  const int32_t* first;                                    // [problems]
  const int64_t* start;                                    // [problems]: the pool slot of place 0
  const int32_t *used, *budget, *recent, *position;        // [rows]; budget -1: no limit
  float* scores;                                           // [problems, kv_heads, places], changed
  int32_t* positions;                                      // [problems, kv_heads, places], changed
  int64_t* write;  // [problems, kv_heads]: slot * kv_heads + head of the next token
  int32_t* error;
  int32_t threads, device;
};

// Both for a CPU or a GPU; a CPU's takes no stream.
struct PolicyKernels {
  int (*rank)(const RankArgs&, void* stream);
  int (*age)(const AgeArgs&, void* stream);
};

int cuda_rank(const RankArgs& a, void* stream);
int cuda_age(const AgeArgs& a, void* stream);

constexpr int MAX_RANKED = 8192;  // entries the CUDA kernel holds in shared memory

}  // namespace avl
