// Dense algebra on packed panels, shared by the kernels that multiply matrices.
//
// A panel holds `panel` lanes of an operand side by side, [depth][panel], padded with zeros.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "buffer.h"
#include "hpa/tensor_view.h"
#include "isa/isa.h"
#include "parallel.h"

namespace hpa {

// Entries that are packed before the result is touched.
inline constexpr std::int64_t kSweep = 512;

inline constexpr std::int64_t kPackPanels = 8;

inline constexpr std::int64_t kPackRows = 8;

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

// A depth cut into equal steps of at most `longest`, each a multiple of `round` but for the last.
struct Steps {
  std::int64_t depth, step;

  Steps(std::int64_t whole, std::int64_t longest, std::int64_t round)
      : depth(whole), step(ceil_div(ceil_div(whole, ceil_div(whole, longest)), round) * round) {}
  std::int64_t count() const { return ceil_div(depth, step); }
  std::int64_t start(std::int64_t k) const { return k * step; }
  std::int64_t size(std::int64_t k) const { return std::min(step, depth - k * step); }
};

// Lower triangle of C += alpha * A A^T.  A, n lanes, is packed step after step in `right` and `left`, every step panel
// after panel.  Square blocks of C are tasks; every element has one owner and one order of sums.
//
// In a step one panel of `right` stays in the first-level cache (as far as it fits) while all of the block's `left`,
// which stays in the second-level cache, is multiplied with it.  Sums of all steps but the last wait in scratch, so that C, which comes
// from memory, is read and written once a call.
template <class E, class T>
void add_blocks(const isa::Product<E, T>& product, const E* right, const E* left, const Steps& steps, std::int64_t n,
                T alpha, const MatrixView& c, int threads) {
  const std::int64_t p = product.panel, count = ceil_div(n, p);
  const std::int64_t block = std::clamp<std::int64_t>(count / 8, 1, product.block / p);
  const std::int64_t blocks = ceil_div(count, block);
  const bool adjacent = c.col_stride == 1;
  const bool carries = !adjacent || steps.count() > 1;
  Buffer<T> scratch(carries ? threads * block * block * p * p : 0);

  parallel_for(blocks * blocks, threads, [&](std::int64_t task, int thread) {
    // Long rows first: the last tasks are short ones.
    const std::int64_t row_block = blocks - 1 - task / blocks, col_block = task % blocks;
    const std::int64_t i0 = row_block * block, i1 = std::min(i0 + block, count);
    const std::int64_t j0 = col_block * block, j1 = std::min(j0 + block, count);
    if (j0 >= i1) return;
    if (product.open != nullptr) product.open();
    for (std::int64_t k = 0; k < steps.count(); ++k) {
      const std::int64_t depth = steps.size(k), base = steps.start(k) * count;
      const bool last = k + 1 == steps.count();
      for (std::int64_t j = j0; j < j1; ++j) {
        for (std::int64_t i = std::max(i0, j); i < i1; ++i) {
          const E *a = left + (base + i * depth) * p, *b = right + (base + j * depth) * p;
          T* carry = scratch.data() + ((thread * block + j - j0) * block + i - i0) * p * p;
          if (adjacent && last) {
            product.multiply(depth, a, b, alpha, std::min(p, n - i * p), std::min(p, n - j * p), (i - j) * p,
                             k > 0 ? carry : nullptr, static_cast<T*>(c.at(i * p, j * p)), c.row_stride);
          } else {
            if (k == 0) std::fill(carry, carry + p * p, T(0));
            product.multiply(depth, a, b, T(1), p, p, p, nullptr, carry, p);
          }
        }
      }
    }
    if (product.close != nullptr) product.close();
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

// Packs `depth` entries of kPackPanels panels of A = source, or as many as there are, both ways: those that begin at
// `panel`, from `columns` columns that begin at `start`.  `right` and `left` are the panels' places.
template <class E, class T>
void pack_panels(const isa::Product<E, T>& product, const MatrixView& source, std::int64_t panel, std::int64_t start,
                 std::int64_t columns, std::int64_t depth, E* right, E* left) {
  const std::int64_t p = product.panel, lanes = std::min(kPackPanels * p, source.rows - panel * p);
  product.pack[static_cast<int>(source.dtype)](source.at(panel * p, start), source.row_stride, source.col_stride, lanes,
                                               columns, right, depth * p);
  for (std::int64_t at = 0; at < lanes * depth; at += depth * p) product.turn(depth, right + at, left + at);
}

// Lower triangle of C += alpha * A A^T for A = source [n, depth] of any dtype that the product packs, any stride.
template <class E, class T>
void add_gram(const isa::Product<E, T>& product, const MatrixView& source, T alpha, const MatrixView& c, int threads) {
  constexpr std::int64_t values = std::is_same_v<E, T> ? 1 : 2;  // of an entry
  const std::int64_t p = product.panel, n = source.rows, count = ceil_div(n, p),
                     entries = ceil_div(source.cols, values);
  if (n == 0 || entries == 0) return;
  threads = useful_threads(n * n / 2 * source.cols, 1 << 20, threads);
  const Steps sweeps(entries, kSweep, product.round);
  const std::int64_t size = count * p * sweeps.step;
  Buffer<E> right(size), left(size);
  for (std::int64_t sweep = 0; sweep < sweeps.count(); ++sweep) {
    const std::int64_t first = sweeps.start(sweep);
    const Steps steps(ceil_div(sweeps.size(sweep), product.round) * product.round, product.depth, product.round);
    const std::int64_t groups = ceil_div(count, kPackPanels);
    parallel_for(groups * steps.count(), threads, [&](std::int64_t task, int) {
      const std::int64_t k = task / groups, panel = task % groups * kPackPanels;
      const std::int64_t depth = steps.size(k), start = (first + steps.start(k)) * values;
      const std::int64_t at = (steps.start(k) * count + panel * depth) * p;
      pack_panels(product, source, panel, start, std::min(depth * values, source.cols - start), depth,
                  right.data() + at, left.data() + at);
    });
    add_blocks(product, right.data(), left.data(), steps, n, alpha, c, threads);
  }
}

}  // namespace hpa
