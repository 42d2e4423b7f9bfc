// Pairs of bfloat16 values: an entry of 32 bits holds two values that lie one after the other in the depth, the first in
// the low half, as the dot-product instructions of AVX512_BF16 and AMX take them.  Before including this file define
// kPairPanel, lanes of a panel, and kPairRound, the multiple to which depths are padded.

using Pair = std::uint32_t;

constexpr std::int64_t round_entries(std::int64_t values) {
  return ((values + 1) / 2 + kPairRound - 1) / kPairRound * kPairRound;
}

inline void pack_pairs(const void* source, std::int64_t lane_stride, std::int64_t depth_stride, std::int64_t lanes,
                       std::int64_t depth, Pair* __restrict right, std::int64_t pitch) {
  constexpr std::int64_t p = kPairPanel;
  const auto* __restrict from = static_cast<const std::uint16_t*>(source);
  const std::int64_t entries = round_entries(depth), even = depth / 2, whole = lane_stride == 1 ? lanes / p : 0;
  // Depth outside, so that rows of the source are read in long runs.
  for (std::int64_t d = 0; d < even && whole > 0; ++d) {
    const std::uint16_t* __restrict low = from + 2 * d * depth_stride;
    const std::uint16_t* __restrict high = low + depth_stride;
    for (std::int64_t k = 0; k < whole; ++k) {
      Pair* __restrict to = right + k * pitch + d * p;
      for (std::int64_t i = 0; i < p; ++i) {
        to[i] = static_cast<Pair>(low[k * p + i]) | static_cast<Pair>(high[k * p + i]) << 16;
      }
    }
  }
  for (std::int64_t lane = 0; lane % p != 0 || lane < lanes; ++lane) {
    Pair* __restrict to = right + lane / p * pitch + lane % p;
    const std::uint16_t* __restrict column = from + lane * lane_stride;
    for (std::int64_t d = lane < whole * p ? even : 0; d < entries; ++d) {
      const bool first = lane < lanes && 2 * d < depth, second = lane < lanes && 2 * d + 1 < depth;
      const Pair low = first ? column[2 * d * depth_stride] : 0u;
      const Pair high = second ? column[(2 * d + 1) * depth_stride] : 0u;
      to[d * p] = low | high << 16;
    }
  }
}
