// d = after - before;   column_change[j] = mean_i d[i, j]^2,   scalars = { <d, before>, |before|^2, |d|^2 }
//                                                                           before, after [rows, cols]
//
// Arithmetic   d, and the sums over 8 rows by column or by lane, in float32; from there on float64 (float64 throughout for
//              float64 weights).  |d|^2 is the sum of the column sums.
// Bytes moved  the minimum: both weights once.  Column sums are 8 * cols bytes a task, read and written every 8 rows in
//              the second-level cache.
// Bound        memory.  Arithmetic takes 1.25 ns for 8 elements of bfloat16, 0.85 of float32 and float16, in the cache
//              (Zen 3, 2.5 GHz): 13 and 19 GB/s of bfloat16 and float16, 75 GB/s of float32 a core.
// Design       Rows are cut into at most 32 groups by shape alone, one a task; sums are added in the order of groups, so
//              the result does not depend on the number of threads.  A tile of 8 rows and a cache line of columns keeps
//              its sums in registers; 16 rows in flight are enough streams for the prefetchers of one core.
#include <algorithm>

#include "buffer.h"
#include "hpa/check.h"
#include "hpa/kernels.h"
#include "panels.h"
#include "parallel.h"
#include "rows.h"

namespace hpa {
namespace {

constexpr std::int64_t kBand = 8;           // rows whose squares are added in the arithmetic's own precision
constexpr std::int64_t kGroups = 32;        // most groups of rows
constexpr std::int64_t kGroupRows = 64;     // fewest rows of a group
constexpr std::int64_t kBlock = 1024;       // columns in scratch, or in a task of the last sums
constexpr std::int64_t kGrain = 64 * 1024;  // elements worth a thread

// Adds rows [first, stop) to column sums and to totals = { <d, before>, |before|^2 }.
template <class T>
void add_rows(const MatrixView& before, const MatrixView& after, std::int64_t first, std::int64_t stop, double* sums,
              double* totals, T* scratch) {
  const isa::Table& table = isa::active();
  const std::int64_t cols = before.cols;
  if (cols <= 1 || (before.col_stride == 1 && after.col_stride == 1)) {
    table.change[static_cast<int>(before.dtype)](before.at(first, 0), before.row_stride, after.at(first, 0),
                                                 after.row_stride, stop - first, cols, sums, totals);
    return;
  }
  const auto load = table.kernels<T>().load[static_cast<int>(before.dtype)];
  T* after_scratch = scratch + kBand * kBlock;
  for (std::int64_t top = first; top < stop; top += kBand) {
    const std::int64_t rows = std::min(kBand, stop - top);
    for (std::int64_t col = 0; col < cols; col += kBlock) {
      const std::int64_t count = std::min(kBlock, cols - col);
      for (std::int64_t i = 0; i < rows; ++i) {
        load(before.at(top + i, col), before.col_stride, count, scratch + i * kBlock);
        load(after.at(top + i, col), after.col_stride, count, after_scratch + i * kBlock);
      }
      table.change[static_cast<int>(kNative<T>)](scratch, kBlock, after_scratch, kBlock, rows, count, sums + col,
                                                 totals);
    }
  }
}

template <class T>
void statistics(const MatrixView& before, const MatrixView& after, T* column_change, double* scalars, int threads) {
  const std::int64_t rows = before.rows, cols = before.cols;
  const std::int64_t group_rows = ceil_div(std::max(kGroupRows, ceil_div(rows, kGroups)), kBand) * kBand;
  const std::int64_t groups = ceil_div(rows, group_rows);
  threads = useful_threads(rows * cols, kGrain, threads);
  const bool gathers = cols > 1 && (before.col_stride != 1 || after.col_stride != 1);

  Buffer<double> column_sums(groups * cols);
  Buffer<double> group_totals(groups * 2);
  Buffer<T> scratch(gathers ? threads * 2 * kBand * kBlock : 0);
  parallel_for(groups, threads, [&](std::int64_t group, int thread) {
    double *sums = column_sums.data() + group * cols, *totals = group_totals.data() + group * 2;
    std::fill(sums, sums + cols, 0.0);
    std::fill(totals, totals + 2, 0.0);
    add_rows<T>(before, after, group * group_rows, std::min(rows, (group + 1) * group_rows), sums, totals,
                scratch.data() + (gathers ? thread * 2 * kBand * kBlock : 0));
  });

  const std::int64_t blocks = ceil_div(cols, kBlock);
  Buffer<double> changes(blocks);
  const double count = static_cast<double>(std::max<std::int64_t>(rows, 1));
  parallel_for(blocks, useful_threads(groups * cols, kGrain, threads), [&](std::int64_t block, int) {
    const std::int64_t first = block * kBlock, stop = std::min(cols, first + kBlock);
    double sums[kBlock] = {}, change = 0;
    for (std::int64_t group = 0; group < groups; ++group) {
      for (std::int64_t j = first; j < stop; ++j) sums[j - first] += column_sums[group * cols + j];
    }
    for (std::int64_t j = first; j < stop; ++j) {
      column_change[j] = static_cast<T>(sums[j - first] / count);
      change += sums[j - first];
    }
    changes[block] = change;
  });

  std::fill(scalars, scalars + 3, 0.0);
  for (std::int64_t group = 0; group < groups; ++group) {
    scalars[0] += group_totals[group * 2];
    scalars[1] += group_totals[group * 2 + 1];
  }
  for (std::int64_t block = 0; block < blocks; ++block) scalars[2] += changes[block];
}

}  // namespace

void change_statistics(const TensorView& column_change, const TensorView& scalars, const TensorView& before,
                       const TensorView& after, int threads) {
  const MatrixView old = as_matrix("before", before);
  const MatrixView changed = as_matrix("after", after);
  check_shape("after", after, {old.rows, old.cols});
  check(changed.dtype == old.dtype, "after", "expected the dtype of before");
  const bool wide = old.dtype == DType::f64;
  check_shape("column_change", column_change, {old.cols});
  check(column_change.dtype == (wide ? DType::f64 : DType::f32) && (old.cols <= 1 || column_change.stride[0] == 1),
        "column_change", "expected contiguous float32 (float64 for float64 weights)");
  check_shape("scalars", scalars, {3});
  check(scalars.dtype == DType::f64 && scalars.stride[0] == 1, "scalars", "expected contiguous float64");

  double* totals = static_cast<double*>(scalars.data);
  if (wide) {
    statistics<double>(old, changed, static_cast<double*>(column_change.data), totals, threads);
  } else {
    statistics<float>(old, changed, static_cast<float*>(column_change.data), totals, threads);
  }
}

}  // namespace hpa
