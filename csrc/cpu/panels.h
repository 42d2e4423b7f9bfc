// Dense algebra on packed panels, shared by the kernels that multiply matrices.
//
// A panel holds `panel` lanes of an operand side by side, [depth][panel], padded with zeros; the inner loop `update`
// multiplies two panels.  One packing serves both sides of a product, which a symmetric product uses: it packs once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "buffer.h"
#include "hpa/tensor_view.h"
#include "isa/isa.h"
#include "parallel.h"

namespace hpa {

// Depth that one tile sums in registers: long enough to amortise reading and writing the tile, short enough for two
// panels to stay in the second-level cache.  It also bounds the length of a plain sum.
inline constexpr std::int64_t kDepth = 256;

// Blocks of kDepth that are summed in scratch before the result is touched.
inline constexpr std::int64_t kStack = 4;

inline constexpr std::int64_t kPackRows = 8;

// Side of the largest block of a product: its panels and its sums take 150 to 200 KB each of a second-level cache.
inline constexpr std::int64_t kBlockBytes = 768;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Packs lanes [first, first + panel) and depths [depth_start, depth_start + depth) of `source`, a matrix [lanes,
// depth]. scratch: kPackRows * depth.
template <class T>
void pack_panel(const isa::Kernels<T>& kernels, const MatrixView& source, std::int64_t first, std::int64_t depth_start,
                std::int64_t depth, T* out, T* scratch) {
  const std::int64_t p = kernels.panel;
  const std::int64_t width = std::min(p, source.rows - first);
  const auto load = kernels.load[static_cast<int>(source.dtype)];
  if (source.row_stride == 1) {  // lanes lie side by side
    for (std::int64_t d = 0; d < depth; ++d) {
      load(source.at(first, depth_start + d), 1, width, out + d * p);
      std::fill(out + d * p + width, out + (d + 1) * p, T(0));
    }
    return;
  }
  for (std::int64_t lane = 0; lane < p; lane += kPackRows) {
    const std::int64_t group = std::min(kPackRows, p - lane);
    for (std::int64_t l = 0; l < group; ++l) {
      if (lane + l < width) {
        load(source.at(first + lane + l, depth_start), source.col_stride, depth, scratch + l * depth);
      } else {
        std::fill(scratch + l * depth, scratch + (l + 1) * depth, T(0));
      }
    }
    for (std::int64_t d = 0; d < depth; ++d) {
      for (std::int64_t l = 0; l < group; ++l) out[d * p + lane + l] = scratch[l * depth + d];
    }
  }
}

// Lower triangle of C += alpha * A A^T from row `first_row` and column `first_col` on (multiples of the panel), A packed
// in `panels` with `depth` and n lanes.  Square blocks of C are tasks; every element has one owner and one order of sums.
//
// A task goes through the depth in steps of kernels.depth.  In a step one panel stays in the first-level cache while
// all panels of the block's rows, which stay in the second-level cache, are multiplied with it: two panels are fetched
// from further away for each `block` products.  Sums of all steps but the last wait in scratch, so that C, which comes
// from memory, is read and written once a call.
template <class T>
void add_symmetric_product(const isa::Kernels<T>& kernels, const T* panels, std::int64_t depth, std::int64_t n,
                           std::int64_t first_row, std::int64_t first_col, T alpha, const MatrixView& c, int threads) {
  const std::int64_t p = kernels.panel;
  const std::int64_t count = ceil_div(n, p), row_panel = first_row / p, col_panel = first_col / p;
  if (row_panel >= count) return;
  const std::int64_t largest = kBlockBytes / static_cast<std::int64_t>(sizeof(T)) / p;
  const std::int64_t block = std::clamp<std::int64_t>(count / 8, 1, largest);
  const std::int64_t row_blocks = ceil_div(count - row_panel, block);
  const std::int64_t col_blocks = ceil_div(count - col_panel, block);
  const bool adjacent = c.col_stride == 1;
  const bool carries = !adjacent || depth > kernels.depth;
  Buffer<T> scratch(carries ? threads * block * block * p * p : 0);

  parallel_for(row_blocks * col_blocks, threads, [&](std::int64_t task, int thread) {
    // Long rows first: the last tasks are short ones.
    const std::int64_t row_block = row_blocks - 1 - task / col_blocks, col_block = task % col_blocks;
    const std::int64_t i0 = row_panel + row_block * block, i1 = std::min(i0 + block, count);
    const std::int64_t j0 = col_panel + col_block * block, j1 = std::min(j0 + block, count);
    for (std::int64_t start = 0; start < depth; start += kernels.depth) {
      const std::int64_t step = std::min(kernels.depth, depth - start);
      for (std::int64_t j = j0; j < j1; ++j) {
        for (std::int64_t i = std::max(i0, j); i < i1; ++i) {
          const std::int64_t rows = std::min(p, n - i * p), cols = std::min(p, n - j * p);
          const T *a = panels + (i * depth + start) * p, *b = panels + (j * depth + start) * p;
          T* carry = scratch.data() + ((thread * block + j - j0) * block + i - i0) * p * p;
          if (adjacent && start + step == depth) {
            kernels.finish(step, a, b, alpha, rows, cols, (i - j) * p, start > 0 ? carry : nullptr,
                           static_cast<T*>(c.at(i * p, j * p)), c.row_stride);
          } else {
            if (start == 0) std::fill(carry, carry + p * p, T(0));
            kernels.update(step, a, b, T(1), p, p, p, carry, p);
          }
        }
      }
    }
    if (adjacent) return;
    for (std::int64_t j = j0; j < j1; ++j) {
      for (std::int64_t i = std::max(i0, j); i < i1; ++i) {
        const T* sums = scratch.data() + ((thread * block + j - j0) * block + i - i0) * p * p;
        for (std::int64_t r = 0; r < std::min(p, n - i * p); ++r) {
          T* row = static_cast<T*>(c.at(i * p + r, j * p));
          const std::int64_t width = std::min({p, n - j * p, r + (i - j) * p + 1});
          for (std::int64_t s = 0; s < width; ++s) row[s * c.col_stride] += alpha * sums[r * p + s];
        }
      }
    }
  });
}

// Lower triangle of C += alpha * A A^T for A = source [n, depth] of any dtype and stride.
template <class T>
void add_gram(const isa::Kernels<T>& kernels, const MatrixView& source, T alpha, const MatrixView& c, int threads) {
  const std::int64_t p = kernels.panel, n = source.rows, count = ceil_div(n, p);
  const std::int64_t deepest = std::min(kStack * kDepth, source.cols);
  if (n == 0 || deepest == 0) return;
  threads = useful_threads(n * n / 2 * source.cols, 1 << 20, threads);
  Buffer<T> panels(count * deepest * p);
  Buffer<T> scratch(threads * kPackRows * deepest);
  for (std::int64_t start = 0; start < source.cols; start += deepest) {
    const std::int64_t depth = std::min(deepest, source.cols - start);
    parallel_for(count, threads, [&](std::int64_t i, int thread) {
      pack_panel(kernels, source, i * p, start, depth, panels.data() + i * depth * p,
                 scratch.data() + thread * kPackRows * deepest);
    });
    add_symmetric_product(kernels, panels.data(), depth, n, 0, 0, alpha, c, threads);
  }
}

}  // namespace hpa
