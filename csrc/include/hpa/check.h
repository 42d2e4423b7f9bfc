// Guards at the door of every kernel.  hpa_ext/ops.py has already told the user what was wrong with an argument; these
// keep a direct call to the extension from reading or writing where it must not.
#pragma once

#include <stdexcept>
#include <string>

#include "hpa/tensor_view.h"

namespace hpa {

[[noreturn]] inline void fail(const char* name, const std::string& message) {
  throw std::invalid_argument(std::string(name) + ": " + message);
}

inline void check(bool condition, const char* name, const char* message) {
  if (!condition) fail(name, message);
}

inline void check_float(const char* name, const TensorView& tensor) {
  check(static_cast<int>(tensor.dtype) < kFloatTypes, name, "expected float32, float64, bfloat16 or float16");
}

inline void check_shape(const char* name, const TensorView& tensor, std::initializer_list<std::int64_t> shape) {
  bool same = tensor.dims == static_cast<int>(shape.size());
  int d = 0;
  for (const std::int64_t size : shape) same = same && tensor.shape[d++] == size;
  if (same) return;
  std::string expected = "expected shape (";
  for (const std::int64_t size : shape) expected += std::to_string(size) + ", ";
  expected += "), got (";
  for (d = 0; d < tensor.dims; ++d) expected += std::to_string(tensor.shape[d]) + ", ";
  fail(name, expected + ")");
}

inline MatrixView as_matrix(const char* name, const TensorView& tensor) {
  check_float(name, tensor);
  check(tensor.dims == 2, name, "expected 2 dimensions");
  return {tensor.data, tensor.dtype, tensor.shape[0], tensor.shape[1], tensor.stride[0], tensor.stride[1]};
}

}  // namespace hpa
