// Runs of elements of a strided tensor, read and written as contiguous float or double.
//
// A RowsView reads a tensor as `rows` vectors of `length` elements: the first dimension counts vectors, the others are
// flattened in logical order.  Contiguous data of the arithmetic's own type is used where it lies; everything else goes
// through a scratch block that stays in the first-level cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "hpa/check.h"
#include "hpa/tensor_view.h"
#include "isa/isa.h"

namespace hpa {

template <class T>
inline constexpr DType kNative = sizeof(T) == sizeof(float) ? DType::f32 : DType::f64;

class RowsView {
 public:
  RowsView() = default;

  // The first `vector_dims` dimensions (0 or 1) count vectors.
  RowsView(const TensorView& tensor, int vector_dims)
      : data_(static_cast<char*>(tensor.data)), dtype_(tensor.dtype), size_(element_size(tensor.dtype)) {
    if (vector_dims == 1) {
      rows_ = tensor.shape[0];
      row_stride_ = tensor.stride[0];
    }
    for (int d = vector_dims; d < tensor.dims; ++d) {
      length_ *= tensor.shape[d];
      if (tensor.shape[d] == 1) continue;
      if (dims_ > 0 && stride_[dims_ - 1] == tensor.shape[d] * tensor.stride[d]) {
        shape_[dims_ - 1] *= tensor.shape[d];  // continues the dimension before it
        stride_[dims_ - 1] = tensor.stride[d];
      } else {
        shape_[dims_] = tensor.shape[d];
        stride_[dims_++] = tensor.stride[d];
      }
    }
    if (dims_ == 0) {
      shape_[0] = length_;
      stride_[0] = 1;
      dims_ = 1;
    }
  }

  std::int64_t rows() const { return rows_; }
  std::int64_t length() const { return length_; }
  DType dtype() const { return dtype_; }
  std::int64_t row_stride() const { return row_stride_; }

  // `count` vectors from `first` on.
  RowsView slice(std::int64_t first, std::int64_t count) const {
    RowsView part = *this;
    part.data_ += first * row_stride_ * size_;
    part.rows_ = count;
    return part;
  }

  // Elements of a vector from `offset` on where they lie side by side, in the tensor's own dtype; else null.
  void* find(std::int64_t row, std::int64_t offset) const {
    if (dims_ != 1 || stride_[0] != 1) return nullptr;
    return data_ + (row * row_stride_ + offset) * size_;
  }

  // The same for the arithmetic's own type alone.
  template <class T>
  T* in_place(std::int64_t row, std::int64_t offset) const {
    return dtype_ == kNative<T> ? static_cast<T*>(find(row, offset)) : nullptr;
  }

  // Elements [offset, offset + count) of a vector: where they lie, or converted into `scratch`.
  template <class T>
  T* read(const isa::Kernels<T>& kernels, std::int64_t row, std::int64_t offset, std::int64_t count, T* scratch) const {
    if (T* direct = in_place<T>(row, offset)) return direct;
    const auto convert = kernels.load[static_cast<int>(dtype_)];
    for_each_run(row, offset, count, [&](void* run, std::int64_t stride, std::int64_t done, std::int64_t length) {
      convert(run, stride, length, scratch + done);
    });
    return scratch;
  }

  // Puts back what read() returned; nothing to do where it was the data itself.
  template <class T>
  void write(const isa::Kernels<T>& kernels, std::int64_t row, std::int64_t offset, std::int64_t count,
             const T* values) const {
    if (values == in_place<T>(row, offset)) return;
    const auto convert = kernels.store[static_cast<int>(dtype_)];
    for_each_run(row, offset, count, [&](void* run, std::int64_t stride, std::int64_t done, std::int64_t length) {
      convert(values + done, length, run, stride);
    });
  }

 private:
  template <class Body>
  void for_each_run(std::int64_t row, std::int64_t offset, std::int64_t count, const Body& body) const {
    const int inner = dims_ - 1;
    for (std::int64_t done = 0; done < count;) {
      std::int64_t rest = offset + done;
      const std::int64_t start = rest % shape_[inner];
      const std::int64_t length = std::min(count - done, shape_[inner] - start);
      std::int64_t place = row * row_stride_ + start * stride_[inner];
      rest /= shape_[inner];
      for (int d = inner - 1; d >= 0; --d) {
        place += rest % shape_[d] * stride_[d];
        rest /= shape_[d];
      }
      body(data_ + place * size_, stride_[inner], done, length);
      done += length;
    }
  }

  char* data_ = nullptr;
  DType dtype_ = DType::f32;
  std::int64_t size_ = 4;
  std::int64_t rows_ = 1;
  std::int64_t row_stride_ = 0;
  std::int64_t length_ = 1;
  int dims_ = 0;
  std::int64_t shape_[kMaxDims];
  std::int64_t stride_[kMaxDims];
};

}  // namespace hpa
