// What the parts of the Python module share: refusing arguments, and a status as an exception.
#pragma once

#include <pybind11/pybind11.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "launch.h"

namespace avl {

inline void require(bool holds, const std::string& message) {
  if (!holds) throw pybind11::value_error(message);
}

// The row of FORMATS that Python names by its number.
inline DType dtype_of(int64_t number) {
  require(number >= 0 && number < FORMAT_COUNT,
          "no format has the dtype " + std::to_string(number));
  return static_cast<DType>(number);
}

// The same where numbers are numbers of torch's and not in few bits.
inline DType plain_dtype_of(int64_t number) {
  const DType dtype = dtype_of(number);
  require(dtype <= DType::bf16, "no kernel for the dtype " + std::to_string(number));
  return dtype;
}

// Turn a kernel's status into a Python exception that names the operator.
inline void raise_for(int status, const std::string& op) {
  if (status == ok) return;
  if (status >= bad_slot) {
    const int tier = status - bad_slot - 1;
    const std::string whose = tier < 0 ? "" : " of tier " + std::to_string(tier);
    throw pybind11::value_error(op + ": a slot or a count" + whose + " is out of range");
  }
  if (status == unsupported)
    throw pybind11::value_error(op + ": no kernel for this head size or dtype");
#if AVL_WITH_CUDA
  throw std::runtime_error(op + ": " + cuda_error_text());
#else
  throw std::runtime_error(op + ": built without CUDA");
#endif
}

// Calls in the order in which they were made, to be made again with the same addresses and sizes.
class Tape {
 public:
  void add(std::string op, std::function<int()> call) {
    calls_.emplace_back(std::move(op), std::move(call));
  }
  size_t size() const { return calls_.size(); }
  void run() const {
    int status = ok;
    auto next = calls_.begin();
    {
      pybind11::gil_scoped_release unlocked;
      while (next != calls_.end() && (status = next->second()) == ok) ++next;
    }
    if (status != ok) raise_for(status, next->first);
  }

 private:
  std::vector<std::pair<std::string, std::function<int()>>> calls_;
};

// The tape that this thread's calls go on, or null.
inline thread_local Tape* recording = nullptr;

// Make a call, and put it on the tape.
template <class F>
int call_and_record(const std::string& op, F call) {
  if (recording) recording->add(op, call);
  pybind11::gil_scoped_release unlocked;
  return call();
}

// out, weight, bias, y and scale of one linear layer.
using Part = std::tuple<int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

GemvArgs product_args(int dtype, int x_dtype, int64_t rows, int64_t in, uintptr_t x, int64_t x_row,
                      int threads);
std::vector<GemvPart> product_parts(DType dtype, const std::vector<Part>& given);

// Adds the small kernels of fused.h to the module.
void bind_fused(pybind11::module_& m);

// Adds the product of few bits on a GPU.
void bind_gemv(pybind11::module_& m);

}  // namespace avl
