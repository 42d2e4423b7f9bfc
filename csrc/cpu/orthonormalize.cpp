// Rows v of `vectors` become orthonormal, and orthogonal to the rows of `basis`     vectors [m, n], basis [known, n]
//
// Method       Block classical Gram-Schmidt with reorthogonalisation (Barlow and Smoktunowicz 2013), blocks of eight
//              rows.  First sweep: take out the basis and the rows kept so far, then within the block, normalise.
//              Second sweep: the same once more on unit vectors, which brings the loss of orthogonality to the unit
//              roundoff whatever the condition of `vectors`.
// Dropped      rows with |rest| <= rtol * |v|, and rows that the second sweep shrinks below 1/sqrt(2) (Kahan and
//              Parlett): what is left of those is rounding noise, which must not be normalised into a direction.
// Arithmetic   as project.cpp; norms are summed in float64.  Rows are stored in their own dtype between sweeps.
// Bytes moved  a block reads the rows before it four times (two sweeps, dot products and differences): about m / 4
//              readings of `vectors` in all, against 2 m for vector-by-vector Gram-Schmidt.
// Design       Kept rows move up over dropped ones, so that rows [0, kept) are always the basis so far and every step
//              is a projection of some rows on others: project.cpp does the work.
#include <algorithm>
#include <cmath>
#include <vector>

#include "buffer.h"
#include "hpa/check.h"
#include "hpa/kernels.h"
#include "panels.h"
#include "parallel.h"
#include "rows.h"

namespace hpa {
namespace {

constexpr std::int64_t kBlockRows = 8;       // rows orthogonalised together
constexpr std::int64_t kPiece = 4096;        // elements in scratch
constexpr std::int64_t kTask = 16 * kPiece;  // elements of a task
constexpr std::int64_t kGrain = 64 * 1024;   // elements worth a thread

TensorView select_rows(TensorView tensor, std::int64_t first, std::int64_t count) {
  tensor.data = static_cast<char*>(tensor.data) + first * tensor.stride[0] * element_size(tensor.dtype);
  tensor.shape[0] = count;
  return tensor;
}

template <class T>
class Orthonormalizer {
 public:
  Orthonormalizer(const TensorView& vectors, const std::optional<TensorView>& basis, double rtol, int threads)
      : kernels_(isa::active().kernels<T>()),
        vectors_(vectors),
        rows_(vectors, 1),
        basis_(basis),
        rtol_(rtol),
        threads_(threads),
        row_threads_(useful_threads(rows_.length(), kGrain, threads)),
        tasks_(ceil_div(rows_.length(), kTask)),
        partial_(tasks_),
        scratch_(row_threads_ * kPiece) {}

  OrthonormalizeResult run() {
    OrthonormalizeResult result;
    std::vector<double> lengths;
    for (std::int64_t row = 0; row < rows_.rows(); ++row) {
      lengths.push_back(norm(row));
      if (!std::isfinite(lengths.back())) {
        result.bad_row = row;
        return result;
      }
    }
    std::int64_t kept = 0;
    for (std::int64_t start = 0; start < rows_.rows(); start += kBlockRows) {
      const std::int64_t count = std::min(kBlockRows, rows_.rows() - start);
      const std::int64_t found = first_sweep(start, count, kept, lengths);
      kept = second_sweep(kept, found);
    }
    for (std::int64_t row = kept; row < rows_.rows(); ++row) scale_to(row, row, 0.0);
    result.kept = kept;
    return result;
  }

 private:
  // Takes rows [start, start + count), writes those that are independent from row `kept` on; returns where they end.
  std::int64_t first_sweep(std::int64_t start, std::int64_t count, std::int64_t kept,
                           const std::vector<double>& lengths) {
    project_out(start, count, kept);
    std::int64_t found = kept;
    for (std::int64_t row = start; row < start + count; ++row) {
      project_rows(row, 1, select_rows(vectors_, kept, found - kept));
      const double rest = norm(row);
      if (rest > rtol_ * lengths[static_cast<std::size_t>(row)]) scale_to(row, found++, 1.0 / rest);
    }
    return found;
  }

  // Orthogonalises unit rows [kept, found) once more; returns where those that survive end.
  std::int64_t second_sweep(std::int64_t kept, std::int64_t found) {
    project_out(kept, found - kept, kept);
    std::int64_t survivors = kept;
    for (std::int64_t row = kept; row < found; ++row) {
      project_rows(row, 1, select_rows(vectors_, kept, survivors - kept));
      const double rest = norm(row);
      if (rest >= std::sqrt(0.5)) scale_to(row, survivors++, 1.0 / rest);
    }
    return survivors;
  }

  void project_out(std::int64_t start, std::int64_t count, std::int64_t kept) {
    if (basis_) project_rows(start, count, *basis_);
    project_rows(start, count, select_rows(vectors_, 0, kept));
  }

  void project_rows(std::int64_t start, std::int64_t count, const TensorView& known) {
    if (known.shape[0] > 0) project({select_rows(vectors_, start, count)}, {known}, 1, threads_);
  }

  double norm(std::int64_t row) {
    for_each_piece([&](std::int64_t task, std::int64_t at, std::int64_t count, T* scratch) {
      const double squares = kernels_.sum_of_squares(rows_.read(kernels_, row, at, count, scratch), count);
      partial_[task] = (at == task * kTask ? 0.0 : partial_[task]) + squares;
    });
    double sum = 0;
    for (std::int64_t task = 0; task < tasks_; ++task) sum += partial_[task];
    return std::sqrt(sum);
  }

  // Row `to` = factor * row `from`.
  void scale_to(std::int64_t from, std::int64_t to, double factor) {
    for_each_piece([&](std::int64_t, std::int64_t at, std::int64_t count, T* scratch) {
      const T* values = rows_.read(kernels_, from, at, count, scratch);
      if (factor == 0) {
        std::fill(scratch, scratch + count, T(0));
      } else {
        if (values != scratch) std::copy(values, values + count, scratch);
        kernels_.scale(factor, count, scratch);
      }
      rows_.write(kernels_, to, at, count, scratch);
    });
  }

  template <class Body>
  void for_each_piece(const Body& body) {
    parallel_for(tasks_, row_threads_, [&](std::int64_t task, int thread) {
      const std::int64_t stop = std::min(rows_.length(), (task + 1) * kTask);
      for (std::int64_t at = task * kTask; at < stop; at += kPiece) {
        body(task, at, std::min(kPiece, stop - at), scratch_.data() + thread * kPiece);
      }
    });
  }

  const isa::Kernels<T>& kernels_;
  TensorView vectors_;
  RowsView rows_;
  std::optional<TensorView> basis_;
  double rtol_;
  int threads_, row_threads_;
  std::int64_t tasks_;
  Buffer<double> partial_;
  Buffer<T> scratch_;
};

}  // namespace

OrthonormalizeResult orthonormalize(const TensorView& vectors, const std::optional<TensorView>& basis, double rtol,
                                    int threads) {
  const MatrixView rows = as_matrix("vectors", vectors);
  if (basis) {
    const MatrixView known = as_matrix("basis", *basis);
    check_shape("basis", *basis, {known.rows, rows.cols});
    check(known.dtype == rows.dtype, "basis", "expected the dtype of vectors");
  }
  if (rows.dtype == DType::f64) return Orthonormalizer<double>(vectors, basis, rtol, threads).run();
  return Orthonormalizer<float>(vectors, basis, rtol, threads).run();
}

}  // namespace hpa
