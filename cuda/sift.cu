// Starts attention in stages: one launch over pages, three where values are left unread.
#include "sift.cuh"

#include "launch.h"
#include "start.cuh"

namespace avl {

template <class T, int LANES>
static void start_staged(const AttentionArgs& a, void* stream) {
  bool sifts = false;
  for (int tier = 0; tier < a.tier_count; ++tier) sifts |= a.tiers[tier].sifting.most != nullptr;
  const int group = a.heads / a.kv_heads, chunks = group == 1 ? 1 : (group + 3) / 4;
  const dim3 grid(a.splits, a.kv_heads * chunks, a.rows);
  auto start = [&](int stages) {
    if (group == 1)
      AVL_LAUNCH((staged_kernel<T, LANES, 1>), grid, THREADS, stream, a, chunks, stages);
    else
      AVL_LAUNCH((staged_kernel<T, LANES, 4>), grid, THREADS, stream, a, chunks, stages);
  };
  if (!sifts) return start(SCAN | MIX);
  start(SCAN);
  AVL_LAUNCH(choose_kernel, dim3(a.heads, a.rows), THREADS, stream, a);
  start(MIX);
}

int cuda_staged_attention(const AttentionArgs& given, void* stream) {
  AttentionArgs a = given;
  if (a.logits) a.sieve = a.logits;
  if (a.heads / a.kv_heads > MOST_SHARING) return unsupported;
  AVL_START(start_staged)
}

}  // namespace avl
