// after[:, j] = mask[j] ? before[:, j] : after[:, j] - projection * before[:, j]      after, before [rows, cols]
//
// Arithmetic   float32 (float64 for float64), rounded once to the storage dtype.  Kept elements are copied as bits, and
//              with projection 0 the others keep theirs.
// Bytes moved  the minimum: after and before read once, after written once (the lines have been read, so plain stores).
//              The mask, widened to the size of an element, stays in the first-level cache.
// Bound        memory.
// Design       One parallel loop over the strips of rows of a whole list, so that many small layers cost one call;
//              elements are independent, so nothing depends on the number of threads.  A tile of 4 rows and a cache line
//              of columns reads the mask once and keeps 8 streams in flight, each asked for 4 lines ahead.  The loop runs
//              from the last rows to the first: after change_statistics, which ends there, they are still in the cache.
//              Columns that do not lie side by side are gathered into a scratch row and scattered back.
#include <algorithm>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "hpa/check.h"
#include "hpa/kernels.h"
#include "panels.h"
#include "parallel.h"

namespace hpa {
namespace {

constexpr std::int64_t kTask = 64 * 1024;   // elements in a task
constexpr std::int64_t kGrain = 64 * 1024;  // elements worth a thread
constexpr std::int64_t kRows = 4;           // tasks are multiples of it

struct Layer {
  MatrixView after, before;
  double projection;
  std::int64_t mask;        // place of the widened mask, in bytes
  std::int64_t first_task;  // in the loop over all layers
  std::int64_t task_rows;
};

bool gathers(const MatrixView& view) { return view.col_stride != 1 && view.cols > 1; }

// Moves `count` elements of `size` bytes between places `from_step` and `to_step` bytes apart.
void move_elements(const char* from, std::int64_t from_step, char* to, std::int64_t to_step, std::int64_t count,
                   std::int64_t size) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(to + i * to_step, from + i * from_step, static_cast<std::size_t>(size));
  }
}

template <class Word>
void widen_mask(const TensorView& mask, void* lanes) {
  const auto* kept = static_cast<const std::uint8_t*>(mask.data);
  auto* out = static_cast<Word*>(lanes);
  for (std::int64_t j = 0; j < mask.shape[0]; ++j) {
    out[j] = static_cast<Word>(kept[j * mask.stride[0]] != 0 ? ~Word(0) : Word(0));
  }
}

void widen_mask(const TensorView& mask, DType dtype, void* lanes) {
  switch (element_size(dtype)) {
    case 2: return widen_mask<std::uint16_t>(mask, lanes);
    case 4: return widen_mask<std::uint32_t>(mask, lanes);
    default: return widen_mask<std::uint64_t>(mask, lanes);
  }
}

void merge_rows(const Layer& layer, std::int64_t first, std::int64_t stop, const char* mask, char* scratch) {
  const MatrixView &to = layer.after, &old = layer.before;
  const auto merge_tiles = isa::active().merge[static_cast<int>(to.dtype)];
  if (!gathers(to) && !gathers(old)) {
    merge_tiles(to.at(first, 0), to.row_stride, old.at(first, 0), old.row_stride, stop - first, to.cols, mask,
                layer.projection);
    return;
  }
  const std::int64_t cols = to.cols, size = element_size(to.dtype);
  const std::int64_t to_step = to.col_stride * size, old_step = old.col_stride * size;
  char* old_scratch = scratch + cols * size;
  for (std::int64_t row = first; row < stop; ++row) {
    char *to_row = static_cast<char*>(to.at(row, 0)), *old_row = static_cast<char*>(old.at(row, 0));
    if (gathers(to)) move_elements(to_row, to_step, scratch, size, cols, size);
    if (gathers(old)) move_elements(old_row, old_step, old_scratch, size, cols, size);
    merge_tiles(gathers(to) ? scratch : to_row, 0, gathers(old) ? old_scratch : old_row, 0, 1, cols, mask,
                layer.projection);
    if (gathers(to)) move_elements(scratch, size, to_row, to_step, cols, size);
  }
}

}  // namespace

void merge(std::span<const MergeLayer> layers, int threads) {
  std::vector<Layer> table;
  std::int64_t mask_bytes = 0, scratch_bytes = 0, tasks = 0, elements = 0;
  for (const MergeLayer& given : layers) {
    const MatrixView to = as_matrix("after", given.after);
    const MatrixView old = as_matrix("before", given.before);
    check_shape("before", given.before, {to.rows, to.cols});
    check(old.dtype == to.dtype, "before", "expected the dtype of after");
    check_shape("mask", given.mask, {to.cols});
    check(given.mask.dtype == DType::boolean, "mask", "expected bool");
    const std::int64_t row_bytes = to.cols * element_size(to.dtype);
    const std::int64_t task_rows =
        ceil_div(std::max<std::int64_t>(1, kTask / std::max<std::int64_t>(1, to.cols)), kRows) * kRows;
    table.push_back({to, old, given.projection, mask_bytes, tasks, task_rows});
    mask_bytes += row_bytes;
    if (gathers(to) || gathers(old)) scratch_bytes = std::max(scratch_bytes, 2 * row_bytes);
    if (to.cols > 0) tasks += ceil_div(to.rows, task_rows);
    elements += to.rows * to.cols;
  }
  threads = useful_threads(elements, kGrain, threads);
  Buffer<char> masks(mask_bytes), scratch(threads * scratch_bytes);
  for (std::size_t i = 0; i < table.size(); ++i) {
    widen_mask(layers[i].mask, table[i].after.dtype, masks.data() + table[i].mask);
  }
  parallel_for(tasks, threads, [&](std::int64_t number, int thread) {
    const std::int64_t task = tasks - 1 - number;
    const auto after_it = std::upper_bound(table.begin(), table.end(), task,
                                           [](std::int64_t t, const Layer& layer) { return t < layer.first_task; });
    const Layer& layer = *(after_it - 1);
    const std::int64_t first = (task - layer.first_task) * layer.task_rows;
    merge_rows(layer, first, std::min(layer.after.rows, first + layer.task_rows), masks.data() + layer.mask,
               scratch.data() + thread * scratch_bytes);
  });
}

}  // namespace hpa
