// What the parts of the Python module share: refusing arguments, and a status as an exception.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace avl {

inline void require(bool holds, const std::string& message) {
  if (!holds) throw pybind11::value_error(message);
}

// Turn a kernel's status into a Python exception that names the operator.
inline void raise_for(int status, const std::string& op) {
  if (status == ok) return;
  if (status == bad_slot) throw pybind11::value_error(op + ": a slot or a count is out of range");
  if (status == unsupported)
    throw pybind11::value_error(op + ": no kernel for this head size or dtype");
#if AVL_WITH_CUDA
  throw std::runtime_error(op + ": " + cuda_error_text());
#else
  throw std::runtime_error(op + ": built without CUDA");
#endif
}

// Adds the small kernels of fused.h to the module.
void bind_fused(pybind11::module_& m);

}  // namespace avl
