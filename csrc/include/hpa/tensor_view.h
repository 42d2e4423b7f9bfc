// What a kernel sees of a tensor: a pointer, a dtype, shape and strides.  Nothing is owned.
#pragma once

#include <cstdint>

namespace hpa {

enum class DType : std::uint8_t { f32, f64, bf16, f16, boolean };

inline constexpr int kFloatTypes = 4;  // f32, f64, bf16, f16: the first four of DType

constexpr std::int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::f32: return 4;
    case DType::f64: return 8;
    case DType::bf16:
    case DType::f16: return 2;
    case DType::boolean: return 1;
  }
  return 0;
}

inline constexpr int kMaxDims = 16;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int dims = 0;
  std::int64_t shape[kMaxDims];   // of these the first `dims`: to set all would cost as much as to read a tensor
  std::int64_t stride[kMaxDims];  // in elements

  std::int64_t numel() const {
    std::int64_t count = 1;
    for (int d = 0; d < dims; ++d) count *= shape[d];
    return count;
  }
};

// A two-dimensional view, or the rows-by-depth reading of one; strides in elements, of any sign.
struct MatrixView {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;
  std::int64_t col_stride = 0;

  void* at(std::int64_t row, std::int64_t col) const {
    return static_cast<char*>(data) + (row * row_stride + col * col_stride) * element_size(dtype);
  }
};

}  // namespace hpa
