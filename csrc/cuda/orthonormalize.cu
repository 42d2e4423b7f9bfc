// Rows v of `vectors` become orthonormal, and orthogonal to the rows of `basis`     vectors [m, n], basis [known, n]
//
// Method       Block classical Gram-Schmidt with reorthogonalisation (Barlow and Smoktunowicz 2013), blocks of eight
//              rows; csrc/cpu/orthonormalize.cpp has the same.  A row is dropped where |rest| <= rtol * |v|, or where the
//              second sweep shrinks it below 1/sqrt(2) (Kahan and Parlett).
// Arithmetic   as project.cu; norms are summed in float64.  Rows are stored in their own dtype between steps.
// Bytes moved  a block reads the rows before it four times (two sweeps, dot products and differences): about m / 4
//              readings of `vectors`, and m / 2 of `basis`.  Its own rows it reads twice for each eight rows before it,
//              about m / 8 readings of `vectors`, and beside that about 25 times, and writes about 6 times: lengths,
//              norms, scaling, and the other rows of the block.  These come from the second-level cache where eight
//              rows fit it.
// Bound        memory for long rows; for short ones the latency of about 90 launches a block of eight.
// Design       How many rows are kept is known on the device alone, and nothing waits for it: a dropped row becomes zero,
//              which projections do not notice, the launches are the same whatever the data is, and a last kernel moves
//              kept rows up.  Lengths come first: where one is NaN or Inf, every later kernel returns at once, and
//              nothing has been written.
// Resident     blocks of 256 threads: norm_kernel 8, scale_kernel 8, compact_kernel 8.
#include <algorithm>

#include "elements.cuh"
#include "hpa/check.h"
#include "launch.cuh"
#include "project.cuh"

namespace hpa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr std::int64_t kBlockRows = 8;
constexpr std::int64_t kPiece = 8 * kThreads;  // elements of a block of threads

enum class Step { length, first_sweep, second_sweep };

struct Rows {
  void* data;
  DType dtype;
  std::int64_t rows, cols, row_stride, col_stride;
};

struct State {
  double* partial;     // [m, pieces]
  double* lengths;     // [m]
  double* factors;     // [m]: what a row was last scaled by; 0: dropped
  unsigned* counters;  // [m] for each step
  long long* bad_row;  // first row with NaN or Inf, kNoRow: none
};

template <class T>
__device__ __forceinline__ double square(const Rows& rows, std::int64_t row, std::int64_t col) {
  const double value = load_element<T>(rows.data, rows.dtype, row * rows.row_stride + col * rows.col_stride);
  return value * value;
}

// Norms of rows [first, ...), one for each `pieces` blocks; the last block of a row decides what becomes of it.
template <class T>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const Rows rows, const State state, std::int64_t first, std::int64_t pieces, Step step, double rtol,
                unsigned* counters) {
  HPA_SHARED(double, warp_sums, kWarps);
  HPA_SHARED(unsigned, flag, 1);
  if (step != Step::length && *state.bad_row < kNoRow) return;
  const std::int64_t row = first + blockIdx.x / pieces, piece = blockIdx.x % pieces;
  const std::int64_t stop = min(rows.cols, (piece + 1) * kPiece);
  double sum = 0;
#pragma unroll 4
  for (std::int64_t at = piece * kPiece + threadIdx.x; at < stop; at += kThreads) sum += square<T>(rows, row, at);
  sum = warp_sum(sum);
  if (lane_index() == 0) warp_sums[warp_index()] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += warp_sums[w];
    state.partial[row * pieces + piece] = total;
  }
  if (!is_last_block(counters + row, static_cast<unsigned>(pieces), flag)) return;
  if (warp_index() != 0) return;
  double total = 0;
  for (std::int64_t p = lane_index(); p < pieces; p += kWarp) total += __ldcg(state.partial + row * pieces + p);
  total = warp_sum(total);
  if (lane_index() != 0) return;
  const double norm = sqrt(total);
  if (step == Step::length) {
    state.lengths[row] = norm;
    if (!isfinite(norm)) atomicMin(state.bad_row, static_cast<long long>(row));
  } else {
    const bool keep = step == Step::first_sweep ? norm > rtol * state.lengths[row] : norm >= sqrt(0.5);
    state.factors[row] = keep ? 1.0 / norm : 0.0;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(const Rows rows, const State state, std::int64_t row) {
  if (*state.bad_row < kNoRow) return;
  const double factor = state.factors[row];
  const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * kPiece, stop = min(rows.cols, start + kPiece);
#pragma unroll 4
  for (std::int64_t at = start + threadIdx.x; at < stop; at += kThreads) {
    const std::int64_t index = row * rows.row_stride + at * rows.col_stride;
    const double value = load_element<T>(rows.data, rows.dtype, index);
    store_element(rows.data, rows.dtype, index, static_cast<T>(factor == 0 ? 0.0 : value * factor));
  }
}

// Moves kept rows up, clears the others; a thread owns a column, so that it reads a row before it is overwritten.
template <class T>
__global__ void __launch_bounds__(kThreads) compact_kernel(const Rows rows, const State state, std::int64_t* counts) {
  const bool bad = *state.bad_row < kNoRow;
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  std::int64_t kept = 0;
  for (std::int64_t row = 0; row < rows.rows && !bad; ++row) {
    if (state.factors[row] == 0) continue;
    if (kept != row && at < rows.cols) {
      const T value = load_element<T>(rows.data, rows.dtype, row * rows.row_stride + at * rows.col_stride);
      store_element(rows.data, rows.dtype, kept * rows.row_stride + at * rows.col_stride, value);
    }
    ++kept;
  }
  for (std::int64_t row = kept; row < rows.rows && !bad && at < rows.cols; ++row) {
    store_element(rows.data, rows.dtype, row * rows.row_stride + at * rows.col_stride, T(0));
  }
  if (at == 0) {
    counts[0] = kept;
    counts[1] = bad ? *state.bad_row : -1;
  }
}

TensorView select_rows(TensorView tensor, std::int64_t first, std::int64_t count) {
  tensor.data = static_cast<char*>(tensor.data) + first * tensor.stride[0] * element_size(tensor.dtype);
  tensor.shape[0] = count;
  return tensor;
}

template <class T>
void run(Context& context, const TensorView& vectors, const std::optional<TensorView>& basis, double rtol,
         std::int64_t* counts) {
  const MatrixView view = as_matrix("vectors", vectors);
  const Rows rows = {view.data, view.dtype, view.rows, view.cols, view.row_stride, view.col_stride};
  const std::int64_t m = rows.rows, pieces = div_up(rows.cols, kPiece);
  State state = {};
  state.partial = allocate<double>(context, m * pieces);
  state.lengths = allocate<double>(context, m);
  state.factors = allocate<double>(context, m);
  state.counters = zeroed_counters(context, 3 * m);
  state.bad_row = allocate<long long>(context, 1);
  require(cudaMemsetAsync(state.bad_row, 0x7f, sizeof(long long), stream_of(context)), "cannot set memory");

  const auto project_rows = [&](std::int64_t first, std::int64_t count, const TensorView& known) {
    if (known.shape[0] > 0) project_once(context, {select_rows(vectors, first, count)}, {known}, state.bad_row);
  };
  launch(context, m * pieces, kThreads, norm_kernel<T>, rows, state, std::int64_t{0}, pieces, Step::length, rtol,
         state.counters);
  for (std::int64_t start = 0; start < m; start += kBlockRows) {
    const std::int64_t count = std::min(kBlockRows, m - start);
    for (const Step step : {Step::first_sweep, Step::second_sweep}) {
      if (basis) project_rows(start, count, *basis);
      project_rows(start, count, select_rows(vectors, 0, start));
      for (std::int64_t row = start; row < start + count; ++row) {
        project_rows(row, 1, select_rows(vectors, start, row - start));
        launch(context, pieces, kThreads, norm_kernel<T>, rows, state, row, pieces, step, rtol,
               state.counters + static_cast<int>(step) * m);
        launch(context, pieces, kThreads, scale_kernel<T>, rows, state, row);
      }
    }
  }
  launch(context, div_up(rows.cols, kThreads), kThreads, compact_kernel<T>, rows, state, counts);
}

}  // namespace

void orthonormalize(Context& context, const TensorView& vectors, const TensorView& counts,
                    const std::optional<TensorView>& basis, double rtol) {
  const MatrixView rows = as_matrix("vectors", vectors);
  if (basis) {
    const MatrixView known = as_matrix("basis", *basis);
    check_shape("basis", *basis, {known.rows, rows.cols});
    check(known.dtype == rows.dtype, "basis", "expected the dtype of vectors");
  }
  check_shape("counts", counts, {2});
  check(counts.dtype == DType::f64 && counts.stride[0] == 1, "counts", "expected contiguous memory of 16 bytes");
  const DeviceGuard guard(context);
  auto* results = static_cast<std::int64_t*>(counts.data);
  if (rows.rows == 0 || rows.cols == 0) {
    require(cudaMemsetAsync(results, 0, sizeof(std::int64_t), stream_of(context)), "cannot clear memory");
    require(cudaMemsetAsync(results + 1, 0xff, sizeof(std::int64_t), stream_of(context)), "cannot set memory");
    return;
  }
  if (rows.dtype == DType::f64) {
    run<double>(context, vectors, basis, rtol, results);
  } else {
    run<float>(context, vectors, basis, rtol, results);
  }
}

}  // namespace hpa::cuda
