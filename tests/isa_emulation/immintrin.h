// Stands for the compiler's <immintrin.h> when csrc/cpu/isa/avx512bf16.cpp and amx.cpp are built for a CPU that has
// neither instruction set: the few intrinsics they use, as Intel's manual (volume 2) describes them, in plain C++.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64)));
typedef std::uint16_t __m512bh __attribute__((vector_size(64)));

namespace emulated {

// Numbers below 2^-126 are zero, as operands and as results.
inline float flushed(float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }

inline float widened(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return flushed(value);
}

inline float add_product(float sum, std::uint16_t a, std::uint16_t b) {
  return flushed(std::fma(widened(a), widened(b), flushed(sum)));
}

struct Tile {
  alignas(64) std::uint8_t bytes[16][64];
};

struct State {
  bool configured = false;
  std::uint16_t row_bytes[8] = {};
  std::uint8_t rows[8] = {};
  Tile tiles[8];
};

inline thread_local State state;

[[noreturn]] inline void fault() { std::abort(); }  // where the instruction would raise #UD or #GP

inline Tile& tile(int index) {
  if (!state.configured || index > 7 || state.rows[index] == 0) fault();
  return state.tiles[index];
}

inline void load_config(const void* memory) {
  const auto* config = static_cast<const std::uint8_t*>(memory);
  if (config[0] != 1) fault();
  for (int i = 1; i < 16; ++i) {
    if (config[i] != 0) fault();
  }
  state.configured = true;
  for (int t = 0; t < 8; ++t) {
    std::memcpy(&state.row_bytes[t], config + 16 + 2 * t, 2);
    state.rows[t] = config[48 + t];
    if (state.row_bytes[t] > 64 || state.rows[t] > 16) fault();
    std::memset(&state.tiles[t], 0, sizeof(Tile));
  }
}

inline void release() {
  state.configured = false;
  std::memset(state.tiles, 0xff, sizeof state.tiles);  // nothing may be read from them any more
}

inline void zero(int index) { std::memset(&tile(index), 0, sizeof(Tile)); }

inline void load(int index, const void* base, std::int64_t stride) {
  Tile& target = tile(index);
  std::memset(&target, 0, sizeof(Tile));
  for (int row = 0; row < state.rows[index]; ++row) {
    std::memcpy(target.bytes[row], static_cast<const char*>(base) + row * stride, state.row_bytes[index]);
  }
}

inline void store(int index, void* base, std::int64_t stride) {
  const Tile& source = tile(index);
  for (int row = 0; row < state.rows[index]; ++row) {
    std::memcpy(static_cast<char*>(base) + row * stride, source.bytes[row], state.row_bytes[index]);
  }
}

// Even and odd values of a pair are summed apart, then both are added.
inline void multiply(int sums, int left, int right) {
  Tile &c = tile(sums), &a = tile(left), &b = tile(right);
  const int pairs = state.row_bytes[left] / 4, columns = state.row_bytes[sums] / 4;
  if (state.rows[right] != pairs || state.rows[left] != state.rows[sums]) fault();
  for (int row = 0; row < state.rows[sums]; ++row) {
    std::uint16_t x[32], y[2];
    float total[16];
    std::memcpy(x, a.bytes[row], 64);
    std::memcpy(total, c.bytes[row], 64);
    for (int column = 0; column < columns; ++column) {
      float even = 0, odd = 0;
      for (int pair = 0; pair < pairs; ++pair) {
        std::memcpy(y, b.bytes[pair] + 4 * column, 4);
        even = add_product(even, x[2 * pair], y[0]);
        odd = add_product(odd, x[2 * pair + 1], y[1]);
      }
      total[column] = flushed(flushed(total[column]) + flushed(even + odd));
    }
    std::memcpy(c.bytes[row], total, 64);
  }
}

}  // namespace emulated

inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  for (int i = 0; i < 16; ++i) {
    sum[i] = emulated::add_product(sum[i], a[2 * i + 1], b[2 * i + 1]);
    sum[i] = emulated::add_product(sum[i], a[2 * i], b[2 * i]);
  }
  return sum;
}

#define _tile_loadconfig(memory) emulated::load_config(memory)
#define _tile_release() emulated::release()
#define _tile_zero(tile) emulated::zero(tile)
#define _tile_loadd(tile, base, stride) emulated::load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated::store(tile, base, stride)
#define _tile_dpbf16ps(sums, left, right) emulated::multiply(sums, left, right)
