// Keys and values in pages of few bits, read by groups of lanes: eight numbers of a head each.
//
// A lane's eight codes are in eight bytes that lie side by side: of q8 in bytes of its own, of q4
// in halves of bytes that two lanes share, of q2 in quarters that four share. So every lane has the
// same numbers of a head whatever the format is, and what it sums up fits those of plain values.
//
// Keys are multiplied in whole numbers, two or four codes in one instruction. Queries are rounded
// for that as their definition has it: engine/ops/few_bits.py, seen. Values are summed as floats.
#pragma once

#include "device.cuh"

namespace avl {

constexpr int RUN = 32;  // numbers of a head that share a scale

// Where a kv head's keys, or its values, lie. Of a plain pool any 32 slots are a page.
struct Rows {
  const char* first;
  int page, token;  // bytes from one to the next
  int scales;       // bytes from a head's codes to its scales

  __device__ __forceinline__ const char* operator[](int slot) const {
    return first + int64_t(unsigned(slot) / PAGE) * page + unsigned(slot) % PAGE * token;
  }
  // The scales of the channels of a page, whose zeros lie behind them.
  __device__ __forceinline__ const fp16* channels(int number) const {
    return reinterpret_cast<const fp16*>(first + int64_t(number) * page + scales);
  }
};

__device__ __forceinline__ int runs_of(const AttentionArgs& a) {
  return (a.head_dim + RUN - 1) / RUN;
}

// Of pages whose first head's codes begin at `base`; the first head's scales lie `behind` bytes
// further on, those of every head are `scales` bytes.
__device__ __forceinline__ Rows paged_rows(const Tier& t, const void* base, const Side& side,
                                           int kv_head, int behind, int scales) {
  return {static_cast<const char*>(base) + kv_head * side.codes, int(t.page), side.block,
          behind + kv_head * (scales - side.codes)};
}

template <class T>
__device__ __forceinline__ Rows plain_rows(const void* base, int slot, int64_t head) {
  const int token = slot * int(sizeof(T));
  return {static_cast<const char*>(base) + head * sizeof(T), PAGE * token, token, 0};
}

template <class T>
__device__ __forceinline__ Rows keys_of(const AttentionArgs& a, const Tier& t, int kv_head) {
  const Side& side = t.key;
  if (!t.paged) return plain_rows<T>(t.k, t.k_slot, kv_head * t.k_head);
  if (side.format == DType::q2)  // by channel: behind all tokens
    return paged_rows(t, t.k, side, kv_head, PAGE * side.block, 4 * RUN * runs_of(a));
  return paged_rows(t, t.k, side, kv_head, a.kv_heads * side.codes, side.scales);
}

template <class T>
__device__ __forceinline__ Rows values_of(const AttentionArgs& a, const Tier& t, int kv_head) {
  const Side& side = t.value;
  if (!t.paged) return plain_rows<T>(t.v, t.v_slot, kv_head * t.v_head);
  return paged_rows(t, t.v, side, kv_head, a.kv_heads * side.codes, side.scales);
}

// Where a lane finds its numbers of a head.
struct Spot {
  int codes, scale, zero;  // bytes behind where codes, and scales, begin; zero < 0: it is 128
  int shift;
  uint32_t mask, flip;  // a number's code from 0 on: (byte >> shift & mask) ^ flip

  __device__ __forceinline__ Spot(const AttentionArgs& a, DType format, int lane) {
    const int run = lane * CHUNK / RUN, part = lane % (RUN / CHUNK), runs = runs_of(a);
    codes = format == DType::q8   ? lane * 8
            : format == DType::q4 ? run * 16 + part % 2 * 8
                                  : run * 8;
    shift = format == DType::q8 ? 0 : format == DType::q4 ? part / 2 * 4 : part * 2;
    mask = format == DType::q8 ? 0xffffffffu : format == DType::q4 ? 0x0f0f0f0fu : 0x03030303u;
    flip = format == DType::q8 ? 0x80808080u : 0;
    scale = format == DType::q8 ? 0 : run * 2;
    zero = format == DType::q8 ? -1 : (runs + run) * 2;
  }
};

// Eight numbers in few bits as they lie in memory.
struct Few {
  uint2 codes;
  fp16 scale, zero;
};

__device__ __forceinline__ uint2 load_codes(const char* head, const Spot& spot) {
  return load_once(reinterpret_cast<const uint2*>(head + spot.codes));
}

__device__ __forceinline__ Few load_few(const char* head, int scales, const Spot& spot) {
  Few x;
  x.codes = load_codes(head, spot);
  x.scale = *reinterpret_cast<const fp16*>(head + scales + spot.scale);
  x.zero = spot.zero < 0 ? fp16{0x5800}  // 128
                         : *reinterpret_cast<const fp16*>(head + scales + spot.zero);
  return x;
}

// -- keys -----------------------------------------------------------------------------------------

// A lane's eight numbers of a query as keys meet them: as they are (F: f32) or in whole numbers,
// four to a word, or two beside q8.
template <class T, DType F>
struct Query {
  uint32_t codes[F == DType::q8 ? 4 : 2];
  float scale;
  float beside;  // q4: the sum of the numbers; q2: that of the numbers times their channels' zeros
};
template <class T>
struct Query<T, DType::f32> {
  Eight<T> x;
};

// Eight numbers in whole ones of at most `largest`, together with those of LANES - 1 other lanes.
// What cannot be rounded makes the scale NaN.
template <int LANES>
__device__ __forceinline__ float rounded(const float (&x)[CHUNK], float largest,
                                         int (&codes)[CHUNK]) {
  float most = 0, wrong = 0;
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) {
    most = fmaxf(most, fabsf(x[i]));
    wrong += x[i] * 0;
  }
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2)
    most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, step));
  const float inverse = most > 0 ? largest / most : 0;
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) codes[i] = __float2int_rn(x[i] * inverse);
  return most / largest + wrong;
}

template <class T, DType F>
__device__ __forceinline__ Query<T, F> rounded_query(const float (&x)[CHUNK]) {
  int codes[CHUNK];
  Query<T, F> q{};
  if constexpr (F == DType::q8) {
    q.scale = rounded<64 / CHUNK>(x, 32767, codes);
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) q.codes[i / 2] |= (codes[i] & 0xffffu) << i % 2 * 16;
  } else {
    q.scale = rounded<RUN / CHUNK>(x, 127, codes);
    int sum = 0;
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      q.codes[i / 4] |= (codes[i] & 0xffu) << i % 4 * 8;
      sum += codes[i];
    }
    q.beside = q.scale * sum;
  }
  return q;
}

template <class T, DType F>
__device__ __forceinline__ Query<T, F> query_of(const Eight<T>& q) {
  if constexpr (F == DType::f32) {
    return {q};
  } else {
    float x[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) x[i] = number(q, i);
    return rounded_query<T, F>(x);
  }
}

// A query times the scales of a page's channels, rounded; a lane's eight scales begin at `scales`.
template <class T>
__device__ __forceinline__ Query<T, DType::q2> query_of_page(const Eight<T>& q,
                                                             const Eight<fp16>& scales,
                                                             const Eight<fp16>& zeros) {
  float x[CHUNK], base = 0;
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) {
    x[i] = number(q, i) * number(scales, i);
    base += x[i] * number(zeros, i);
  }
  Query<T, DType::q2> made = rounded_query<T, DType::q2>(x);
  made.beside = base;
  return made;
}

// A lane's eight numbers of a key, as they lie.
template <class T, DType F>
struct Key {
  Few x;
};
template <class T>
struct Key<T, DType::f32> {
  Eight<T> x;
};

template <class T, DType F>
__device__ __forceinline__ Key<T, F> load_key(const char* head, const Rows& rows, const Spot& spot,
                                              int lane) {
  if constexpr (F == DType::f32)
    return {load_eight(reinterpret_cast<const T*>(head) + lane * CHUNK)};
  else if constexpr (F == DType::q2)
    return {{load_codes(head, spot), {}, {}}};
  else
    return {load_few(head, rows.scales, spot)};
}

// A lane's part of q . k.
template <class T, DType F>
__device__ __forceinline__ float dot(const Query<T, F>& q, const Key<T, F>& key, const Spot& spot) {
  if constexpr (F == DType::f32) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) sum += number(q.x, i) * number(key.x, i);
    return sum;
  } else if constexpr (F == DType::q8) {
    int whole = __dp2a_lo(int(q.codes[0]), int(key.x.codes.x), 0);
    whole = __dp2a_hi(int(q.codes[1]), int(key.x.codes.x), whole);
    whole = __dp2a_lo(int(q.codes[2]), int(key.x.codes.y), whole);
    whole = __dp2a_hi(int(q.codes[3]), int(key.x.codes.y), whole);
    return to_float(key.x.scale) * (q.scale * whole);
  } else {
    const uint32_t low = key.x.codes.x >> spot.shift & spot.mask;
    const uint32_t high = key.x.codes.y >> spot.shift & spot.mask;
    const int whole = __dp4a(int(high), int(q.codes[1]), __dp4a(int(low), int(q.codes[0]), 0));
    if constexpr (F == DType::q2) return q.scale * whole - q.beside;
    return to_float(key.x.scale) * (q.scale * whole - to_float(key.x.zero) * q.beside);
  }
}

// Sums of N numbers over LANES neighbouring lanes, all at once: lane i ends with that of x[i % N].
template <int LANES, int N>
__device__ __forceinline__ float lane_sums(float (&x)[N]) {
#pragma unroll
  for (int left = N, step = 1; left > 1; left /= 2, step *= 2)
#pragma unroll
    for (int i = 0; i < left / 2; ++i) {
      const bool odd = threadIdx.x & step;  // which of two sums this lane goes on with
      const float mine = odd ? x[2 * i + 1] : x[2 * i], other = odd ? x[2 * i] : x[2 * i + 1];
      x[i] = mine + __shfl_xor_sync(ALL_LANES, other, step);
    }
#pragma unroll
  for (int step = N; step < LANES; step *= 2) x[0] += __shfl_xor_sync(ALL_LANES, x[0], step);
  return x[0];
}

// -- values ---------------------------------------------------------------------------------------

// Reads values as they are; a lane has eight numbers of each.
template <class T>
struct PlainValues {
  using Row = Eight<T>;
  static constexpr bool FEW = false;
  int lane;

  __device__ __forceinline__ Row load(const char* head) const {
    return load_eight(reinterpret_cast<const T*>(head) + lane * CHUNK);
  }
  __device__ __forceinline__ void numbers(const Row& row, float (&x)[CHUNK]) const {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) x[i] = number(row, i);
  }
};

// Reads values in few bits, whose numbers are scale * (x - zero).
struct FewValues {
  using Row = Few;
  static constexpr bool FEW = true;
  int scales;
  Spot spot;

  __device__ __forceinline__ Row load(const char* head) const {
    return load_few(head, scales, spot);
  }
  __device__ __forceinline__ void numbers(const Row& row, float (&x)[CHUNK]) const {
    const uint32_t low = (row.codes.x >> spot.shift & spot.mask) ^ spot.flip;
    const uint32_t high = (row.codes.y >> spot.shift & spot.mask) ^ spot.flip;
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) x[i] = small_byte(i < 4 ? low : high, i % 4);
  }
};

}  // namespace avl
