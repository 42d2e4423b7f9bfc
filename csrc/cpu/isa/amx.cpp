// AMX: products of bfloat16 activations in tiles of 16 rows of 64 bytes, eight of them: two by two tiles of sums, two of
// each operand.  One instruction multiplies 16 x 32 by 32 x 16 values, 16 times what AVX-512 does of float32 in a cycle.
// What it lacks the table takes from avx512bf16.cpp.
//
// A tile of the right operand is 16 entries (pairs of values) of 16 lanes, which is how a panel lies.  A tile of the left
// operand is 16 lanes of 16 entries, its transpose: turn() makes those, each a run of 1 KB.
//
// TDPBF16PS rounds to nearest, ties to even, sums even and odd values of a pair apart before it adds both to the sums,
// and takes numbers below 2^-126 for zero, as operands and as results: a sum over n tokens may be off by
// n * 2^-126 * max(1, |x|) more than rounding explains.
#include <immintrin.h>

#include <cstdint>

#include "isa.h"

namespace hpa::isa {
namespace amx {
namespace {

#define HPA_INLINE inline __attribute__((always_inline))

constexpr int kTile = 16;  // rows, and entries of 32 bits in a row
constexpr int kTileEntries = kTile * kTile;

constexpr std::int64_t kPairPanel = 2 * kTile;
constexpr std::int64_t kPairRound = kTile;
#include "pairs.inl"

// 256 values: a panel takes 16 KB of a first-level cache of 48 KB, through which 16 KB of the left operand pass for each
// tile.  The tiles then run at their full rate; at 192 and more entries they fall to seven tenths of it.
constexpr std::int64_t kDepth = 128;
// At kDepth the rows of a block take 192 KB, its sums 576 KB of a second-level cache of 2 MB.
constexpr std::int64_t kBlock = 384;

typedef std::uint32_t Row __attribute__((vector_size(64)));
typedef std::uint32_t LooseRow __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Floats __attribute__((vector_size(64)));
typedef float LooseFloats __attribute__((vector_size(64), aligned(4), may_alias));

// [16 entries][pitch] -> [16 lanes][16 entries].  Rows whose indices differ in one bit exchange the entries whose indices
// differ in the same bit, for each of the four bits.
HPA_INLINE void transpose(const Pair* from, std::int64_t pitch, Pair* to) {
  Row row[kTile];
  for (int d = 0; d < kTile; ++d) row[d] = *reinterpret_cast<const LooseRow*>(from + d * pitch);
  for (int d = 0; d < 8; ++d) {
    const Row a = row[d], b = row[d + 8];
    row[d] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    row[d + 8] = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  for (int k = 0; k < 8; ++k) {
    const int d = k / 4 * 8 + k % 4;
    const Row a = row[d], b = row[d + 4];
    row[d] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    row[d + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  for (int k = 0; k < 8; ++k) {
    const int d = k / 2 * 4 + k % 2;
    const Row a = row[d], b = row[d + 2];
    row[d] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    row[d + 2] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  for (int d = 0; d < kTile; d += 2) {
    const Row a = row[d], b = row[d + 1];
    row[d] = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    row[d + 1] = __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
  for (int lane = 0; lane < kTile; ++lane) *reinterpret_cast<LooseRow*>(to + lane * kTile) = row[lane];
}

// Left operand: [depth / 16][2 tiles][16 lanes][16 entries].
void turn(std::int64_t depth, const Pair* right, Pair* left) {
  for (std::int64_t d = 0; d < depth; d += kTile) {
    for (int half = 0; half < 2; ++half, left += kTileEntries) {
      transpose(right + d * kPairPanel + half * kTile, kPairPanel, left);
    }
  }
}

// Eight tiles of 16 rows of 64 bytes; the layout is the instruction's.
struct TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};
static_assert(sizeof(TileConfig) == 64);
constexpr TileConfig kConfig;

void open() { _tile_loadconfig(&kConfig); }
void close() { _tile_release(); }

void multiply(std::int64_t depth, const Pair* left, const Pair* right, float alpha, std::int64_t rows,
              std::int64_t cols, std::int64_t reach, const float* carry, float* c, std::int64_t stride) {
  constexpr std::int64_t p = kPairPanel;
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < cols; j += kTile) __builtin_prefetch(c + i * stride + j, 1);
  }
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t d = 0; d < depth; d += kTile, left += 2 * kTileEntries, right += kTile * p) {
    _tile_loadd(4, left, kTile * sizeof(Pair));
    _tile_loadd(6, right, p * sizeof(Pair));
    _tile_loadd(5, left + kTileEntries, kTile * sizeof(Pair));
    _tile_loadd(7, right + kTile, p * sizeof(Pair));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float sums[p * p];
  _tile_stored(0, sums, p * sizeof(float));
  _tile_stored(1, sums + kTile, p * sizeof(float));
  _tile_stored(2, sums + kTile * p, p * sizeof(float));
  _tile_stored(3, sums + kTile * p + kTile, p * sizeof(float));

  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t width = i + reach + 1 < cols ? i + reach + 1 : cols;
    float* row = c + i * stride;
    if (width == p) {
      for (std::int64_t j = 0; j < p; j += kTile) {
        Floats sum = *reinterpret_cast<const Floats*>(sums + i * p + j);
        if (carry != nullptr) sum += *reinterpret_cast<const LooseFloats*>(carry + i * p + j);
        LooseFloats* target = reinterpret_cast<LooseFloats*>(row + j);  // auto would lose the alignment
        *target = *target + alpha * sum;
      }
    } else {
      for (std::int64_t j = 0; j < width; ++j) {
        row[j] += alpha * (sums[i * p + j] + (carry != nullptr ? carry[i * p + j] : 0.0f));
      }
    }
  }
}

#undef HPA_INLINE

}  // namespace
}  // namespace amx

const Product<std::uint32_t, float> amx_pairs = {
    amx::kPairPanel, amx::kDepth,   amx::kPairRound, amx::kBlock, {nullptr, nullptr, amx::pack_pairs, nullptr},
    amx::turn,       amx::multiply, amx::open,       amx::close,
};

}  // namespace hpa::isa
