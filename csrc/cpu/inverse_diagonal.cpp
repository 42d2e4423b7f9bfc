// out[j] = [(G + lambda I)^-1]_jj              "exact"       lambda = damping * mean(diag G)
// out[j] = U_jj^2,  (G + lambda I)^-1 = U^T U  "pivot"       G [cols, cols] or scale * x^T x, x [tokens, cols]
//
// exact, dense   With H = G + lambda I = L L^T the diagonal is the squared column norms of L^-1: sums of squares, so
//                nothing cancels.  Factor and inverse come out of one sweep over blocks of columns (eliminate() below):
//                (1/3 + 1/3) cols^3 flops, where factor and full inverse take 1 and SparseGPT's route 4/3.
// exact, few     tokens < 0.8 cols: with Y = sqrt(scale) x and K = lambda I + Y Y^T = L L^T,
// tokens         out[j] = (1 - |L^-1 Y_j|^2) / lambda.  2 tokens^2 cols + tokens^3 / 3 flops, no cols^2 matrix.  The
//                difference cancels by a factor lambda / H_jj, which is why this route is float64, and why it gives way
//                to the dense one where less than 1e-8 is left.
// pivot          U_jj^2 = 1 / R_jj^2 where H = R R^T with R upper triangular: the Cholesky factor of H with the order
//                of its indices reversed.  1/3 cols^3 flops, no inverse.
//
// Arithmetic     float64 for float64 input, for at most 1024 columns (where it costs milliseconds), and for few tokens.
//                Larger float32 matrices: float32 with float64 sums in the norms; the largest relative error is between
//                1/20 and 1/3 of cond(H) * 2^-24 (LAPACK's too), some 1e-5 at the default damping, below 3e-2 at
//                condition 1e6.  A massive channel makes H ill-conditioned by its scale only, and costs no digits.
// Scratch        half a cols^2 matrix (the caller's is not changed) and two strips of 240 * cols.
// Design         The sweep is right-looking: a step packs its strip once and updates all that is left.  Blocks of the
//                matrix are stored as the panels that the products read and write, so that a tile is one run of memory
//                and the right-hand sides need no packing.  Owners and order of sums are fixed by shape: the result does
//                not depend on the number of threads.
// Bound          multiply-adds of the core: the update takes 0.9 of the time at 4096 columns.  Zen 3, one thread, of the
//                peak of 98 GF/s (49 in float64): 0.75 at 4096 columns, 0.67 at 1024 (float64), 0.6 at 512.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "buffer.h"
#include "hpa/check.h"
#include "hpa/kernels.h"
#include "panels.h"
#include "parallel.h"

namespace hpa {
namespace {

constexpr std::int64_t kSmall = 1024;     // columns up to which float32 matrices are factored in float64
constexpr std::int64_t kFew = 48;         // columns up to which padding to wide panels costs more than they save
constexpr std::int64_t kBlock = 240;      // columns of a step: long enough to hide reading and writing what it updates
constexpr std::int64_t kSmallBlock = 96;  // of small matrices: the more steps, the less work outside the updates
constexpr double kLowRankShare = 0.8;     // tokens / cols below which the low-rank route does less work
constexpr double kLeastRemainder = 1e-8;  // smallest 1 - |.|^2 that float64 still resolves to 1e-7 or so
constexpr std::int64_t kGrain = 1 << 19;  // multiply-adds worth a thread
constexpr std::int64_t kStripLanes = 96;  // right-hand sides that a task of the low-rank route solves for

enum class Purpose { inverse_norms, pivots, factor };

std::int64_t round_up(std::int64_t count, std::int64_t multiple) { return ceil_div(count, multiple) * multiple; }

// Lower triangle of a symmetric matrix, extended to `order`, a multiple of the tile.  Block k holds the columns
// [start(k), stop(k)) and their rows from start(k) on, in panels [rows][panel] of adjacent columns: a tile of the update
// is one run of memory, and rows of a panel are the operand that the next product needs.  Half a square in all.
template <class T>
class BlockMatrix {
 public:
  BlockMatrix(const isa::Kernels<T>& kernels, std::int64_t n)
      : panel(kernels.panel),
        order(round_up(n, kernels.panel)),
        block(std::min(order, round_up(n <= kSmall ? kSmallBlock : kBlock, kernels.panel))),
        blocks(ceil_div(order, block)),
        data_(offset(blocks)) {}

  const std::int64_t panel, order, block, blocks;

  std::int64_t start(std::int64_t k) const { return k * block; }
  std::int64_t stop(std::int64_t k) const { return std::min(start(k) + block, order); }
  T* columns(std::int64_t k) const { return data_.data() + offset(k); }
  // Element (row, col), col the first of a panel and row from start of its block on.
  T* at(std::int64_t row, std::int64_t col) const {
    const std::int64_t k = col / block;
    return columns(k) + (col - start(k)) * (order - start(k)) + (row - start(k)) * panel;
  }

 private:
  std::int64_t offset(std::int64_t k) const {
    const std::int64_t whole = std::min(k, order / block), rest = std::min(k * block, order) - whole * block;
    return block * (whole * order - block * (whole * (whole - 1) / 2)) + rest * rest;
  }
  Buffer<T> data_;
};

// C += alpha * A A^T for the block rows from `first_row` and the block columns from `first_col` on, on and below the
// diagonal.  A is packed with `depth`: rows from start(first_row) on in `strips`; panel_of(col) finds the panel of a
// column.  A block is a task: its strips stay in the second-level cache while panel after panel passes through the first.
template <class T, class PanelOf>
void update_blocks(const isa::Kernels<T>& kernels, const BlockMatrix<T>& c, std::int64_t first_row,
                   std::int64_t first_col, std::int64_t depth, const T* strips, const PanelOf& panel_of, T alpha,
                   int threads) {
  const std::int64_t rows = c.blocks - first_row, cols = c.blocks - first_col;
  const std::int64_t work = (c.order - c.start(first_row)) * (c.order - c.start(first_col)) * depth / 2;
  parallel_for(rows * cols, useful_threads(work, kGrain, threads), [&](std::int64_t task, int) {
    // Long rows first: the last tasks are short ones.
    const std::int64_t i = c.blocks - 1 - task / cols, j = first_col + task % cols;
    if (j > i) return;
    for (std::int64_t col = c.start(j); col < c.stop(j); col += c.panel) {
      const std::int64_t above = i == j ? (col - c.start(j)) / kernels.strip * kernels.strip : 0;
      const std::int64_t row = c.start(i) + above;
      kernels.multiply_strips(depth, (c.stop(i) - row) / kernels.strip, strips + (row - c.start(first_row)) * depth,
                              depth * kernels.strip, panel_of(col), alpha, c.at(row, col));
    }
  });
}

// Cholesky of the diagonal block k, panel by panel: L_kk in strips and, in `panels`, transposed.
template <class T>
FactorStatus factor_block(const isa::Kernels<T>& kernels, const BlockMatrix<T>& matrix, std::int64_t k, T* strips,
                          T* panels) {
  const std::int64_t p = kernels.panel, q = kernels.strip, start = matrix.start(k), size = matrix.stop(k) - start;
  std::fill(panels, panels + size * size, T(0));
  for (std::int64_t col = 0; col < size; col += p) {
    const std::int64_t row = col / q * q;
    T* c = matrix.at(start, start + col);
    if (col > 0) {
      kernels.multiply_strips(col, (size - row) / q, strips + row * size, size * q, panels + col * size, T(-1),
                              c + row * p);
    }
    T* corner = panels + col * size + col * p;
    kernels.transpose_square(c + col * p, corner);
    const std::int64_t pivots = kernels.factor_corner(corner);
    if (pivots < p) {
      return std::isfinite(corner[pivots * p + pivots]) ? FactorStatus::not_positive_definite
                                                        : FactorStatus::non_finite;
    }
    for (std::int64_t below = col + p; below < size; below += p) {
      T* lanes = panels + below * size + col * p;
      kernels.transpose_square(c + below * p, lanes);
      kernels.solve_corner(corner, lanes);
    }
    for (std::int64_t lane = col; lane < size; lane += p) {
      kernels.cut_panel(p, panels + lane * size + col * p, strips + lane * size + col * q, size * q);
    }
  }
  return FactorStatus::ok;
}

// Eliminates the columns of a positive definite H (destroyed) block by block.
//
// After the steps up to block k the part below it holds, right of the block, what is left of H to be factored, and left
// of it the right-hand sides of L X = I as far as they are solved.  A step factors the diagonal block L_kk, then for
// every column j solves L_kk p_j = (rows of block k of the right-hand side, if j is left of or in the block; the column
// of H below the diagonal block, transposed, if right of it).  The p_j of the left are rows of the inverse factor:
// their squares are added to sums[j].  The p_j of the right are the factor's panel.  Both together are one packed
// operand P, and all rows below are updated at once by  C[i, j] -= <p_i, p_j>.
//
//   inverse_norms   sums[j] = |L^-1 e_j|^2
//   pivots          sums[j] = L_jj; the left part is left out
//   factor          like pivots, and the columns of block k become those of L, in strips
template <class T>
FactorStatus eliminate(const isa::Kernels<T>& kernels, const BlockMatrix<T>& matrix, Purpose purpose, double* sums,
                       int threads) {
  const std::int64_t p = kernels.panel, q = kernels.strip, order = matrix.order;
  const bool inverse = purpose == Purpose::inverse_norms;
  Buffer<T> strips(order * matrix.block);
  Buffer<T> panels(order * matrix.block);
  std::fill(sums, sums + order, 0.0);

  for (std::int64_t k = 0; k < matrix.blocks; ++k) {
    const std::int64_t start = matrix.start(k), stop = matrix.stop(k), size = stop - start;
    const FactorStatus status = factor_block(kernels, matrix, k, strips.data(), panels.data());
    if (status != FactorStatus::ok) return status;
    if (!inverse) {
      for (std::int64_t j = 0; j < size; ++j) {
        sums[start + j] = static_cast<double>(panels[j / p * p * size + j * p + j % p]);
      }
    }

    const auto panel_of = [&](std::int64_t col) {
      return col < stop ? matrix.at(start, col) : panels.data() + (col - start) * size;
    };
    const std::int64_t first = inverse ? 0 : stop;
    parallel_for((order - first) / p, useful_threads((order - first) * size * size / 2, kGrain, threads),
                 [&](std::int64_t task, int) {
                   const std::int64_t col = first + task * p;
                   T* solved = panel_of(col);
                   if (col >= stop) {
                     for (std::int64_t d = 0; d < size; d += p) {
                       T* from = matrix.at(col, start + d);
                       kernels.transpose_square(from, solved + d * p);
                       if (inverse) std::fill(from, from + p * p, T(0));  // becomes the right-hand side of block k
                     }
                     kernels.solve_strips(size, 0, strips.data(), solved);
                     kernels.cut_panel(size, solved, strips.data() + (col - start) * size, size * q);
                     return;
                   }
                   std::int64_t zeros = 0;
                   if (col >= start) {
                     std::fill(solved, solved + size * p, T(0));
                     for (std::int64_t lane = 0; lane < p; ++lane) solved[(col - start + lane) * p + lane] = T(1);
                     zeros = (col - start) / q * q;
                   }
                   kernels.solve_strips(size, zeros, strips.data(), solved);
                   kernels.add_lane_squares(size - zeros, solved + zeros * p, sums + col);
                 });
    update_blocks(kernels, matrix, k + 1, inverse ? 0 : k + 1, size, strips.data() + size * size, panel_of, T(-1),
                  threads);
    if (purpose == Purpose::factor) {
      std::copy(strips.data(), strips.data() + (order - start) * size, matrix.columns(k));
    }
  }
  return FactorStatus::ok;
}

// Extends the matrix of order n by ones on the diagonal.
template <class T>
void extend(const BlockMatrix<T>& matrix, std::int64_t n) {
  for (std::int64_t j = n; j < matrix.order; ++j) matrix.at(j, j / matrix.panel * matrix.panel)[j % matrix.panel] = 1;
}

// Copies the lower triangle of `gram`; in reversed order of indices where `flip`.
template <class T>
void copy_lower(const isa::Kernels<T>& kernels, const MatrixView& gram, bool flip, const BlockMatrix<T>& matrix,
                int threads) {
  const std::int64_t n = gram.rows, p = matrix.panel, blocks = matrix.blocks;
  const auto load = kernels.load[static_cast<int>(gram.dtype)];
  threads = useful_threads(n * n / 2, 1 << 16, threads);
  Buffer<T> scratch(threads * matrix.block);
  parallel_for(blocks * blocks, threads, [&](std::int64_t task, int thread) {
    const std::int64_t i = blocks - 1 - task / blocks, j = task % blocks;
    if (j > i) return;
    const std::int64_t top = matrix.start(i), bottom = std::min(matrix.stop(i), n), left = matrix.start(j);
    const std::int64_t right = std::min(matrix.stop(j), n);
    T* line = scratch.data() + thread * matrix.block;
    if (i == j || bottom < matrix.stop(i)) {  // above the diagonal and beyond the order of `gram`
      for (std::int64_t col = left; col < matrix.stop(j); col += p) {
        std::fill(matrix.at(top, col), matrix.at(top, col) + (matrix.stop(i) - top) * p, T(0));
      }
    }
    if (flip) {
      // Element (row, col) of the reversed matrix is (n-1-row, n-1-col) of the other triangle, so (n-1-col, n-1-row).
      for (std::int64_t col = left; col < right; ++col) {
        const std::int64_t first = std::max(top, col);
        load(gram.at(n - 1 - col, n - 1 - first), -gram.col_stride, bottom - first, line);
        T* to = matrix.at(first, left + (col - left) / p * p) + (col - left) % p;
        for (std::int64_t row = 0; row < bottom - first; ++row) to[row * p] = line[row];
      }
    } else {
      for (std::int64_t row = top; row < bottom; ++row) {
        const std::int64_t count = std::min(right, row + 1) - left;
        load(gram.at(row, left), gram.col_stride, count, line);
        T* to = matrix.at(row, left);
        for (std::int64_t col = 0; col < count; col += p, to += (matrix.order - left) * p) {
          std::copy(line + col, line + std::min(col + p, count), to);
        }
      }
    }
  });
  extend(matrix, n);
}

// Lower triangle of scale * A A^T, A = source [n, depth] of any dtype and stride.
template <class T>
void gram_of(const isa::Kernels<T>& kernels, const MatrixView& source, T scale, const BlockMatrix<T>& matrix,
             int threads) {
  const std::int64_t n = source.rows, p = matrix.panel, order = matrix.order;
  const std::int64_t deepest = std::min(kBlock, source.cols);
  Buffer<T> strips(order * deepest);
  Buffer<T> panels(order * deepest);
  threads = std::max(threads, 1);
  Buffer<T> scratch(threads * kPackRows * deepest);
  for (std::int64_t k = 0; k < matrix.blocks; ++k) {
    std::fill(matrix.columns(k), matrix.columns(k + 1), T(0));
  }
  for (std::int64_t begin = 0; begin < source.cols; begin += deepest) {
    const std::int64_t depth = std::min(deepest, source.cols - begin);
    parallel_for(order / p, useful_threads(n * depth, 1 << 16, threads), [&](std::int64_t task, int thread) {
      const std::int64_t col = task * p;
      T* panel = panels.data() + col * depth;
      if (col >= n) {
        std::fill(panel, panel + depth * p, T(0));
      } else {
        pack_panel(kernels, source, col, begin, depth, panel, scratch.data() + thread * kPackRows * deepest);
      }
      kernels.cut_panel(depth, panel, strips.data() + col * depth, depth * kernels.strip);
    });
    const auto panel_of = [&](std::int64_t col) { return panels.data() + col * depth; };
    update_blocks(kernels, matrix, 0, 0, depth, strips.data(), panel_of, scale, threads);
  }
  extend(matrix, n);
}

// Adds lambda = damping * (trace of the first n elements of the diagonal) / cols to these elements.
template <class T>
double damp(const BlockMatrix<T>& matrix, std::int64_t n, std::int64_t cols, double damping) {
  const auto for_diagonal = [&](const auto& body) {
    for (std::int64_t col = 0; col < n; col += matrix.panel) {
      T* corner = matrix.at(col, col);
      for (std::int64_t i = 0; i < std::min(matrix.panel, n - col); ++i) body(corner[i * matrix.panel + i]);
    }
  };
  double trace = 0;
  for_diagonal([&](T element) { trace += static_cast<double>(element); });
  const double lambda = damping * trace / static_cast<double>(cols);
  for_diagonal([&](T& element) { element = static_cast<T>(static_cast<double>(element) + lambda); });
  return lambda;
}

// Writes results as the dtype of `out` (contiguous float32 or float64).
template <class F>
void write_out(const TensorView& out, const F& value) {
  for (std::int64_t j = 0; j < out.shape[0]; ++j) {
    if (out.dtype == DType::f32) {
      static_cast<float*>(out.data)[j] = static_cast<float>(value(j));
    } else {
      static_cast<double*>(out.data)[j] = value(j);
    }
  }
}

// Of a matrix of order n that is to be factored.
template <class T>
const isa::Kernels<T>& kernels_for(std::int64_t n) {
  if constexpr (std::is_same_v<T, double>) {
    if (n <= kFew) return isa::narrow();
  }
  return isa::active().kernels<T>();
}

template <class T>
InverseDiagonalResult dense(const TensorView& out, const MatrixView& given, bool is_gram, double scale, double damping,
                            DiagonalMode mode, int threads) {
  const std::int64_t n = given.cols;
  const isa::Kernels<T>& kernels = kernels_for<T>(n);
  const bool flip = mode == DiagonalMode::pivot;
  const BlockMatrix<T> matrix(kernels, n);
  if (is_gram) {
    copy_lower(kernels, given, flip, matrix, threads);
  } else {
    MatrixView lanes = {given.data, given.dtype, n, given.rows, given.col_stride, given.row_stride};
    if (flip) {
      lanes.data = given.at(0, n - 1);
      lanes.row_stride = -given.col_stride;
    }
    gram_of(kernels, lanes, static_cast<T>(scale), matrix, threads);
  }

  InverseDiagonalResult result;
  result.lambda = damp(matrix, n, n, damping);
  if (!std::isfinite(result.lambda)) {
    result.status = FactorStatus::non_finite;
    return result;
  }
  if (!(result.lambda > 0)) return result;

  Buffer<double> sums(matrix.order);
  result.status = eliminate(kernels, matrix, flip ? Purpose::pivots : Purpose::inverse_norms, sums.data(), threads);
  if (result.status != FactorStatus::ok) return result;
  if (flip) {
    write_out(out, [&](std::int64_t j) { return 1.0 / (sums[n - 1 - j] * sums[n - 1 - j]); });
  } else {
    write_out(out, [&](std::int64_t j) { return sums[j]; });
  }
  return result;
}

// norms[j] = |L^-1 x_j|^2 for the columns x_j of x in [first, first + width), L in strips as `eliminate` leaves it.
// rest: order * width, rounded up to whole panels.
void add_solved_squares(const isa::Kernels<double>& kernels, const BlockMatrix<double>& factor, const MatrixView& x,
                        std::int64_t first, std::int64_t width, double* rest, double* norms) {
  const std::int64_t p = kernels.panel, q = kernels.strip, order = factor.order, count = ceil_div(width, p);
  const auto load = kernels.load[static_cast<int>(x.dtype)];
  std::fill(rest, rest + count * p * order, 0.0);
  for (std::int64_t row = 0; row < x.rows; ++row) {
    for (std::int64_t lane = 0; lane < width; lane += p) {
      load(x.at(row, first + lane), x.col_stride, std::min(p, width - lane), rest + lane * order + row * p);
    }
  }
  for (std::int64_t k = 0; k < factor.blocks; ++k) {
    const std::int64_t start = factor.start(k), size = factor.stop(k) - start;
    const double* strips = factor.columns(k);
    for (std::int64_t lane = 0; lane < width; lane += p) {
      double* solved = rest + lane * order + start * p;
      kernels.solve_strips(size, 0, strips, solved);
      kernels.add_lane_squares(size, solved, norms + lane);
    }
    for (std::int64_t i = k + 1; i < factor.blocks; ++i) {
      const std::int64_t row = factor.start(i), rows = factor.stop(i) - row;
      for (std::int64_t lane = 0; lane < width; lane += p) {
        double* panel = rest + lane * order;
        kernels.multiply_strips(size, rows / q, strips + (row - start) * size, size * q, panel + start * p, -1.0,
                                panel + row * p);
      }
    }
  }
}

// Leaves result.low_rank false where cancellation would cost too many digits: nothing usable was computed then.
InverseDiagonalResult low_rank(const TensorView& out, const MatrixView& x, double scale, double damping, int threads) {
  const isa::Kernels<double>& kernels = kernels_for<double>(x.rows);
  const std::int64_t tokens = x.rows, cols = x.cols, p = kernels.panel;
  InverseDiagonalResult result;
  result.low_rank = true;
  if (tokens == 0) return result;  // G = 0, lambda = 0
  const BlockMatrix<double> matrix(kernels, tokens);
  gram_of(kernels, x, scale, matrix, threads);

  result.lambda = damp(matrix, tokens, cols, damping);  // trace(Y Y^T) = trace(Y^T Y)
  if (!std::isfinite(result.lambda)) {
    result.status = FactorStatus::non_finite;
    return result;
  }
  if (!(result.lambda > 0)) return result;
  Buffer<double> pivots(matrix.order);
  result.status = eliminate(kernels, matrix, Purpose::factor, pivots.data(), threads);
  if (result.status != FactorStatus::ok) return result;

  const std::int64_t width = round_up(kStripLanes, p), strips = ceil_div(cols, width);
  threads = useful_threads(tokens * tokens * cols / 2, kGrain, threads);
  Buffer<double> norms(strips * width);
  Buffer<double> rest(threads * matrix.order * width);
  std::fill(norms.data(), norms.data() + strips * width, 0.0);
  parallel_for(strips, threads, [&](std::int64_t task, int thread) {
    add_solved_squares(kernels, matrix, x, task * width, std::min(width, cols - task * width),
                       rest.data() + thread * matrix.order * width, norms.data() + task * width);
  });
  for (std::int64_t j = 0; j < cols; ++j) {
    if (!(1.0 - scale * norms[j] > kLeastRemainder)) {
      result.low_rank = false;
      return result;
    }
  }
  write_out(out, [&](std::int64_t j) { return (1.0 - scale * norms[j]) / result.lambda; });
  return result;
}

}  // namespace

InverseDiagonalResult inverse_diagonal(const TensorView& out, const std::optional<TensorView>& gram,
                                       const std::optional<TensorView>& activations, double scale, double damping,
                                       DiagonalMode mode, int threads) {
  check(gram.has_value() != activations.has_value(), "gram", "expected exactly one of gram and activations");
  const MatrixView given = gram ? as_matrix("gram", *gram) : as_matrix("activations", *activations);
  const std::int64_t cols = given.cols;
  if (gram) {
    check_shape("gram", *gram, {cols, cols});
    check(given.dtype == DType::f32 || given.dtype == DType::f64, "gram", "expected float32 or float64");
  }
  check_shape("out", out, {cols});
  check((out.dtype == DType::f32 || out.dtype == DType::f64) && (cols <= 1 || out.stride[0] == 1), "out",
        "expected contiguous float32 or float64");
  check(cols > 0, "gram", "expected at least one column");

  if (activations && mode == DiagonalMode::exact &&
      static_cast<double>(given.rows) < kLowRankShare * static_cast<double>(cols)) {
    const InverseDiagonalResult result = low_rank(out, given, scale, damping, threads);
    if (result.low_rank) return result;
    return dense<double>(out, given, false, scale, damping, mode, threads);
  }
  if (given.dtype == DType::f64 || cols <= kSmall) {
    return dense<double>(out, given, gram.has_value(), scale, damping, mode, threads);
  }
  return dense<float>(out, given, gram.has_value(), scale, damping, mode, threads);
}

}  // namespace hpa
