// after[:, j] = mask[j] ? before[:, j] : after[:, j] - projection * before[:, j]      after, before [rows, cols]
//
// Arithmetic   float32 (float64 for float64), rounded once to the storage dtype.  Kept elements are copied as bits, and
//              with projection 0 the others keep theirs.
// Bytes moved  the minimum: after and before read once, after written once; one byte of mask a column in the cache.
// Design       One pass in place, a strip of rows a task; elements are independent, so nothing depends on the number of
//              threads.  Columns that do not lie side by side are gathered into a scratch row and scattered back.
#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "hpa/check.h"
#include "hpa/kernels.h"
#include "panels.h"
#include "parallel.h"

namespace hpa {
namespace {

constexpr std::int64_t kTask = 32 * 1024;   // elements in a task
constexpr std::int64_t kGrain = 64 * 1024;  // elements worth a thread

// Moves `count` elements of `size` bytes between places `from_step` and `to_step` bytes apart.
void move_elements(const char* from, std::int64_t from_step, char* to, std::int64_t to_step, std::int64_t count,
                   std::int64_t size) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(to + i * to_step, from + i * from_step, static_cast<std::size_t>(size));
  }
}

}  // namespace

void merge(const TensorView& after, const TensorView& before, const TensorView& mask, double projection, int threads) {
  const MatrixView to = as_matrix("after", after);
  const MatrixView old = as_matrix("before", before);
  check_shape("before", before, {to.rows, to.cols});
  check(old.dtype == to.dtype, "before", "expected the dtype of after");
  check_shape("mask", mask, {to.cols});
  check(mask.dtype == DType::boolean, "mask", "expected bool");

  const std::int64_t rows = to.rows, cols = to.cols, size = element_size(to.dtype);
  if (rows == 0 || cols == 0) return;
  Buffer<std::uint8_t> kept(cols);
  move_elements(static_cast<const char*>(mask.data), mask.stride[0], reinterpret_cast<char*>(kept.data()), 1, cols, 1);

  const auto merge_row = isa::active().merge[static_cast<int>(to.dtype)];
  const bool gather_to = to.col_stride != 1 && cols > 1, gather_old = old.col_stride != 1 && cols > 1;
  threads = useful_threads(rows * cols, kGrain, threads);
  Buffer<char> scratch(gather_to || gather_old ? threads * 2 * cols * size : 0);
  const std::int64_t task_rows = std::max<std::int64_t>(1, kTask / cols);
  parallel_for(ceil_div(rows, task_rows), threads, [&](std::int64_t task, int thread) {
    char *to_scratch = scratch.data() + thread * 2 * cols * size, *old_scratch = to_scratch + cols * size;
    const std::int64_t stop = std::min(rows, (task + 1) * task_rows);
    for (std::int64_t row = task * task_rows; row < stop; ++row) {
      char *to_row = static_cast<char*>(to.at(row, 0)), *old_row = static_cast<char*>(old.at(row, 0));
      const std::int64_t to_step = to.col_stride * size, old_step = old.col_stride * size;
      if (gather_to) move_elements(to_row, to_step, to_scratch, size, cols, size);
      if (gather_old) move_elements(old_row, old_step, old_scratch, size, cols, size);
      merge_row(gather_to ? to_scratch : to_row, gather_old ? old_scratch : old_row, kept.data(), projection, cols);
      if (gather_to) move_elements(to_scratch, size, to_row, to_step, cols, size);
    }
  });
}

}  // namespace hpa
