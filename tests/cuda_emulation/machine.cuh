// csrc/cuda/machine.cuh for the host: the same names, found first on the include path.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define HPA_SHARED(type, name, size)                \
  auto& name = *static_cast<type(*)[size]>(         \
      ::emulation::shared_memory(__COUNTER__, sizeof(type) * static_cast<std::size_t>(size)))

#if defined(HPA_EMULATION_COUNTING)
extern "C" void hpa_counting_read(const void* address, std::size_t bytes);  // what happens in emulation.cpp
#endif

namespace hpa::cuda {

inline float half_to_float(std::uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
inline std::uint16_t float_to_half(float value) { return std::bit_cast<std::uint16_t>(static_cast<_Float16>(value)); }

inline float bfloat16_to_float(std::uint16_t bits) { return __uint_as_float(static_cast<std::uint32_t>(bits) << 16); }
inline std::uint16_t float_to_bfloat16(float value) {
  const std::uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

// The address is that of global memory, aligned to what is stored.
template <class T>
void store_whole(void* to, T value) {
  emulation::check_aligned(to, sizeof(T));
  *static_cast<T*>(to) = value;
}

// A copy happens as late as it may: when its thread waits for it.
inline void copy_async(void* shared, const void* global, int valid) {
#if defined(HPA_EMULATION_COUNTING)
  hpa_counting_read(global, static_cast<std::size_t>(valid));
#endif
  emulation::copy_later(shared, global, valid);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int Pending>
void wait_copies() { emulation::finish_copies(Pending); }

inline void load_matrices_transposed(std::uint32_t (&out)[4], const void* row) {
  const std::uint64_t* rows = emulation::exchange(0xffffffffu, 5, reinterpret_cast<std::uint64_t>(row));
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto element = [&](int r) {
      return std::uint32_t{reinterpret_cast<const std::uint16_t*>(rows[8 * matrix + r])[lane / 4]};
    };
    out[matrix] = element(2 * (lane % 4)) | element(2 * (lane % 4) + 1) << 16;
  }
}

// Lanes hold a, b and the sum as mma.m16n8k16 lays them out.
template <bool Bfloat16>
void multiply_add(float (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  std::uint64_t words[3][32];
  const std::uint64_t mine[3] = {a[0] | std::uint64_t{a[1]} << 32, a[2] | std::uint64_t{a[3]} << 32,
                                 b0 | std::uint64_t{b1} << 32};
  for (int i = 0; i < 3; ++i) {
    std::memcpy(words[i], emulation::exchange(0xffffffffu, 6, mine[i]), sizeof(words[i]));
  }
  const auto half_of = [](std::uint64_t bits, int at) {
    const auto part = static_cast<std::uint16_t>(bits >> (16 * at));
    return Bfloat16 ? bfloat16_to_float(part) : half_to_float(part);
  };
  const int lane = static_cast<int>(threadIdx.x % 32), group = lane / 4, member = lane % 4;
  for (int c = 0; c < 4; ++c) {
    const int row = group + 8 * (c / 2), col = 2 * member + c % 2;
    float total = sum[c];
    for (int k = 0; k < 16; ++k) {
      // a: register (row >= 8) + 2 (k >= 8), lane 4 (row % 8) + k % 8 / 2, half k % 2.  b: register k >= 8.
      const float left = half_of(words[k / 8][4 * (row % 8) + k % 8 / 2], 2 * (row / 8) + k % 2);
      const float right = half_of(words[2][4 * col + k % 8 / 2], 2 * (k / 8) + k % 2);
      total += left * right;
    }
    sum[c] = total;
  }
}

}  // namespace hpa::cuda
