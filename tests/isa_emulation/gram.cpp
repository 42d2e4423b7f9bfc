// The symmetric products of instruction sets that this machine need not have, behind a C interface for
// tests/test_isa.py: gram += scale * x^T x with the loops of csrc/cpu/isa/NAME.cpp.
#include <cstdint>
#include <cstring>

#include "panels.h"

// Strides in elements; dtype as in hpa::DType.  Returns 0, or 1 where the instruction set does not serve it.
extern "C" int emulated_gram(const char* name, float* gram, std::int64_t gram_row, std::int64_t gram_col, void* x,
                             int dtype, std::int64_t tokens, std::int64_t cols, std::int64_t x_row, std::int64_t x_col,
                             float scale) {
  using namespace hpa;
  const MatrixView lanes = {x, static_cast<DType>(dtype), cols, tokens, x_col, x_row};
  const MatrixView c = {gram, DType::f32, cols, cols, gram_row, gram_col};
  const bool avx512 = std::strcmp(name, "avx512") == 0, pairs = lanes.dtype == DType::bf16;
  if (!avx512 && !pairs) return 1;
  if (avx512) {
    add_gram(isa::avx512_table.f32.product, lanes, scale, c, 1);
  } else {
    add_gram(std::strcmp(name, "amx") == 0 ? isa::amx_pairs : isa::avx512bf16_pairs, lanes, scale, c, 1);
  }
  return 0;
}
