// gram[i, j] += scale * sum_t x[t, i] x[t, j],  j <= i                     gram [cols, cols], x [tokens, cols]
//
// Flops        tokens * cols * (cols + 1), half of a full product (minimum); tiles on the diagonal compute 24 / cols more.
// Bound        the multiply-add units for some 100 tokens or more; below that, reading and writing gram.
// Measured     Zen 3, one core, AVX2, 2048 tokens of 4096 columns: 79 to 81 GF/s in float32, 83 % of the 96 GF/s of a bare
//              loop of multiply-adds, where OpenBLAS's ssyrk has 76 to 83 and half the flops of MKL's sgemm 36.
//              AMX, the same in bfloat16: 1.0 TF/s a core of the 3.4 of tiles that are never loaded.  On tiles whose
//              operands lie in the second-level cache the loop itself has 2.3; the rest of the time goes to operands
//              from the third level, and to lines of gram, which no prefetcher guesses, from memory.
// Arithmetic   in the dtype of gram (float32, float64); x is widened while it is packed.  A product of two bfloat16 or
//              float16 values is exact in float32.  At most 256 tokens are summed in registers, two such sums in
//              scratch, and those are scaled and added to gram: rounding grows with 258 + tokens / 512 terms, not with
//              tokens.  The scale is applied to sums, so that bfloat16 activations are not rounded a second time.
// bfloat16     on a CPU with AMX, or AMD's with AVX512_BF16, is multiplied as it is, in pairs, sums in float32: at most
//              256 tokens in registers, four such sums in scratch.  Those units take numbers below 2^-126 for zero
//              (isa/amx.cpp).  float16 has too many bits for them: it takes the float32 route, as everywhere else.
// Bytes moved  x once (minimum: once).  The lower half of gram is read and written once for each 512 tokens, 1024 in
//              pairs (minimum: once a call); at 4096 columns that is 64 MB beside 4.3 billion multiply-adds.
// Few tokens   (at most 64; 32 in pairs) add to gram straight from registers, along runs of its rows, which memory likes
//              better than squares.  Zen 3, two threads, 4096 columns: 2.1 ms for one token, 2.7 for 8, 4.8 for 32, where
//              ssyrk takes 4.2, 4.6 and 7.1 and reading and writing the lower half at the rate of a bare loop 2.3.
// Scratch      512 * cols of x (1024 in pairs), packed twice.
// Design       The product is symmetric: x serves as both operands, and only blocks on or below the diagonal are
//              computed (panels.h).  Each element of gram has one owner and a fixed order of summation, so the result
//              does not depend on the number of threads.
#include "hpa/check.h"
#include "hpa/kernels.h"
#include "panels.h"

namespace hpa {
namespace {

constexpr std::int64_t kFewTokens = 64;      // up to which reading and writing gram is what takes the time
constexpr std::int64_t kFewPairTokens = 32;  // the same where pairs of bf16 make arithmetic faster
constexpr std::int64_t kBand = 96;           // rows of a task, a multiple of every panel
constexpr std::int64_t kRunBytes = 24576;    // of x beside a run of gram, in a first-level cache of 32 KB
constexpr std::int64_t kLongestRun = 1024;   // columns: those of the next strip wait in the second-level cache

// Few tokens.  A task is a band of rows; it goes through them strip by strip along runs of gram, and through each run of
// x once for all of its strips.
template <class T>
void add_few(const isa::Kernels<T>& kernels, const MatrixView& lanes, T alpha, const MatrixView& c, int threads) {
  const std::int64_t p = kernels.panel, q = kernels.strip, n = lanes.rows, depth = lanes.cols, count = ceil_div(n, p);
  Buffer<T> right(count * p * depth), left(count * p * depth);
  parallel_for(ceil_div(count, kPackPanels), useful_threads(n * depth, 1 << 16, threads), [&](std::int64_t task, int) {
    const std::int64_t panel = task * kPackPanels, at = panel * p * depth;
    pack_panels(kernels.product, lanes, panel, 0, depth, depth, right.data() + at, left.data() + at);
  });

  const std::int64_t run =
      std::max<std::int64_t>(
          std::min<std::int64_t>(kRunBytes / static_cast<std::int64_t>(sizeof(T)) / depth, kLongestRun) / p, 1) *
      p;
  const std::int64_t bands = ceil_div(n, kBand);
  parallel_for(bands, useful_threads(n * n / 2 * (depth + 4), 1 << 20, threads), [&](std::int64_t task, int) {
    const std::int64_t top = (bands - 1 - task) * kBand, bottom = std::min(top + kBand, n);  // long rows first
    for (std::int64_t col = 0; col < bottom; col += run) {
      for (std::int64_t row = std::max(top, col / q * q); row < bottom; row += q) {
        kernels.multiply_run(depth, left.data() + row * depth, right.data() + col * depth, alpha,
                             std::min(q, bottom - row), std::min(run, n - col), row - col,
                             static_cast<T*>(c.at(row, col)), c.row_stride);
      }
    }
  });
}

}  // namespace

void accumulate_gram(const TensorView& gram, const TensorView& x, double scale, int threads) {
  const MatrixView c = as_matrix("gram", gram);
  const MatrixView rows = as_matrix("x", x);
  check(c.dtype == DType::f32 || c.dtype == DType::f64, "gram", "expected float32 or float64");
  check_shape("gram", gram, {rows.cols, rows.cols});
  check(rows.dtype != DType::f64 || c.dtype == DType::f64, "x", "float64 needs a float64 gram");

  const MatrixView lanes = {rows.data, rows.dtype, rows.cols, rows.rows, rows.col_stride, rows.row_stride};
  const isa::Table& table = isa::active();
  const bool paired = c.dtype == DType::f32 && rows.dtype == DType::bf16 && table.pairs != nullptr;
  if (c.col_stride == 1 && lanes.cols > 0 && lanes.cols <= (paired ? kFewPairTokens : kFewTokens)) {
    if (c.dtype == DType::f32) {
      add_few(table.f32, lanes, static_cast<float>(scale), c, threads);
    } else {
      add_few(table.f64, lanes, scale, c, threads);
    }
  } else if (paired) {
    add_gram(*table.pairs, lanes, static_cast<float>(scale), c, threads);
  } else if (c.dtype == DType::f32) {
    add_gram(table.f32.product, lanes, static_cast<float>(scale), c, threads);
  } else {
    add_gram(table.f64.product, lanes, scale, c, threads);
  }
}

}  // namespace hpa
