// gram[i, j] += scale * sum_t x[t, i] x[t, j],  j <= i                     gram [cols, cols], x [tokens, cols]
//
// Flops        tokens * cols * (cols + 1), half of a full product (minimum); tiles on the diagonal compute 24 / cols more.
// Bound        the multiply-add units for some 100 tokens or more; below that, reading and writing gram.
// Measured     Zen 3, one core, AVX2, 2048 tokens of 4096 columns: 79 to 81 GF/s in float32, 83 % of the 96 GF/s of a bare
//              loop of multiply-adds, where OpenBLAS's ssyrk has 76 to 83 and half the flops of MKL's sgemm 36.
// Arithmetic   in the dtype of gram (float32, float64); x is widened while it is packed.  A product of two bfloat16 or
//              float16 values is exact in float32.  At most 256 tokens are summed in registers, two such sums in
//              scratch, and those are scaled and added to gram: rounding grows with 258 + tokens / 512 terms, not with
//              tokens.  The scale is applied to sums, so that bfloat16 activations are not rounded a second time.
// bfloat16     on a CPU with AVX512_BF16 or AMX is multiplied as it is, in pairs, sums in float32: at most 512 tokens in
//              registers, four such sums in scratch.  Those units take numbers below 2^-126 for zero (isa/amx.cpp).
//              float16 has too many bits for them: it takes the float32 route, as everywhere else.
// Bytes moved  x once (minimum: once).  The lower half of gram is read and written once for each 512 tokens, 1024 in
//              pairs (minimum: once a call); at 4096 columns that is 64 MB beside 4.3 billion multiply-adds.
// Scratch      512 * cols of x (1024 in pairs), packed twice.
// Design       The product is symmetric: x serves as both operands, and only blocks on or below the diagonal are
//              computed (panels.h).  Each element of gram has one owner and a fixed order of summation, so the result
//              does not depend on the number of threads.
#include "hpa/check.h"
#include "hpa/kernels.h"
#include "panels.h"

namespace hpa {

void accumulate_gram(const TensorView& gram, const TensorView& x, double scale, int threads) {
  const MatrixView c = as_matrix("gram", gram);
  const MatrixView rows = as_matrix("x", x);
  check(c.dtype == DType::f32 || c.dtype == DType::f64, "gram", "expected float32 or float64");
  check_shape("gram", gram, {rows.cols, rows.cols});
  check(rows.dtype != DType::f64 || c.dtype == DType::f64, "x", "float64 needs a float64 gram");

  const MatrixView lanes = {rows.data, rows.dtype, rows.cols, rows.rows, rows.col_stride, rows.row_stride};
  const isa::Table& table = isa::active();
  if (c.dtype == DType::f32 && rows.dtype == DType::bf16 && table.pairs != nullptr) {
    add_gram(*table.pairs, lanes, static_cast<float>(scale), c, threads);
  } else if (c.dtype == DType::f32) {
    add_gram(table.f32.product, lanes, static_cast<float>(scale), c, threads);
  } else {
    add_gram(table.f64.product, lanes, scale, c, threads);
  }
}

}  // namespace hpa
