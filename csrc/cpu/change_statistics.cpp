// d = after - before;   column_change[j] = mean_i d[i, j]^2,   scalars = { <d, before>, |before|^2, |d|^2 }
//                                                                           before, after [rows, cols]
//
// Arithmetic   d in float32 (float64 for float64 weights).  Columns: float32 over 16 rows, then float64.  Scalars:
//              products and sums in float64, in which a product of two float32 values is exact.
// Bytes moved  the minimum: both weights once.  Running column sums are 12 * cols bytes a thread, in the cache.
// Design       Rows are cut into at most 32 groups by shape alone.  A task streams the full rows of a group; its sums
//              are added in the order of groups, so the result does not depend on the number of threads.
#include <algorithm>

#include "buffer.h"
#include "hpa/check.h"
#include "hpa/kernels.h"
#include "panels.h"
#include "parallel.h"
#include "rows.h"

namespace hpa {
namespace {

constexpr std::int64_t kFlush = 16;         // rows summed in float32
constexpr std::int64_t kGroups = 32;        // most groups of rows
constexpr std::int64_t kGroupRows = 64;     // fewest rows of a group
constexpr std::int64_t kBlock = 1024;       // columns in scratch
constexpr std::int64_t kGrain = 64 * 1024;  // elements worth a thread

template <class T>
void statistics(const RowsView& before, const RowsView& after, void* column_change, double* scalars, int threads) {
  const isa::Kernels<T>& kernels = isa::active().kernels<T>();
  const std::int64_t rows = before.rows(), cols = before.length();
  const std::int64_t group_rows = ceil_div(std::max(kGroupRows, ceil_div(rows, kGroups)), kFlush) * kFlush;
  const std::int64_t groups = ceil_div(rows, group_rows);
  threads = useful_threads(rows * cols, kGrain, threads);

  Buffer<double> column_sums(groups * cols);
  Buffer<double> group_scalars(groups * 3);
  Buffer<T> running(threads * cols);
  Buffer<T> scratch(threads * 2 * kBlock);
  parallel_for(groups, threads, [&](std::int64_t group, int thread) {
    double* sums = column_sums.data() + group * cols;
    double* totals = group_scalars.data() + group * 3;
    T* recent = running.data() + thread * cols;
    T *before_scratch = scratch.data() + thread * 2 * kBlock, *after_scratch = before_scratch + kBlock;
    std::fill(sums, sums + cols, 0.0);
    std::fill(totals, totals + 3, 0.0);
    std::fill(recent, recent + cols, T(0));
    const std::int64_t stop = std::min(rows, (group + 1) * group_rows);
    for (std::int64_t row = group * group_rows; row < stop; ++row) {
      for (std::int64_t col = 0; col < cols; col += kBlock) {
        const std::int64_t count = std::min(kBlock, cols - col);
        kernels.change(before.read(kernels, row, col, count, before_scratch),
                       after.read(kernels, row, col, count, after_scratch), count, recent + col, totals);
      }
      if ((row + 1) % kFlush == 0 || row + 1 == stop) {
        for (std::int64_t j = 0; j < cols; ++j) {
          sums[j] += static_cast<double>(recent[j]);
          recent[j] = T(0);
        }
      }
    }
  });

  std::fill(scalars, scalars + 3, 0.0);
  T* out = static_cast<T*>(column_change);
  for (std::int64_t group = 0; group < groups; ++group) {
    for (int i = 0; i < 3; ++i) scalars[i] += group_scalars[group * 3 + i];
  }
  for (std::int64_t j = 0; j < cols; ++j) {
    double sum = 0;
    for (std::int64_t group = 0; group < groups; ++group) sum += column_sums[group * cols + j];
    out[j] = static_cast<T>(sum / static_cast<double>(std::max<std::int64_t>(rows, 1)));
  }
}

}  // namespace

void change_statistics(const TensorView& column_change, const TensorView& scalars, const TensorView& before,
                       const TensorView& after, int threads) {
  const MatrixView old = as_matrix("before", before);
  check_float("after", after);
  check_shape("after", after, {old.rows, old.cols});
  check(after.dtype == old.dtype, "after", "expected the dtype of before");
  const bool wide = old.dtype == DType::f64;
  check_shape("column_change", column_change, {old.cols});
  check(column_change.dtype == (wide ? DType::f64 : DType::f32) && (old.cols <= 1 || column_change.stride[0] == 1),
        "column_change", "expected contiguous float32 (float64 for float64 weights)");
  check_shape("scalars", scalars, {3});
  check(scalars.dtype == DType::f64 && scalars.stride[0] == 1, "scalars", "expected contiguous float64");

  double* totals = static_cast<double*>(scalars.data);
  if (wide) {
    statistics<double>(RowsView(before, 1), RowsView(after, 1), column_change.data, totals, threads);
  } else {
    statistics<float>(RowsView(before, 1), RowsView(after, 1), column_change.data, totals, threads);
  }
}

}  // namespace hpa
