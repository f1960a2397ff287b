// What the policy launch is told: rank image entries, age text entries, for all layers at once.
//
// A problem is one layer of one row of the batch. Weights are exp(logit - lse): the probabilities
// of the step's attention, whose logits and lse every layer left behind.
#pragma once

#include <cstdint>

namespace avl {

// Of entries first..last of a list, the slots of the `keep` with the highest head-mean weight, in
// the list's order. Ties: the lower entry. NaN counts as 0.
struct RankArgs {
  int32_t problems, heads, width, most;  // most: length of each list in out
  const float* logits;                   // [problems, heads, width]
  const float* lse;                      // [problems, heads]
  const int32_t *first, *last, *keep;    // [problems]
  const int32_t* slots;                  // [problems, width]
  int32_t* out;                          // [problems, most], written up to out_count
  int32_t* out_count;                    // [problems]
  int32_t* error;                        // set to 1 where first, last or keep does not fit
  int32_t threads, device;
};

// Add this step's weights of the text entries (first.., `used` of them) to their scores, summed
// over the query heads of each kv head; where used > budget, evict one token per kv head: the
// lowest score outside the `recent` latest positions, the youngest if tied. Its score becomes inf,
// its position -1; its entry is the victim (-1: none).
struct AgeArgs {
  int32_t problems, heads, kv_heads, width, text;  // text: places for text tokens
  const float* logits;                             // [problems, heads, width]
  const float* lse;                                // [problems, heads]
  const int32_t *first, *used, *budget, *recent;   // [problems]; budget -1: no limit
  float* scores;                                   // [problems, kv_heads, text], changed
  int32_t* positions;                              // [problems, kv_heads, text], changed
  int32_t* victim;                                 // [problems, kv_heads]
  int32_t* error;
  int32_t threads, device;
};

int cpu_rank(const RankArgs& a);
int cpu_age(const AgeArgs& a);
int cuda_rank(const RankArgs& a, void* stream);
int cuda_age(const AgeArgs& a, void* stream);

constexpr int MAX_RANKED = 8192;  // entries the CUDA kernel holds in shared memory

}  // namespace avl
