// How numbers are written, not how they lie: one row for each format. Python reads this table;
// engine/ops/formats.py has the definitions in torch.
#pragma once

#include <cstdint>

namespace avl {

struct Format {
  const char* name;
  int32_t run;    // numbers that are written together
  int32_t bytes;  // what they take
};

// Rows of FORMATS. A number in few bits is scale * (code - zero): q8 has signed codes, no zero, and
// a scale for as long a run as the layout says, which lies beside the codes; q4 has codes from 0 to
// 15 and q2 from 0 to 3, and in fp16 a scale and a zero for every 32 numbers.
enum class DType : int32_t { f32, f16, bf16, q8, q4, q2 };

constexpr Format FORMATS[] = {{"fp32", 1, 4}, {"fp16", 1, 2}, {"bf16", 1, 2},
                              {"q8", 1, 1},   {"q4", 32, 20}, {"q2", 32, 12}};
constexpr int32_t FORMAT_COUNT = sizeof(FORMATS) / sizeof(Format);

// Bytes that `count` numbers take, whole runs of them.
static inline constexpr int64_t bytes_of(DType dtype, int64_t count) {
  const Format& format = FORMATS[static_cast<int32_t>(dtype)];
  return count / format.run * format.bytes;
}

}  // namespace avl
