// after[:, j] = mask[j] ? before[:, j] : after[:, j] - projection * before[:, j]      after, before [rows, cols]
//
// Arithmetic   float32 (float64 for float64), rounded once to the storage dtype.  Kept elements are copied as bits, and
//              with projection 0 the others keep theirs.
// Bytes moved  the minimum, after and before read once and after written once: 128-bit loads and stores where rows are
//              16-byte aligned, else element by element.  With projection 0 a lane whose columns all stay as they are
//              touches neither matrix.
// Bound        memory.
// Design       A warp takes 512 bytes of a row, a lane owns 16 bytes of columns and keeps their part of the mask in
//              registers while it goes down the rows.  Elements are independent: the same bits on every run.
// Resident     blocks of 256 threads: merge_kernel 2.
#include "elements.cuh"
#include "hpa/check.h"
#include "launch.cuh"

namespace hpa::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = 4;  // rows of a thread, all asked for before the first is used

struct Shape {
  std::int64_t rows, cols, tiles;
  std::int64_t after_row_stride, after_col_stride, before_row_stride, before_col_stride, mask_stride;
};

template <class Storage, int Count>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(Storage* after, const Storage* before, const bool* mask, double projection, const Shape shape) {
  using T = Arithmetic<Storage>;
  const std::int64_t tile = blockIdx.x % shape.tiles, strip = blockIdx.x / shape.tiles;
  const std::int64_t col = (tile * kWarp + lane_index()) * Count;
  if (col >= shape.cols) return;
  const T factor = static_cast<T>(projection);
  const int valid = static_cast<int>(min(static_cast<std::int64_t>(Count), shape.cols - col));
  bool kept[Count], any = projection != 0;
#pragma unroll
  for (int e = 0; e < Count; ++e) {
    kept[e] = e < valid && mask[(col + e) * shape.mask_stride];
    any = any || kept[e];
  }
  if (!any) return;

  const auto merged = [&](Storage changed, Storage old, bool keep) {
    if (keep) return old;
    return projection == 0 ? changed : narrow<Storage>(widen(changed) - factor * widen(old));
  };
  const std::int64_t first = (strip * kRows) * kWarps + warp_index();
  if (valid == Count) {
    Pack<Storage, Count> news[kRows] = {}, olds[kRows] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t row = first + i * kWarps;
      if (row < shape.rows) {
        news[i] = load_pack<Storage, Count>(after + row * shape.after_row_stride + col * shape.after_col_stride);
        olds[i] = load_pack<Storage, Count>(before + row * shape.before_row_stride + col * shape.before_col_stride);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t row = first + i * kWarps;
#pragma unroll
      for (int e = 0; e < Count; ++e) news[i].at[e] = merged(news[i].at[e], olds[i].at[e], kept[e]);
      if (row < shape.rows) {
        store_pack<Storage, Count>(after + row * shape.after_row_stride + col * shape.after_col_stride, news[i]);
      }
    }
  } else {
    // The last piece of a row, shorter than 16 bytes; only where columns lie side by side.
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t row = first + i * kWarps;
      if (row >= shape.rows) return;
      Storage* to = after + row * shape.after_row_stride + col;
      const Storage* old = before + row * shape.before_row_stride + col;
#pragma unroll
      for (int e = 0; e < Count; ++e) {
        if (e < valid) to[e] = merged(to[e], old[e], kept[e]);
      }
    }
  }
}

template <class Storage, int Count>
void merge_matrix(Context& context, const MatrixView& after, const MatrixView& before, const TensorView& mask,
                  double projection) {
  Shape shape;
  shape.rows = after.rows;
  shape.cols = after.cols;
  shape.tiles = div_up(after.cols, kWarp * Count);
  shape.after_row_stride = after.row_stride;
  shape.after_col_stride = after.col_stride;
  shape.before_row_stride = before.row_stride;
  shape.before_col_stride = before.col_stride;
  shape.mask_stride = mask.stride[0];
  launch(context, shape.tiles * div_up(after.rows, kRows * kWarps), kThreads, merge_kernel<Storage, Count>,
         static_cast<Storage*>(after.data), static_cast<const Storage*>(before.data),
         static_cast<const bool*>(mask.data), projection, shape);
}

}  // namespace

void merge(Context& context, const TensorView& after, const TensorView& before, const TensorView& mask,
           double projection) {
  const MatrixView to = as_matrix("after", after), old = as_matrix("before", before);
  check_shape("before", before, {to.rows, to.cols});
  check(old.dtype == to.dtype, "before", "expected the dtype of after");
  check_shape("mask", mask, {to.cols});
  check(mask.dtype == DType::boolean, "mask", "expected bool");

  const DeviceGuard guard(context);
  if (to.rows == 0 || to.cols == 0) return;
  with_storage(to.dtype, [&](auto element) {
    using Storage = decltype(element);
    if (rows_aligned(to) && rows_aligned(old)) {
      merge_matrix<Storage, kPackSize<Storage>>(context, to, old, mask, projection);
    } else {
      merge_matrix<Storage, 1>(context, to, old, mask, projection);
    }
  });
}

}  // namespace hpa::cuda
