// Tensors of one shape, read together: their common dimensions joined until pieces of two dimensions are left.
//
// Lists of tensors go to the device as a table in a kernel's parameters (32 KB of them since CUDA 12.1): no copy, no
// wait, and a captured graph holds the table by value.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "hpa/tensor_view.h"

namespace hpa::cuda {

// The same [rows, cols] elements in each of `Tensors` tensors.
template <int Tensors>
struct Piece {
  std::int64_t rows = 1, cols = 1;
  std::int64_t offset[Tensors] = {};  // in elements
  std::int64_t row_stride[Tensors] = {}, col_stride[Tensors] = {};
};

struct Dimension {
  std::int64_t size;
  std::int64_t stride[3];
};

// Pieces that cover dimensions [first, dims) of tensors with these strides.  Elements keep what they belong to; their
// order does not matter to the callers.
template <int Tensors>
std::vector<Piece<Tensors>> cut_into_pieces(const TensorView& shape_of, int first,
                                            const TensorView* const (&tensors)[Tensors]) {
  static_assert(Tensors <= 3);
  std::vector<Dimension> dims;
  for (int d = first; d < shape_of.dims; ++d) {
    if (shape_of.shape[d] == 0) return {};
    if (shape_of.shape[d] == 1) continue;
    Dimension dim = {shape_of.shape[d], {}};
    for (int t = 0; t < Tensors; ++t) dim.stride[t] = tensors[t]->stride[d];
    dims.push_back(dim);
  }
  // Slowest first by the first tensor, so that what lies side by side is read side by side.
  std::stable_sort(dims.begin(), dims.end(),
                   [](const Dimension& a, const Dimension& b) { return a.stride[0] > b.stride[0]; });
  std::vector<Dimension> joined;
  for (const Dimension& dim : dims) {
    bool continues = !joined.empty();
    for (int t = 0; t < Tensors && continues; ++t) {
      continues = joined.back().stride[t] == dim.size * dim.stride[t];
    }
    if (continues) {
      joined.back().size *= dim.size;
      std::copy(dim.stride, dim.stride + Tensors, joined.back().stride);
    } else {
      joined.push_back(dim);
    }
  }

  Piece<Tensors> piece;
  for (int t = 0; t < Tensors; ++t) piece.col_stride[t] = 1;
  if (!joined.empty()) {
    piece.cols = joined.back().size;
    std::copy(joined.back().stride, joined.back().stride + Tensors, piece.col_stride);
    joined.pop_back();
  }
  if (!joined.empty()) {
    piece.rows = joined.back().size;
    std::copy(joined.back().stride, joined.back().stride + Tensors, piece.row_stride);
    joined.pop_back();
  }
  std::vector<Piece<Tensors>> pieces = {piece};
  for (const Dimension& outer : joined) {
    std::vector<Piece<Tensors>> repeated;
    for (const Piece<Tensors>& one : pieces) {
      for (std::int64_t i = 0; i < outer.size; ++i) {
        repeated.push_back(one);
        for (int t = 0; t < Tensors; ++t) repeated.back().offset[t] += i * outer.stride[t];
      }
    }
    pieces = std::move(repeated);
  }
  return pieces;
}

}  // namespace hpa::cuda
