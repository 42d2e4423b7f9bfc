// AVX512_BF16: products of bfloat16 activations, two a lane and instruction, where AVX-512 has one of float32.  What it
// lacks the table takes from avx512.cpp.  Not chosen by itself on Intel's CPUs, where it is slower than avx512.cpp.
//
// VDPBF16PS adds the two products of a pair to a float32 sum one after the other, rounding each time to nearest, ties to
// even.  It takes numbers below 2^-126 for zero, as operands and as results: a sum over n tokens may be off by
// n * 2^-126 * max(1, |x|) more than rounding explains.
#include <immintrin.h>

#define HPA_ISA_NAMESPACE avx512bf16
#define HPA_VECTOR_BYTES 64
#define HPA_TILE_VECTORS 3
#define HPA_TILE_ROWS 8

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace hpa::isa {
namespace HPA_ISA_NAMESPACE {
namespace {

#define HPA_INLINE inline __attribute__((always_inline))

#include "formats.inl"
#include "vectors.inl"
#include "panels.inl"

constexpr std::int64_t kPairPanel = kPanel<float>;
constexpr std::int64_t kPairRound = 1;
// 256 values: a panel takes 24 KB of a first-level cache of 32 KB.
constexpr std::int64_t kPairDepth = 128;
constexpr std::int64_t kPairBlock = 192;
#include "pairs.inl"

struct Pairs {
  using Entry = Pair;
  using Sum = float;
  static HPA_INLINE V<Pair> read_entries(const Pair* from) { return read(from); }
  static HPA_INLINE V<float> add_product(V<float> sum, Pair a, V<Pair> b) {
    return (V<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)spread(a), (__m512bh)b);
  }
};

#undef HPA_INLINE

}  // namespace
}  // namespace HPA_ISA_NAMESPACE

const Product<std::uint32_t, float> avx512bf16_pairs = {
    avx512bf16::kPairPanel,
    avx512bf16::kPairDepth,
    avx512bf16::kPairRound,
    avx512bf16::kPairBlock,
    {nullptr, nullptr, avx512bf16::pack_pairs, nullptr},
    avx512bf16::turn<std::uint32_t>,
    avx512bf16::multiply<avx512bf16::Pairs>,
    nullptr,
    nullptr,
};

}  // namespace hpa::isa
