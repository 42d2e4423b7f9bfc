// gram[i, j] += scale * sum_t x[t, i] x[t, j],  j <= i                     gram [cols, cols], x [tokens, cols]
//
// Arithmetic   bfloat16 and float16 with a float32 gram: on the matrix units, exact products, float32 sums.  Everything
//              else: multiply-add in the dtype of gram, never TF32.  Two levels: 256 tokens are summed, then added to a
//              total in registers; after 8192 tokens the total is scaled and added to gram.  The matrix units round
//              their sums towards zero, which adds up over tokens: with 256 the bias stays below 16 roundings.  The scale
//              is applied to sums, so that 16-bit activations are not rounded a second time.
// Bytes moved  a tile of 128 x 128 reads 256 columns of x, on the diagonal 128: x is read cols / 128 times in all, from
//              the second-level cache for the most part.  Without matrix units a tile on the diagonal reads its columns
//              twice: once more; and tiles are 64 x 64 in float64: cols / 64 + 1 times.  The lower half of gram is read
//              and written once for each 8192 tokens.
// Bound        the matrix units: cols^2 tokens multiply-adds, half of a full product.
// Design       Tiles on and below the diagonal only, one a block.  mma.sync rather than the asynchronous instructions of
//              sm_90 and sm_100: one source for all generations, PTX that later ones can compile, and a program that runs
//              on the host for its tests; it leaves a part of the peak of sm_90 and later unused.  x is stored by tokens,
//              which is the transpose of what the instruction wants on both sides, and ldmatrix transposes on the way.
//              Three stages of cp.async hide the loads; 16-byte pieces are swizzled, so that the eight rows an ldmatrix
//              reads lie in different banks.  Owners and order of sums are fixed by shape: the same bits on every run.
// Resident     blocks of 256 threads: matrix_kernel 1, multiply_kernel 1.  Registers hold the sums twice.
#include "symmetric.cuh"

#include <algorithm>

#include "elements.cuh"
#include "hpa/check.h"
#include "launch.cuh"

namespace hpa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kSegment = 8192;  // tokens between two additions to gram
constexpr int kPromote = 256;            // tokens between two additions to the total

struct Problem {
  const void* x;
  void* c;
  DType dtype;  // of x
  std::int64_t tokens, cols, x_row_stride, x_col_stride, c_row_stride, c_col_stride;
  std::int64_t first_row, first_col, col_tiles;
  bool four_at_a_time;  // rows of x can be read four elements at a time
};

struct Tile {
  std::int64_t row, col;
  bool needed;
};

template <int Size>
__device__ __forceinline__ Tile find_tile(const Problem& p) {
  const std::int64_t row = p.first_row + blockIdx.x / p.col_tiles * Size;
  const std::int64_t col = p.first_col + blockIdx.x % p.col_tiles * Size;
  return {row, col, col <= min(row + Size, p.cols) - 1};
}

// ---- 16-bit activations on the matrix units ----

constexpr int kTile = 128;   // rows and columns of gram
constexpr int kDepth = 32;   // tokens of a stage
constexpr int kStages = 3;
constexpr int kPiece = 8;    // elements in 16 bytes
constexpr int kRowPieces = kTile / kPiece;
constexpr int kStageSize = kDepth * kTile;

// Place of a piece in a stage, in elements.
__device__ __forceinline__ int swizzled(int token, int piece) { return token * kTile + (piece ^ (token & 7)) * kPiece; }

// Tokens [token, token + kDepth) of columns [col, col + kTile); what lies outside of x is zero.
template <bool Aligned>
__device__ __forceinline__ void load_stage(const Problem& p, std::int64_t token, std::int64_t col,
                                           std::uint16_t* stage) {
  const auto* x = static_cast<const std::uint16_t*>(p.x);
#pragma unroll
  for (int i = 0; i < kDepth * kRowPieces / kThreads; ++i) {
    const int index = i * kThreads + static_cast<int>(threadIdx.x);
    const int t = index / kRowPieces, piece = index % kRowPieces;
    const std::int64_t row = token + t, first = col + piece * kPiece;
    std::uint16_t* to = stage + swizzled(t, piece);
    const std::int64_t valid =
        row < p.tokens ? max(std::int64_t{0}, min(std::int64_t{kPiece}, p.cols - first)) : std::int64_t{0};
    if constexpr (Aligned) {
      copy_async(to, valid > 0 ? x + row * p.x_row_stride + first : x, static_cast<int>(valid) * 2);
    } else {
#pragma unroll
      for (int e = 0; e < kPiece; ++e) {
        to[e] = e < valid ? x[row * p.x_row_stride + (first + e) * p.x_col_stride] : std::uint16_t{0};
      }
    }
  }
}

// A block has 2 x 4 warps; a warp computes 64 x 32 as 4 x 4 products of the matrix units.
template <bool Bfloat16, bool Aligned>
__global__ void __launch_bounds__(kThreads, 1) matrix_kernel(const Problem p, float scale) {
  HPA_SHARED(std::uint16_t, left, kStages * kStageSize);
  HPA_SHARED(std::uint16_t, right, kStages * kStageSize);
  const Tile tile = find_tile<kTile>(p);
  if (!tile.needed) return;
  const bool diagonal = tile.row == tile.col;
  const int lane = lane_index(), warp_row = warp_index() / 4 * 64, warp_col = warp_index() % 4 * 32;
  const std::uint16_t* columns = diagonal ? left : right;

  const std::int64_t steps = (p.tokens + kDepth - 1) / kDepth;
  const auto load_step = [&](std::int64_t step) {
    if (step < steps) {
      const int slot = static_cast<int>(step % kStages) * kStageSize;
      load_stage<Aligned>(p, step * kDepth, tile.row, left + slot);
      if (!diagonal) load_stage<Aligned>(p, step * kDepth, tile.col, right + slot);
    }
    commit_copies();  // an empty group keeps the count of groups in step with the loop
  };

  float totals[4][4][4] = {}, sums[4][4][4] = {};
  const auto promote = [&] {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          totals[i][j][e] += sums[i][j][e];
          sums[i][j][e] = 0;
        }
      }
    }
  };
  for (int step = 0; step < kStages - 1; ++step) load_step(step);
#pragma unroll 1
  for (std::int64_t step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // the stage is complete, and all have left the one that is loaded next
    load_step(step + kStages - 1);
    const int slot = static_cast<int>(step % kStages) * kStageSize;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      std::uint32_t a[4][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = k + (lane & 7) + (lane >> 4) * 8;
        const int piece = (warp_row + i * 16) / kPiece + (lane >> 3 & 1);
        load_matrices_transposed(a[i], left + slot + swizzled(token, piece));
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int token = k + (lane & 7) + (lane >> 3 & 1) * 8;
        const int piece = (warp_col + j * 16) / kPiece + (lane >> 4);
        load_matrices_transposed(b[j], columns + slot + swizzled(token, piece));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          multiply_add<Bfloat16>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
    if ((step + 1) % (kPromote / kDepth) == 0) promote();
  }
  promote();

  auto* gram = static_cast<float*>(p.c);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const std::int64_t row = tile.row + warp_row + i * 16 + lane / 4 + e / 2 * 8;
        const std::int64_t col = tile.col + warp_col + j * 8 + lane % 4 * 2 + e % 2;
        if (row < p.cols && col <= row) gram[row * p.c_row_stride + col * p.c_col_stride] += scale * totals[i][j][e];
      }
    }
  }
}

// ---- Multiply-add in the dtype of the result ----

constexpr int kSlice = 8;  // tokens in shared memory at a time

// A block has 16 x 16 threads; a thread computes Side x Side elements in groups of four, 64 apart.
template <class T, int Side>
__global__ void __launch_bounds__(kThreads, 1) multiply_kernel(const Problem p, T scale, const int* status) {
  constexpr int kSize = 16 * Side;
  constexpr int kOperand = kSlice * kSize;               // elements of a stage of one operand
  constexpr int kLoads = 2 * kOperand / 4 / kThreads;    // groups of four of a thread, of both operands together
  static_assert(Side % 4 == 0 && kLoads >= 1 && kLoads * 4 * kThreads == 2 * kOperand);
  HPA_SHARED(T, stages, 2 * 2 * kOperand);  // two stages of the left operand and then the right one
  const Tile tile = find_tile<kSize>(p);
  if (!tile.needed || (status != nullptr && *status != 0)) return;
  const int thread_row = static_cast<int>(threadIdx.x) / 16, thread_col = static_cast<int>(threadIdx.x) % 16;

  const auto read = [&](std::int64_t token, std::int64_t col, T(&values)[4]) {
    if (token < p.tokens && p.four_at_a_time && col + 4 <= p.cols) {
      load_four(p.x, p.dtype, token * p.x_row_stride + col, values);
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool inside = token < p.tokens && col + e < p.cols;
      values[e] = inside ? load_element<T>(p.x, p.dtype, token * p.x_row_stride + (col + e) * p.x_col_stride) : T(0);
    }
  };
  T next[kLoads][4] = {};
  const auto fetch = [&](std::int64_t token) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int index = (i * kThreads + static_cast<int>(threadIdx.x)) * 4, within = index % kOperand;
      read(token + within / kSize, (index < kOperand ? tile.row : tile.col) + within % kSize, next[i]);
    }
  };
  const auto put = [&](int slot) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int index = (i * kThreads + static_cast<int>(threadIdx.x)) * 4;
#pragma unroll
      for (int e = 0; e < 4; ++e) stages[slot * 2 * kOperand + index + e] = next[i][e];
    }
  };

  T totals[Side][Side] = {}, sums[Side][Side] = {};
  fetch(0);
  put(0);
  __syncthreads();
  int slot = 0;
#pragma unroll 1
  for (std::int64_t token = 0; token < p.tokens; token += kSlice) {
    fetch(token + kSlice);
#pragma unroll
    for (int t = 0; t < kSlice; ++t) {
      T a[Side], b[Side];
#pragma unroll
      for (int i = 0; i < Side; ++i) {
        const T* token_row = stages + slot * 2 * kOperand + t * kSize + i / 4 * 64 + i % 4;
        a[i] = token_row[thread_row * 4];
        b[i] = token_row[kOperand + thread_col * 4];
      }
#pragma unroll
      for (int i = 0; i < Side; ++i) {
#pragma unroll
        for (int j = 0; j < Side; ++j) sums[i][j] += a[i] * b[j];
      }
    }
    slot = 1 - slot;
    put(slot);
    __syncthreads();
    if ((token + kSlice) % kPromote == 0 || token + kSlice >= p.tokens) {
#pragma unroll
      for (int i = 0; i < Side; ++i) {
#pragma unroll
        for (int j = 0; j < Side; ++j) {
          totals[i][j] += sums[i][j];
          sums[i][j] = 0;
        }
      }
    }
  }

  T* c = static_cast<T*>(p.c);
#pragma unroll
  for (int i = 0; i < Side; ++i) {
#pragma unroll
    for (int j = 0; j < Side; ++j) {
      const std::int64_t row = tile.row + i / 4 * 64 + thread_row * 4 + i % 4;
      const std::int64_t col = tile.col + j / 4 * 64 + thread_col * 4 + j % 4;
      if (row < p.cols && col <= row) c[row * p.c_row_stride + col * p.c_col_stride] += scale * totals[i][j];
    }
  }
}

template <class T, int Side>
void multiply(Context& context, Problem problem, double scale, const int* status) {
  constexpr std::int64_t kSize = 16 * Side;
  problem.col_tiles = div_up(problem.cols - problem.first_col, kSize);
  const std::int64_t tiles = div_up(problem.cols - problem.first_row, kSize) * problem.col_tiles;
  launch(context, tiles, kThreads, multiply_kernel<T, Side>, problem, static_cast<T>(scale), status);
}

template <bool Bfloat16>
void multiply_on_matrix_units(Context& context, Problem problem, double scale, bool aligned_rows) {
  problem.col_tiles = div_up(problem.cols, kTile);
  const std::int64_t tiles = problem.col_tiles * problem.col_tiles;
  launch(context, tiles, kThreads,
         aligned_rows ? matrix_kernel<Bfloat16, true> : matrix_kernel<Bfloat16, false>, problem,
         static_cast<float>(scale));
}

}  // namespace

void add_symmetric(Context& context, const MatrixView& c, const MatrixView& x, double scale, std::int64_t first_row,
                   std::int64_t first_col, const int* status) {
  if (first_row >= c.rows || x.rows == 0) return;
  for (std::int64_t token = 0; token < x.rows; token += kSegment) {
    const std::int64_t size = element_size(x.dtype), together = std::min<std::int64_t>(16, 4 * size);
    Problem problem = {};
    problem.x = x.at(token, 0);
    problem.c = c.data;
    problem.dtype = x.dtype;
    problem.tokens = std::min(kSegment, x.rows - token);
    problem.cols = x.cols;
    problem.x_row_stride = x.row_stride;
    problem.x_col_stride = x.col_stride;
    problem.c_row_stride = c.row_stride;
    problem.c_col_stride = c.col_stride;
    problem.first_row = first_row;
    problem.first_col = first_col;
    problem.four_at_a_time = x.col_stride == 1 && first_row % 4 == 0 && first_col % 4 == 0 &&
                             aligned(problem.x, together) && x.row_stride * size % together == 0;
    const bool narrow = x.dtype == DType::bf16 || x.dtype == DType::f16;
    if (c.dtype == DType::f64) {
      multiply<double, 4>(context, problem, scale, status);
    } else if (!narrow) {
      multiply<float, 8>(context, problem, scale, status);
    } else {
      const bool aligned_rows = x.col_stride == 1 && aligned(problem.x, 16) && x.row_stride % kPiece == 0;
      if (x.dtype == DType::bf16) {
        multiply_on_matrix_units<true>(context, problem, scale, aligned_rows);
      } else {
        multiply_on_matrix_units<false>(context, problem, scale, aligned_rows);
      }
    }
  }
}

void accumulate_gram(Context& context, const TensorView& gram, const TensorView& x, double scale) {
  const MatrixView c = as_matrix("gram", gram), rows = as_matrix("x", x);
  check(c.dtype == DType::f32 || c.dtype == DType::f64, "gram", "expected float32 or float64");
  check_shape("gram", gram, {rows.cols, rows.cols});
  check(rows.dtype != DType::f64 || c.dtype == DType::f64, "x", "float64 needs a float64 gram");
  const DeviceGuard guard(context);
  add_symmetric(context, c, rows, scale, 0, 0, nullptr);
}

}  // namespace hpa::cuda
