// out[j] = [(G + lambda I)^-1]_jj              "exact"       lambda = damping * mean(diag G), G [cols, cols]
// out[j] = U_jj^2,  (G + lambda I)^-1 = U^T U  "pivot"
//
// Method         With H = G + lambda I = L L^T the exact diagonal is the squared column norms of L^-1: sums of squares, so
//                nothing cancels.  Factor and inverse come out of one sweep over blocks of columns, (1/3 + 1/3) cols^3
//                multiply-adds; pivots are 1 / R_jj^2 with H = R R^T, the factor of H with its indices reversed, 1/3.
// Arithmetic     float64 for float64 output and for at most 1024 columns, else float32, never TF32; the blocks on the
//                diagonal in float64.
// Bytes moved    the part that is left, read and written once for each 64 columns: about cols^3 / 24 bytes in float32,
//                which takes as long as the multiply-adds on sm_90; four times as many in float64, in steps of 32
//                columns; half for pivots.  Tiles read the panel, half as many bytes again, from the second-level cache.
// Bound          multiply-add outside of the matrix units, and memory.
// Why our own    cuSOLVER and cuBLAS through torch would need the factor and a full triangular solve: cols^3 more
//                multiply-adds than here, a second cols^2 buffer, and TF32 wherever the user has allowed it for products.
//                This sweep is three kernels, of which accumulate_gram.cu has the large one.
// Design         A step (csrc/cpu/inverse_diagonal.cpp has the same elimination) inverts the factor M of the diagonal
//                block; forms P = M R, where column j of R is, right of the block, the column of H still to be factored,
//                and left of it the right-hand side of L X = I as far as it is solved; adds the squares of the left part
//                to sums; and takes <p_i, p_j> off all that is below.  Whether a pivot failed is known on the device:
//                later kernels look and return, nothing waits.  The same bits on every run.
// Resident       blocks of 256 threads: panel_kernel 4, factor_kernel 4, damp_kernel 8, lambda_kernel 8, finish_kernel 8.
#include <algorithm>

#include "elements.cuh"
#include "hpa/check.h"
#include "launch.cuh"
#include "symmetric.cuh"

namespace hpa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kSmall = 1024;  // columns up to which float32 matrices are factored in float64

template <class T>
inline constexpr int kBlock = sizeof(T) == 4 ? 64 : 32;  // columns of a step: two blocks of them fit shared memory

constexpr int kOk = static_cast<int>(FactorStatus::ok);
constexpr int kNotPositiveDefinite = static_cast<int>(FactorStatus::not_positive_definite);
constexpr int kNonFinite = static_cast<int>(FactorStatus::non_finite);

struct Given {
  const void* data;
  DType dtype;
  std::int64_t cols, row_stride, col_stride;
};

// result[0] = lambda; one block.
__global__ void __launch_bounds__(kThreads)
    lambda_kernel(const Given given, double damping, double* result, int* status) {
  HPA_SHARED(double, warp_sums, kThreads / kWarp);
  double sum = 0;
  for (std::int64_t j = threadIdx.x; j < given.cols; j += kThreads) {
    sum += load_element<double>(given.data, given.dtype, j * (given.row_stride + given.col_stride));
  }
  sum = warp_sum(sum);
  if (lane_index() == 0) warp_sums[warp_index()] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) total += warp_sums[w];
    const double lambda = damping * (total / static_cast<double>(given.cols));
    result[0] = lambda;
    *status = !isfinite(lambda) ? kNonFinite : lambda > 0 ? kOk : kNotPositiveDefinite;
  }
}

// work = lower triangle of G + lambda I, or of it with its indices reversed.
template <class T>
__global__ void __launch_bounds__(kThreads)
    damp_kernel(const Given given, bool reversed, T* work, std::int64_t pitch, const double* result, int* status) {
  const std::int64_t pieces = (given.cols + kThreads - 1) / kThreads;
  const std::int64_t row = blockIdx.x / pieces, col = blockIdx.x % pieces * kThreads + threadIdx.x;
  if (col > row) return;
  const std::int64_t i = reversed ? given.cols - 1 - col : row, j = reversed ? given.cols - 1 - row : col;
  double value = load_element<double>(given.data, given.dtype, i * given.row_stride + j * given.col_stride);
  if (!isfinite(value)) atomicMax(status, kNonFinite);
  if (row == col) value += result[0];
  work[row * pitch + col] = static_cast<T>(value);
}

// inverse = L^-1 of the block of work on the diagonal at `start`; pivots: sums[j] = L_jj.  One block of threads.
//
// Row by row, in place: below row k the columns left of it hold right-hand sides, those right of it what is left of H.
template <class T>
__global__ void __launch_bounds__(kThreads)
    factor_kernel(const T* work, std::int64_t pitch, std::int64_t start, int size, bool pivots, T* inverse,
                  double* sums, int* status) {
  constexpr int kSize = kBlock<T>;
  HPA_SHARED(double, block, kSize * (kSize + 1));
  HPA_SHARED(double, row, kSize);
  HPA_SHARED(double, column, kSize);
  if (*status != kOk) return;
  const int thread = static_cast<int>(threadIdx.x);
  for (int at = thread; at < size * size; at += kThreads) {
    const int i = at / size, j = at % size;
    if (j <= i) block[i * (kSize + 1) + j] = work[(start + i) * pitch + start + j];
  }
  __syncthreads();
  for (int k = 0; k < size; ++k) {
    const double pivot = block[k * (kSize + 1) + k];
    if (!(pivot > 0) || !isfinite(pivot)) {  // the same for all threads
      if (thread == 0) *status = isfinite(pivot) ? kNotPositiveDefinite : kNonFinite;
      return;
    }
    const double root = sqrt(pivot);
    for (int j = thread; j < size; j += kThreads) {
      if (j <= k) row[j] = (j < k ? block[k * (kSize + 1) + j] : 1.0) / root;
      if (j > k) column[j] = block[j * (kSize + 1) + k] / root;
    }
    if (thread == 0 && pivots) sums[start + k] = root;
    __syncthreads();
    for (int j = thread; j <= k; j += kThreads) block[k * (kSize + 1) + j] = row[j];
    for (int at = thread; at < (size - k - 1) * size; at += kThreads) {
      const int i = k + 1 + at / size, j = at % size;
      if (j > i) continue;
      double& element = block[i * (kSize + 1) + j];
      // Column k below the pivot has been used up and becomes a right-hand side.
      const double before = j == k ? 0.0 : element;
      element = before - column[i] * (j <= k ? row[j] : column[j]);
    }
    __syncthreads();
  }
  for (int at = thread; at < kSize * kSize; at += kThreads) {
    const int i = at / kSize, j = at % kSize;
    inverse[at] = i < size && j <= i ? static_cast<T>(block[i * (kSize + 1) + j]) : T(0);
  }
}

// panel [size, pitch] = inverse * R for kBlock columns from first_col + ... on, and sums[j] += |panel_j|^2.
template <class T>
__global__ void __launch_bounds__(kThreads)
    panel_kernel(T* work, std::int64_t pitch, std::int64_t cols, std::int64_t start, int size, std::int64_t first_col,
                 bool pivots, const T* inverse, T* panel, double* sums, const int* status) {
  constexpr int kSize = kBlock<T>, kRowsOfThread = kSize * kSize / kThreads;
  HPA_SHARED(T, factor, kSize * kSize);
  HPA_SHARED(T, right, kSize * (kSize + 1));
  HPA_SHARED(double, squares, kThreads);
  if (*status != kOk) return;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t base = first_col + static_cast<std::int64_t>(blockIdx.x) * kSize, stop = start + size;
  for (int at = thread; at < kSize * kSize; at += kThreads) factor[at] = inverse[at];
  // A block of columns lies left of, in, or right of the diagonal block, as all begin at multiples of kSize.
  for (int at = thread; at < kSize * kSize; at += kThreads) {
    const int outer = at / kSize, inner = at % kSize;
    if (base >= stop) {
      const std::int64_t j = base + outer;  // a row of H below the diagonal block is a column of R
      T value = T(0);
      if (j < cols && inner < size) {
        value = work[j * pitch + start + inner];
        if (!pivots) work[j * pitch + start + inner] = T(0);  // used up: becomes a right-hand side
      }
      right[inner * (kSize + 1) + outer] = value;
    } else if (base == start) {
      right[outer * (kSize + 1) + inner] = outer == inner ? T(1) : T(0);
    } else {
      right[outer * (kSize + 1) + inner] = outer < size ? work[(start + outer) * pitch + base + inner] : T(0);
    }
  }
  __syncthreads();
  const int col = thread % kSize, part = thread / kSize;
  double sum = 0;
  for (int r = 0; r < kRowsOfThread; ++r) {
    const int k = part + r * (kThreads / kSize);
    if (k >= size) break;
    T value = T(0);
#pragma unroll 8
    for (int i = 0; i < kSize; ++i) value += factor[k * kSize + i] * right[i * (kSize + 1) + col];
    if (base + col < cols) panel[k * pitch + base + col] = value;
    sum += static_cast<double>(value) * static_cast<double>(value);
  }
  squares[thread] = sum;
  __syncthreads();
  if (!pivots && thread < kSize && base < stop && base + col < cols) {
    for (int p = 1; p < kThreads / kSize; ++p) sum += squares[p * kSize + col];
    sums[base + col] += sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    finish_kernel(const double* sums, std::int64_t cols, bool pivots, void* out, DType dtype, double* result,
                  const int* status) {
  const std::int64_t j = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j == 0) result[1] = *status;
  if (j >= cols || *status != kOk) return;
  const double value = pivots ? 1.0 / (sums[cols - 1 - j] * sums[cols - 1 - j]) : sums[j];
  store_element(out, dtype, j, value);
}

template <class T>
void eliminate(Context& context, const Given& given, bool pivots, double damping, const TensorView& out,
               double* result) {
  constexpr std::int64_t kSize = kBlock<T>;
  const std::int64_t n = given.cols, pitch = div_up(n, 16) * 16;
  T* work = allocate<T>(context, n * pitch);
  T* panel = allocate<T>(context, kSize * pitch);
  T* inverse = allocate<T>(context, kSize * kSize);
  auto* sums = allocate<double>(context, n);
  int* status = allocate<int>(context, 1);
  const MatrixView c = {work, sizeof(T) == 4 ? DType::f32 : DType::f64, n, n, pitch, 1};
  const auto bytes = static_cast<std::size_t>(n) * sizeof(double);
  require(cudaMemsetAsync(sums, 0, bytes, stream_of(context)), "cannot clear memory");
  launch(context, 1, kThreads, lambda_kernel, given, damping, result, status);
  launch(context, n * div_up(n, kThreads), kThreads, damp_kernel<T>, given, pivots, work, pitch,
         static_cast<const double*>(result), status);
  for (std::int64_t start = 0; start < n; start += kSize) {
    const std::int64_t size = std::min(kSize, n - start), stop = start + size;
    launch(context, 1, kThreads, factor_kernel<T>, static_cast<const T*>(work), pitch, start, static_cast<int>(size),
           pivots, inverse, sums, status);
    const std::int64_t first_col = pivots ? stop : 0;
    launch(context, div_up(n - first_col, kSize), kThreads, panel_kernel<T>, work, pitch, n, start,
           static_cast<int>(size), first_col, pivots, static_cast<const T*>(inverse), panel, sums,
           static_cast<const int*>(status));
    add_symmetric(context, c, {panel, c.dtype, size, n, pitch, 1}, -1.0, stop, first_col, status);
  }
  launch(context, div_up(n, kThreads), kThreads, finish_kernel, static_cast<const double*>(sums), n, pivots, out.data,
         out.dtype, result, static_cast<const int*>(status));
}

}  // namespace

void inverse_diagonal(Context& context, const TensorView& out, const TensorView& result, const TensorView& gram,
                      double damping, DiagonalMode mode) {
  const MatrixView g = as_matrix("gram", gram);
  check(g.rows == g.cols, "gram", "expected a square matrix");
  check_shape("out", out, {g.cols});
  check((out.dtype == DType::f32 || out.dtype == DType::f64) && (g.cols <= 1 || out.stride[0] == 1), "out",
        "expected contiguous float32 or float64");
  check_shape("result", result, {2});
  check(result.dtype == DType::f64 && result.stride[0] == 1, "result", "expected contiguous float64");
  check(g.cols > 0, "gram", "expected at least one column");
  const DeviceGuard guard(context);
  const Given given = {g.data, g.dtype, g.cols, g.row_stride, g.col_stride};
  auto* results = static_cast<double*>(result.data);
  const bool pivots = mode == DiagonalMode::pivot;
  if (out.dtype == DType::f64 || g.cols <= kSmall) {
    eliminate<double>(context, given, pivots, damping, out, results);
  } else {
    eliminate<float>(context, given, pivots, damping, out, results);
  }
}

}  // namespace hpa::cuda
