// The inner loops of isa.h in portable vector code.  Before including this file define
//   HPA_ISA_NAMESPACE   namespace of this copy
//   HPA_ISA_TABLE       name of the table it fills,  HPA_ISA_NAME  its name as a string
//   HPA_VECTOR_BYTES    width of a register
//   HPA_TILE_VECTORS    registers across a tile,  HPA_TILE_ROWS  rows of a tile
//
// Only types, built-ins and functions with internal linkage are used here.  An inline function of the standard library
// would be emitted with this file's instructions under a name that all files share, and the linker could hand it to a
// caller on an older CPU.

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "isa.h"

namespace hpa::isa {
namespace HPA_ISA_NAMESPACE {
namespace {

#define HPA_INLINE inline __attribute__((always_inline))

#include "formats.inl"
#include "vectors.inl"
#include "rows.inl"
#include "streams.inl"
#include "panels.inl"
#include "factor.inl"
#include "row_products.inl"
#include "selection.inl"

template <class T>
constexpr Kernels<T> make_kernels() {
  return {
      {load<F32, T>, load<F64, T>, load<Bf16, T>, load<F16, T>},
      {store<F32, T>, store<F64, T>, store<Bf16, T>, store<F16, T>},
      dot<T>,
      dot4<T>,
      scale<T>,
      sum_of_squares<T>,
      {choose_add_dots<F32, T>(), choose_add_dots<F64, T>(), choose_add_dots<Bf16, T>(), choose_add_dots<F16, T>()},
      {choose_subtract_rows<F32, T>(), choose_subtract_rows<F64, T>(), choose_subtract_rows<Bf16, T>(),
       choose_subtract_rows<F16, T>()},
      HPA_VECTOR_BYTES == 64 ? 1 << 20 : 1 << 18,
      add_squares<T>,
      add_abs_products<T>,
      kPanel<T>,
      add_lane_squares<T>,
      kDown,
      multiply_strips<T>,
      solve_strips<T>,
      factor_corner<T>,
      solve_corner<T>,
      transpose_square<T>,
      cut_panel<T>,
      add_row_products<T>,
      add_cross_products<T>,
      substitute_rows<T>,
      make_product<T>(),
      multiply_run<T>,
  };
}

#undef HPA_INLINE

}  // namespace
}  // namespace HPA_ISA_NAMESPACE

const Table HPA_ISA_TABLE = {
    HPA_ISA_NAME,
    HPA_ISA_NAMESPACE::make_kernels<float>(),
    HPA_ISA_NAMESPACE::make_kernels<double>(),
    {HPA_ISA_NAMESPACE::change<HPA_ISA_NAMESPACE::F32, float>,
     HPA_ISA_NAMESPACE::change<HPA_ISA_NAMESPACE::F64, double>,
     HPA_ISA_NAMESPACE::change<HPA_ISA_NAMESPACE::Bf16, float>,
     HPA_ISA_NAMESPACE::change<HPA_ISA_NAMESPACE::F16, float>},
    {HPA_ISA_NAMESPACE::merge<HPA_ISA_NAMESPACE::F32, float>, HPA_ISA_NAMESPACE::merge<HPA_ISA_NAMESPACE::F64, double>,
     HPA_ISA_NAMESPACE::merge<HPA_ISA_NAMESPACE::Bf16, float>, HPA_ISA_NAMESPACE::merge<HPA_ISA_NAMESPACE::F16, float>},
    HPA_ISA_NAMESPACE::are_scores,
    HPA_ISA_NAMESPACE::nth_largest,
    HPA_ISA_NAMESPACE::keep_marked,
    HPA_ISA_NAMESPACE::mark_from,
    HPA_ISA_NAMESPACE::count_marks,
    HPA_ISA_NAMESPACE::multiply_pairs,
    nullptr,
};

}  // namespace hpa::isa
