// d = after - before;   column_change[j] = mean_i d[i, j]^2,   scalars = { <d, before>, |before|^2, |d|^2 }
//                                                                           before, after [rows, cols]
//
// Arithmetic   d in float32 (float64 for float64).  Columns: float32 over at most 16 rows, then float64.  Scalars:
//              products and sums in float64, in which a product of two float32 values is exact.
// Bytes moved  the minimum, both weights once: 128-bit loads where rows are 16-byte aligned, else element by element.
//              Beside it 8 * cols bytes a group of rows, at most 32 groups: 0.8 % at 4096 x 4096 float32, and these
//              bytes stay in the second-level cache.
// Bound        memory.  Two conversions and three multiply-adds in float64 an element: at the full float64 rate of
//              sm_80, sm_90 and sm_100 a quarter to a half of the time that the bytes take.  On GPUs for graphics, with
//              1/64 of that rate, float64 is the bound.
// Design       A block has 8 warps; a warp reads 512 bytes of a row, a lane owns 16 bytes of columns, warps take every
//              eighth row of the group.  Groups are cut by shape alone and added in their order by the block that comes
//              last: no atomic addition of floats, the same bits on every run and every GPU of one architecture.
// Resident     blocks of 256 threads: statistics_kernel<*, 8> 1, statistics_kernel 2.  Eight columns of a 16-bit type take
//              more than the 128 registers of two blocks, but have as many bytes in flight.
#include <algorithm>

#include "elements.cuh"
#include "hpa/check.h"
#include "launch.cuh"

namespace hpa::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kFlush = 16;              // rows summed in the arithmetic's own precision
constexpr int kInFlight = 4;            // rows a thread asks for before it uses the first
constexpr std::int64_t kGroups = 32;    // most groups of rows
constexpr std::int64_t kGroupRows = 64; // fewest rows of a group

struct Shape {
  std::int64_t rows, cols, group_rows, groups, tiles;
  std::int64_t before_row_stride, before_col_stride, after_row_stride, after_col_stride;
};

struct Scratch {
  double* columns;          // [groups, cols]
  double* totals;           // [tiles * groups, 3]
  unsigned* tile_counters;  // [tiles]
  unsigned* grid_counter;   // [1]
};

template <class Storage, int Count>
__device__ __forceinline__ Pack<Storage, Count> load_columns(const Storage* row, std::int64_t col, std::int64_t cols,
                                                             std::int64_t col_stride) {
  if (Count == 1 || col + Count <= cols) return load_pack<Storage, Count>(row + col * col_stride);
  Pack<Storage, Count> pack = {};
  for (int e = 0; e < Count; ++e) {
    if (col + e < cols) pack.at[e] = row[col + e];
  }
  return pack;
}

template <class Storage, int Count>
__global__ void __launch_bounds__(kThreads, kPackSize<Storage> == 8 ? 1 : 2)
    statistics_kernel(const Storage* before, const Storage* after, Arithmetic<Storage>* column_change, double* scalars,
                      const Shape shape, const Scratch scratch) {
  using T = Arithmetic<Storage>;
  HPA_SHARED(double, warp_columns, kWarps * kWarp * Count);
  HPA_SHARED(double, warp_totals, kWarps * 3);
  HPA_SHARED(unsigned, flag, 1);
  const std::int64_t tile = blockIdx.x % shape.tiles, group = blockIdx.x / shape.tiles;
  const int lane = lane_index(), warp = warp_index();
  const std::int64_t col = (tile * kWarp + lane) * Count;
  const std::int64_t stop = min(shape.rows, (group + 1) * shape.group_rows);

  double sums[Count] = {}, totals[3] = {};
  if (col < shape.cols) {
    for (std::int64_t start = group * shape.group_rows + warp; start < stop; start += kFlush * kWarps) {
      T recent[Count] = {};
#pragma unroll 1
      for (int step = 0; step < kFlush; step += kInFlight) {
        Pack<Storage, Count> olds[kInFlight] = {}, news[kInFlight] = {};
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          const std::int64_t row = start + (step + i) * kWarps;
          if (row < stop) {
            olds[i] = load_columns<Storage, Count>(before + row * shape.before_row_stride, col, shape.cols,
                                                   shape.before_col_stride);
            news[i] = load_columns<Storage, Count>(after + row * shape.after_row_stride, col, shape.cols,
                                                   shape.after_col_stride);
          }
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
#pragma unroll
          for (int e = 0; e < Count; ++e) {
            const T old = widen(olds[i].at[e]), change = widen(news[i].at[e]) - old;
            recent[e] += change * change;
            const double wide_old = old, wide_change = change;
            totals[0] += wide_change * wide_old;
            totals[1] += wide_old * wide_old;
            totals[2] += wide_change * wide_change;
          }
        }
      }
#pragma unroll
      for (int e = 0; e < Count; ++e) sums[e] += recent[e];
    }
  }

#pragma unroll
  for (int e = 0; e < Count; ++e) warp_columns[(warp * Count + e) * kWarp + lane] = sums[e];
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const double total = warp_sum(totals[i]);
    if (lane == 0) warp_totals[warp * 3 + i] = total;
  }
  __syncthreads();

  // Warps in their order; thread t takes columns t, t + kThreads, ... of the tile.
  for (int at = static_cast<int>(threadIdx.x); at < kWarp * Count; at += kThreads) {
    const std::int64_t j = tile * kWarp * Count + at;
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += warp_columns[(w * Count + at % Count) * kWarp + at / Count];
    if (j < shape.cols) scratch.columns[group * shape.cols + j] = sum;
  }
  if (threadIdx.x < 3) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += warp_totals[w * 3 + static_cast<int>(threadIdx.x)];
    scratch.totals[static_cast<std::int64_t>(blockIdx.x) * 3 + threadIdx.x] = sum;
  }

  if (is_last_block(scratch.tile_counters + tile, static_cast<unsigned>(shape.groups), flag)) {
    for (int at = static_cast<int>(threadIdx.x); at < kWarp * Count; at += kThreads) {
      const std::int64_t j = tile * kWarp * Count + at;
      if (j >= shape.cols) break;
      double sum = 0;
      for (std::int64_t g = 0; g < shape.groups; ++g) sum += __ldcg(scratch.columns + g * shape.cols + j);
      column_change[j] = static_cast<T>(sum / static_cast<double>(shape.rows));
    }
  }
  if (is_last_block(scratch.grid_counter, gridDim.x, flag)) {
    // A warp each for the three scalars: lanes stride over the blocks, then add up in a fixed order.
    if (warp < 3) {
      double sum = 0;
      for (std::int64_t b = lane; b < gridDim.x; b += kWarp) sum += __ldcg(scratch.totals + b * 3 + warp);
      sum = warp_sum(sum);
      if (lane == 0) scalars[warp] = sum;
    }
  }
}

template <class Storage, int Count>
void statistics(Context& context, const MatrixView& before, const MatrixView& after, void* column_change,
                double* scalars) {
  Shape shape;
  shape.rows = before.rows;
  shape.cols = before.cols;
  shape.group_rows = div_up(std::max(kGroupRows, div_up(shape.rows, kGroups)), kWarps) * kWarps;
  shape.groups = div_up(shape.rows, shape.group_rows);
  shape.tiles = div_up(shape.cols, kWarp * Count);
  shape.before_row_stride = before.row_stride;
  shape.before_col_stride = before.col_stride;
  shape.after_row_stride = after.row_stride;
  shape.after_col_stride = after.col_stride;
  Scratch scratch;
  scratch.columns = allocate<double>(context, shape.groups * shape.cols);
  scratch.totals = allocate<double>(context, shape.tiles * shape.groups * 3);
  scratch.tile_counters = zeroed_counters(context, shape.tiles + 1);
  scratch.grid_counter = scratch.tile_counters + shape.tiles;
  launch(context, shape.tiles * shape.groups, kThreads, statistics_kernel<Storage, Count>,
         static_cast<const Storage*>(before.data), static_cast<const Storage*>(after.data),
         static_cast<Arithmetic<Storage>*>(column_change), scalars, shape, scratch);
}

}  // namespace

void change_statistics(Context& context, const TensorView& column_change, const TensorView& scalars,
                       const TensorView& before, const TensorView& after) {
  const MatrixView old = as_matrix("before", before), changed = as_matrix("after", after);
  check_shape("after", after, {old.rows, old.cols});
  check(changed.dtype == old.dtype, "after", "expected the dtype of before");
  check_shape("column_change", column_change, {old.cols});
  check(column_change.dtype == (old.dtype == DType::f64 ? DType::f64 : DType::f32) &&
            (old.cols <= 1 || column_change.stride[0] == 1),
        "column_change", "expected contiguous float32 (float64 for float64 weights)");
  check_shape("scalars", scalars, {3});
  check(scalars.dtype == DType::f64 && scalars.stride[0] == 1, "scalars", "expected contiguous float64");

  const DeviceGuard guard(context);
  auto* totals = static_cast<double*>(scalars.data);
  if (old.rows == 0 || old.cols == 0) {
    const auto bytes = static_cast<std::size_t>(old.cols * element_size(column_change.dtype));
    if (bytes > 0) require(cudaMemsetAsync(column_change.data, 0, bytes, stream_of(context)), "cannot clear memory");
    require(cudaMemsetAsync(totals, 0, 3 * sizeof(double), stream_of(context)), "cannot clear memory");
    return;
  }
  with_storage(old.dtype, [&](auto element) {
    using Storage = decltype(element);
    if (rows_aligned(old) && rows_aligned(changed)) {
      statistics<Storage, kPackSize<Storage>>(context, old, changed, column_change.data, totals);
    } else {
      statistics<Storage, 1>(context, old, changed, column_change.data, totals);
    }
  });
}

}  // namespace hpa::cuda
