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
//                Larger float32 matrices: float32 with float64 sums in the diagonal blocks and the norms; the largest
//                relative error is around cond(H) * 2^-24 / 10, some 1e-5 at the default damping.
// Scratch        one cols^2 matrix (the caller's is not changed) and a strip of 240 * cols.
// Design         The sweep is right-looking: each step packs its strip once and updates what is left with the same
//                symmetric product that accumulate_gram uses.  Owners and order of sums are fixed by shape: the result
//                does not depend on the number of threads.
#include <algorithm>
#include <cmath>

#include "buffer.h"
#include "hpa/check.h"
#include "hpa/kernels.h"
#include "panels.h"
#include "parallel.h"

namespace hpa {
namespace {

constexpr std::int64_t kSmall = 1024;     // columns up to which float32 matrices are factored in float64
constexpr std::int64_t kBlock = 240;      // columns of a step: a multiple of every panel width
constexpr double kLowRankShare = 0.8;     // tokens / cols below which the low-rank route does less work
constexpr double kLeastRemainder = 1e-8;  // smallest 1 - |.|^2 that float64 still resolves to 1e-7 or so
constexpr std::int64_t kGrain = 1 << 20;  // multiply-adds worth a thread
constexpr std::int64_t kStripPanels = 4;  // panels of right-hand sides that a task solves for

enum class Purpose { inverse_norms, pivots, factor };

// Cholesky of one diagonal block, row by row: block [size, size] contiguous, lower triangle in and out.
template <class T>
FactorStatus factor_block(const isa::Kernels<T>& kernels, std::int64_t size, T* block) {
  for (std::int64_t row = 0; row < size; ++row) {
    T* current = block + row * size;
    std::int64_t col = 0;
    // Four columns at a time read the finished part of this row once; the last few products are added one by one.
    for (; col + 4 <= row; col += 4) {
      const T* known[4];
      double sums[4];
      for (int k = 0; k < 4; ++k) known[k] = block + (col + k) * size;
      kernels.dot4(known, current, col, sums);
      for (int k = 0; k < 4; ++k) {
        double sum = sums[k];
        for (int i = 0; i < k; ++i)
          sum += static_cast<double>(known[k][col + i]) * static_cast<double>(current[col + i]);
        current[col + k] = static_cast<T>((static_cast<double>(current[col + k]) - sum) / known[k][col + k]);
      }
    }
    for (; col < row; ++col) {
      const T* known = block + col * size;
      const double rest = static_cast<double>(current[col]) - kernels.dot(known, current, col);
      current[col] = static_cast<T>(rest / known[col]);
    }
    const double pivot = static_cast<double>(current[row]) - kernels.sum_of_squares(current, row);
    if (!std::isfinite(pivot)) return FactorStatus::non_finite;
    const T root = static_cast<T>(std::sqrt(std::max(pivot, 0.0)));
    if (!(root > 0)) return FactorStatus::not_positive_definite;
    current[row] = root;
  }
  return FactorStatus::ok;
}

// Eliminates the columns of H = `matrix` (lower triangle of order n, row-major, destroyed) block by block.
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
//   factor          like pivots, and L is stored in `matrix`
template <class T>
FactorStatus eliminate(const isa::Kernels<T>& kernels, std::int64_t n, T* matrix, Purpose purpose, double* sums,
                       int threads) {
  const std::int64_t p = kernels.panel, count = ceil_div(n, p), largest = std::min(kBlock, n);
  const MatrixView c = {matrix, sizeof(T) == 4 ? DType::f32 : DType::f64, n, n, n, 1};
  threads = useful_threads(n * n * n / 3, kGrain, threads);
  Buffer<T> panels(count * largest * p);
  Buffer<T> block(largest * largest);
  Buffer<T> scratch(threads * kPackRows * largest);
  if (purpose == Purpose::inverse_norms) std::fill(sums, sums + n, 0.0);

  for (std::int64_t start = 0; start < n; start += kBlock) {
    const std::int64_t size = std::min(kBlock, n - start), stop = start + size;
    for (std::int64_t row = 0; row < size; ++row) {
      const T* from = matrix + (start + row) * n + start;
      std::copy(from, from + row + 1, block.data() + row * size);
    }
    const FactorStatus status = factor_block(kernels, size, block.data());
    if (status != FactorStatus::ok) return status;
    if (purpose != Purpose::inverse_norms) {
      for (std::int64_t row = 0; row < size; ++row) {
        const T* values = block.data() + row * size;
        sums[start + row] = static_cast<double>(values[row]);
        if (purpose == Purpose::factor) std::copy(values, values + row + 1, matrix + (start + row) * n + start);
      }
    }

    const std::int64_t first_panel = purpose == Purpose::inverse_norms ? 0 : ceil_div(stop, p);
    parallel_for(count - first_panel, threads, [&](std::int64_t task, int thread) {
      const std::int64_t index = first_panel + task, col = index * p, width = std::min(p, n - col);
      T* lanes = panels.data() + index * size * p;
      T* pack_scratch = scratch.data() + thread * kPackRows * largest;
      if (col >= stop) {
        pack_panel(kernels, {matrix, c.dtype, n, n, n, 1}, col, start, size, lanes, pack_scratch);
      } else if (col >= start) {
        std::fill(lanes, lanes + size * p, T(0));
        for (std::int64_t lane = 0; lane < width; ++lane) lanes[(col - start + lane) * p + lane] = T(1);
      } else {
        pack_panel(kernels, {matrix + start * n, c.dtype, n, size, 1, n}, col, 0, size, lanes, pack_scratch);
      }
      kernels.solve(size, block.data(), size, lanes);
      if (col >= stop) {
        for (std::int64_t lane = 0; lane < width; ++lane) {
          T* row = matrix + (col + lane) * n + start;
          if (purpose == Purpose::inverse_norms) {
            std::fill(row, row + size, T(0));  // becomes the right-hand side of block k
          } else if (purpose == Purpose::factor) {
            for (std::int64_t d = 0; d < size; ++d) row[d] = lanes[d * p + lane];
          }
        }
      } else if (width == p) {
        kernels.add_lane_squares(size, lanes, sums + col);
      } else {
        double lane_sums[64] = {};
        kernels.add_lane_squares(size, lanes, lane_sums);
        for (std::int64_t lane = 0; lane < width; ++lane) sums[col + lane] += lane_sums[lane];
      }
    });
    add_symmetric_product(kernels, panels.data(), size, n, ceil_div(stop, p) * p, first_panel * p, T(-1), c, threads);
  }
  return FactorStatus::ok;
}

double mean_diagonal(const MatrixView& matrix, auto read) {
  double sum = 0;
  for (std::int64_t j = 0; j < matrix.rows; ++j) sum += read(matrix.at(j, j));
  return sum / static_cast<double>(matrix.rows);
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

// Copies the lower triangle of `gram`; in reversed order of indices where `flip`.
template <class T>
void copy_lower(const isa::Kernels<T>& kernels, const MatrixView& gram, bool flip, T* matrix, int threads) {
  const std::int64_t n = gram.rows;
  const auto load = kernels.load[static_cast<int>(gram.dtype)];
  threads = useful_threads(n * n / 2, 1 << 16, threads);
  parallel_for(n, threads, [&](std::int64_t row, int) {
    if (flip) {
      // Element (row, col) of the reversed matrix is (n-1-row, n-1-col) of the other triangle, so (n-1-col, n-1-row).
      load(gram.at(n - 1, n - 1 - row), -gram.row_stride, row + 1, matrix + row * n);
    } else {
      load(gram.at(row, 0), gram.col_stride, row + 1, matrix + row * n);
    }
  });
}

template <class T>
InverseDiagonalResult dense(const TensorView& out, const MatrixView& given, bool is_gram, double scale, double damping,
                            DiagonalMode mode, int threads) {
  const isa::Kernels<T>& kernels = isa::active().kernels<T>();
  const std::int64_t n = given.cols;
  const bool flip = mode == DiagonalMode::pivot;
  Buffer<T> matrix(n * n);
  const MatrixView c = {matrix.data(), sizeof(T) == 4 ? DType::f32 : DType::f64, n, n, n, 1};
  if (is_gram) {
    copy_lower(kernels, given, flip, matrix.data(), threads);
  } else {
    parallel_for(n, useful_threads(n * n, 1 << 16, threads),
                 [&](std::int64_t row, int) { std::fill(&matrix[row * n], &matrix[row * n] + row + 1, T(0)); });
    MatrixView lanes = {given.data, given.dtype, n, given.rows, given.col_stride, given.row_stride};
    if (flip) {
      lanes.data = given.at(0, n - 1);
      lanes.row_stride = -given.col_stride;
    }
    add_gram(kernels, lanes, static_cast<T>(scale), c, threads);
  }

  InverseDiagonalResult result;
  result.lambda =
      damping * mean_diagonal(c, [](const void* at) { return static_cast<double>(*static_cast<const T*>(at)); });
  if (!std::isfinite(result.lambda)) {
    result.status = FactorStatus::non_finite;
    return result;
  }
  if (!(result.lambda > 0)) return result;
  for (std::int64_t j = 0; j < n; ++j) {
    T& diagonal = matrix[j * n + j];
    diagonal = static_cast<T>(static_cast<double>(diagonal) + result.lambda);
  }

  Buffer<double> sums(n);
  const Purpose purpose = flip ? Purpose::pivots : Purpose::inverse_norms;
  result.status = eliminate(kernels, n, matrix.data(), purpose, sums.data(), threads);
  if (result.status != FactorStatus::ok) return result;
  if (flip) {
    write_out(out, [&](std::int64_t j) { return 1.0 / (sums[n - 1 - j] * sums[n - 1 - j]); });
  } else {
    write_out(out, [&](std::int64_t j) { return sums[j]; });
  }
  return result;
}

// Squared column norms of L^-1 x for a strip of columns of x: norms[j] for j in [first, first + width).
void solve_strip(const isa::Kernels<double>& kernels, const MatrixView& x, const double* factor, std::int64_t first,
                 std::int64_t width, double* rest, double* lanes, double* panel, double* pack_scratch, double* norms) {
  const std::int64_t n = x.rows, p = kernels.panel, strip_panels = ceil_div(width, p), pitch = strip_panels * p;
  const auto load = kernels.load[static_cast<int>(x.dtype)];
  for (std::int64_t row = 0; row < n; ++row) {
    load(x.at(row, first), x.col_stride, width, rest + row * pitch);
    std::fill(rest + row * pitch + width, rest + (row + 1) * pitch, 0.0);
  }
  std::fill(norms, norms + pitch, 0.0);
  for (std::int64_t start = 0; start < n; start += kBlock) {
    const std::int64_t size = std::min(kBlock, n - start), stop = start + size;
    for (std::int64_t q = 0; q < strip_panels; ++q) {
      double* solved = lanes + q * kBlock * p;
      for (std::int64_t d = 0; d < size; ++d) {
        const double* from = rest + (start + d) * pitch + q * p;
        std::copy(from, from + p, solved + d * p);
      }
      kernels.solve(size, factor + start * n + start, n, solved);
      kernels.add_lane_squares(size, solved, norms + q * p);
    }
    for (std::int64_t row = stop; row < n; row += p) {
      pack_panel(kernels, {const_cast<double*>(factor), DType::f64, n, n, n, 1}, row, start, size, panel, pack_scratch);
      for (std::int64_t q = 0; q < strip_panels; ++q) {
        kernels.update(size, panel, lanes + q * kBlock * p, -1.0, std::min(p, n - row), p, n,
                       rest + row * pitch + q * p, pitch);
      }
    }
  }
}

// Leaves result.low_rank false where cancellation would cost too many digits: nothing usable was computed then.
InverseDiagonalResult low_rank(const TensorView& out, const MatrixView& x, double scale, double damping, int threads) {
  const isa::Kernels<double>& kernels = isa::active().f64;
  const std::int64_t tokens = x.rows, cols = x.cols, p = kernels.panel;
  InverseDiagonalResult result;
  result.low_rank = true;
  if (tokens == 0) return result;  // G = 0, lambda = 0
  Buffer<double> matrix(tokens * tokens);
  for (std::int64_t row = 0; row < tokens; ++row)
    std::fill(&matrix[row * tokens], &matrix[row * tokens] + row + 1, 0.0);
  const MatrixView k = {matrix.data(), DType::f64, tokens, tokens, tokens, 1};
  add_gram(kernels, x, scale, k, threads);

  // trace(Y Y^T) = trace(Y^T Y), of which lambda takes the mean over columns.
  const auto read = [](const void* at) { return *static_cast<const double*>(at); };
  result.lambda = damping * mean_diagonal(k, read) * static_cast<double>(tokens) / static_cast<double>(cols);
  if (!std::isfinite(result.lambda)) {
    result.status = FactorStatus::non_finite;
    return result;
  }
  if (!(result.lambda > 0)) return result;
  for (std::int64_t t = 0; t < tokens; ++t) matrix[t * tokens + t] += result.lambda;
  Buffer<double> pivots(tokens);
  result.status = eliminate(kernels, tokens, matrix.data(), Purpose::factor, pivots.data(), threads);
  if (result.status != FactorStatus::ok) return result;

  const std::int64_t strip = kStripPanels * p, strips = ceil_div(cols, strip);
  threads = useful_threads(tokens * tokens * cols, kGrain, threads);
  Buffer<double> norms(strips * strip);
  Buffer<double> rest(threads * tokens * strip);
  Buffer<double> lanes(threads * kStripPanels * kBlock * p);
  Buffer<double> panel(threads * kBlock * p);
  Buffer<double> pack_scratch(threads * kPackRows * kBlock);
  parallel_for(strips, threads, [&](std::int64_t task, int thread) {
    solve_strip(kernels, x, matrix.data(), task * strip, std::min(strip, cols - task * strip),
                rest.data() + thread * tokens * strip, lanes.data() + thread * kStripPanels * kBlock * p,
                panel.data() + thread * kBlock * p, pack_scratch.data() + thread * kPackRows * kBlock,
                norms.data() + task * strip);
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
