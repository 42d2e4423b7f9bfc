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

#include "isa.h"

namespace hpa::isa {
namespace HPA_ISA_NAMESPACE {
namespace {

#define HPA_INLINE inline __attribute__((always_inline))

// ---- Storage formats: an element as it is stored (`Bits`), widened to float and rounded back ----
// Branch-free integer arithmetic, which the compiler turns into vector code on every instruction set.

HPA_INLINE float from_bits(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }
HPA_INLINE std::uint32_t to_bits(float value) { return __builtin_bit_cast(std::uint32_t, value); }

struct F32 {
  using Bits = float;
  static HPA_INLINE float widen(float value) { return value; }
  static HPA_INLINE float narrow(float value) { return value; }
  static HPA_INLINE float narrow(double value) { return static_cast<float>(value); }
};

struct F64 {
  using Bits = double;
  static HPA_INLINE double widen(double value) { return value; }
  static HPA_INLINE double narrow(double value) { return value; }
};

struct Bf16 {
  using Bits = std::uint16_t;
  static HPA_INLINE float widen(std::uint16_t bits) { return from_bits(static_cast<std::uint32_t>(bits) << 16); }
  static HPA_INLINE std::uint16_t narrow(float value) {
    const std::uint32_t bits = to_bits(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t quiet = (bits >> 16) | 0x40u;
    return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  }
};

struct F16 {
  using Bits = std::uint16_t;
  static HPA_INLINE float widen(std::uint16_t half) {
    constexpr std::uint32_t kRebias = 112u << 23;  // exponent bias 127 - 15
    const std::uint32_t magnitude = static_cast<std::uint32_t>(half & 0x7fffu) << 13;
    const std::uint32_t exponent = magnitude & 0x0f800000u;
    const std::uint32_t normal = magnitude + kRebias;
    // A subnormal is 2^-14 times its fraction: given an implicit one, which is subtracted again.
    const std::uint32_t subnormal = to_bits(from_bits(normal + (1u << 23)) - 0x1p-14f);
    std::uint32_t bits = exponent == 0 ? subnormal : normal;
    bits = exponent == 0x0f800000u ? normal + kRebias : bits;  // Inf, NaN
    return from_bits(bits | static_cast<std::uint32_t>(half & 0x8000u) << 16);
  }
  static HPA_INLINE std::uint16_t narrow(float value) {
    const std::uint32_t bits = to_bits(value);
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN, Inf
    constexpr std::uint32_t kMagic = 126u << 23;  // one ulp of 0.5 is the smallest subnormal of float16
    const std::uint32_t subnormal = to_bits(from_bits(magnitude) + from_bits(kMagic)) - kMagic;
    const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    std::uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= (143u << 23) ? special : half;
    return static_cast<std::uint16_t>(half | (bits & 0x80000000u) >> 16);
  }
};

template <class Format, class T>
void load(const void* source, std::int64_t stride, std::int64_t count, T* __restrict target) {
  const auto* __restrict from = static_cast<const typename Format::Bits*>(source);
  if (stride == 1) {
    for (std::int64_t i = 0; i < count; ++i) target[i] = static_cast<T>(Format::widen(from[i]));
  } else {
    for (std::int64_t i = 0; i < count; ++i) target[i] = static_cast<T>(Format::widen(from[i * stride]));
  }
}

// Doubles pass through float on their way to a 16-bit format.
template <class Format, class T>
HPA_INLINE typename Format::Bits narrow(T value) {
  if constexpr (sizeof(typename Format::Bits) == 2) {
    return Format::narrow(static_cast<float>(value));
  } else {
    return Format::narrow(value);
  }
}

template <class Format, class T>
void store(const T* __restrict source, std::int64_t count, void* target, std::int64_t stride) {
  auto* __restrict to = static_cast<typename Format::Bits*>(target);
  if (stride == 1) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = narrow<Format>(source[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) to[i * stride] = narrow<Format>(source[i]);
  }
}

// ---- Vectors ----

template <class T>
struct Vector {
  static constexpr std::int64_t width = HPA_VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(HPA_VECTOR_BYTES)));
  typedef T loose __attribute__((vector_size(HPA_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};
template <class T>
using V = typename Vector<T>::type;

template <class T>
HPA_INLINE V<T> read(const T* from) {
  return *reinterpret_cast<const typename Vector<T>::loose*>(from);
}
template <class T>
HPA_INLINE void write(T* to, V<T> value) {
  *reinterpret_cast<typename Vector<T>::loose*>(to) = value;
}
template <class T>
HPA_INLINE V<T> spread(T value) {
  return V<T>{} + value;
}
template <class T>
HPA_INLINE double lanes_sum(V<T> value) {
  double sum = 0;
  for (std::int64_t i = 0; i < Vector<T>::width; ++i) sum += static_cast<double>(value[i]);
  return sum;
}

template <class T>
double dot(const T* a, const T* b, std::int64_t count) {
  constexpr std::int64_t w = Vector<T>::width;
  V<T> sum0{}, sum1{}, sum2{}, sum3{};
  std::int64_t i = 0;
  for (; i + 4 * w <= count; i += 4 * w) {
    sum0 += read(a + i) * read(b + i);
    sum1 += read(a + i + w) * read(b + i + w);
    sum2 += read(a + i + 2 * w) * read(b + i + 2 * w);
    sum3 += read(a + i + 3 * w) * read(b + i + 3 * w);
  }
  for (; i + w <= count; i += w) sum0 += read(a + i) * read(b + i);
  double tail = 0;
  for (; i < count; ++i) tail += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return lanes_sum<T>((sum0 + sum1) + (sum2 + sum3)) + tail;
}

template <class T>
void dot4(const T* const a[4], const T* b, std::int64_t count, double out[4]) {
  constexpr std::int64_t w = Vector<T>::width;
  V<T> sum[4][2] = {};
  std::int64_t i = 0;
  for (; i + 2 * w <= count; i += 2 * w) {
    const V<T> b0 = read(b + i);
    const V<T> b1 = read(b + i + w);
    for (int r = 0; r < 4; ++r) {
      sum[r][0] += read(a[r] + i) * b0;
      sum[r][1] += read(a[r] + i + w) * b1;
    }
  }
  for (int r = 0; r < 4; ++r) {
    double tail = 0;
    for (std::int64_t j = i; j < count; ++j) tail += static_cast<double>(a[r][j]) * static_cast<double>(b[j]);
    out[r] = lanes_sum<T>(sum[r][0] + sum[r][1]) + tail;
  }
}

template <class T>
void subtract4(const T factor[4], const T* const x[4], std::int64_t count, T* y) {
  constexpr std::int64_t w = Vector<T>::width;
  const T f0 = factor[0], f1 = factor[1], f2 = factor[2], f3 = factor[3];
  const T *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
  std::int64_t i = 0;
  for (; i + w <= count; i += w) {
    const V<T> one = spread(f0) * read(x0 + i) + spread(f1) * read(x1 + i);
    const V<T> two = spread(f2) * read(x2 + i) + spread(f3) * read(x3 + i);
    write(y + i, read(y + i) - (one + two));
  }
  for (; i < count; ++i) y[i] -= (f0 * x0[i] + f1 * x1[i]) + (f2 * x2[i] + f3 * x3[i]);
}

template <class T>
void scale(double factor, std::int64_t count, T* x) {
  for (std::int64_t i = 0; i < count; ++i) x[i] = static_cast<T>(factor * static_cast<double>(x[i]));
}

// ---- Streams ----

template <class T>
void add_squares(const T* __restrict g, std::int64_t count, T* __restrict total) {
  for (std::int64_t i = 0; i < count; ++i) total[i] += g[i] * g[i];
}

template <class T>
void add_abs_products(const T* __restrict g, const T* __restrict w, std::int64_t count, T* __restrict total) {
  for (std::int64_t i = 0; i < count; ++i) {
    const T product = w[i] * g[i];
    total[i] += product < 0 ? -product : product;
  }
}

template <class T>
double sum_of_squares(const T* x, std::int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum;
}

template <class T>
void change(const T* __restrict before, const T* __restrict after, std::int64_t count, T* __restrict column,
            double sums[3]) {
  double dot_sum = 0, before_sum = 0, change_sum = 0;
#pragma omp simd reduction(+ : dot_sum, before_sum, change_sum)
  for (std::int64_t i = 0; i < count; ++i) {
    const T difference = after[i] - before[i];
    column[i] += difference * difference;
    const double d = difference, b = before[i];  // products of two floats are exact in double
    dot_sum += d * b;
    before_sum += b * b;
    change_sum += d * d;
  }
  sums[0] += dot_sum;
  sums[1] += before_sum;
  sums[2] += change_sum;
}

// Kept elements are moved, never computed with, so that they stay the same bits.
template <class Format, class T>
void merge(void* after, const void* before, const std::uint8_t* __restrict mask, double projection,
           std::int64_t count) {
  using Bits = typename Format::Bits;
  auto* __restrict to = static_cast<Bits*>(after);
  const auto* __restrict old = static_cast<const Bits*>(before);
  if (projection == 0) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = mask[i] ? old[i] : to[i];
    return;
  }
  const T factor = static_cast<T>(projection);
  for (std::int64_t i = 0; i < count; ++i) {
    const Bits kept = old[i];
    const Bits changed = narrow<Format>(static_cast<T>(Format::widen(to[i]) - factor * Format::widen(kept)));
    to[i] = mask[i] ? kept : changed;
  }
}

// ---- Panels ----

constexpr int kAcross = HPA_TILE_VECTORS;
constexpr int kDown = HPA_TILE_ROWS;
template <class T>
constexpr std::int64_t kPanel = kAcross * Vector<T>::width;

// kDown rows of one panel times the whole of the other, summed over depth in registers.  Each element is one chain of
// multiply-adds in the order of depth: its value does not depend on where it stands in a tile.
template <class T>
HPA_INLINE void tile(std::int64_t depth, const T* a, const T* b, V<T> sum[kDown][kAcross]) {
  constexpr std::int64_t p = kPanel<T>;
  for (int i = 0; i < kDown; ++i)
    for (int v = 0; v < kAcross; ++v) sum[i][v] = V<T>{};
  for (std::int64_t d = 0; d < depth; ++d, a += p, b += p) {
    V<T> across[kAcross];
#pragma GCC unroll 8
    for (int v = 0; v < kAcross; ++v) across[v] = read(b + v * Vector<T>::width);
#pragma GCC unroll 16
    for (int i = 0; i < kDown; ++i) {
      const V<T> down = spread(a[i]);
#pragma GCC unroll 8
      for (int v = 0; v < kAcross; ++v) sum[i][v] += down * across[v];
    }
  }
}

template <class T>
void update(std::int64_t depth, const T* a, const T* b, T alpha, std::int64_t rows, std::int64_t cols,
            std::int64_t reach, T* c, std::int64_t stride) {
  constexpr std::int64_t p = kPanel<T>, w = Vector<T>::width;
  static_assert(p % kDown == 0);
  for (std::int64_t top = 0; top < rows; top += kDown) {
    V<T> sum[kDown][kAcross];
    tile<T>(depth, a + top, b, sum);
    if (top + kDown <= rows && cols == p && top + reach >= p - 1) {
#pragma GCC unroll 16
      for (int i = 0; i < kDown; ++i) {
        T* row = c + (top + i) * stride;
#pragma GCC unroll 8
        for (int v = 0; v < kAcross; ++v) write(row + v * w, read(row + v * w) + spread(alpha) * sum[i][v]);
      }
      continue;
    }
    alignas(64) T values[kDown * p];
    for (int i = 0; i < kDown; ++i)
      for (int v = 0; v < kAcross; ++v) write(values + i * p + v * w, sum[i][v]);
    for (std::int64_t i = 0; i < kDown && top + i < rows; ++i) {
      const std::int64_t last = top + i + reach;
      for (std::int64_t j = 0; j < cols && j <= last; ++j) c[(top + i) * stride + j] += alpha * values[i * p + j];
    }
  }
}

// Four rows of the factor at a time, so that the sums over earlier rows are independent chains.
template <class T>
void solve(std::int64_t depth, const T* factor, std::int64_t stride, T* lanes) {
  constexpr std::int64_t p = kPanel<T>, w = Vector<T>::width;
  constexpr int kRows = 4;
  std::int64_t top = 0;
  for (; top + kRows <= depth; top += kRows) {
    const T* l = factor + top * stride;
    V<T> sum[kRows][kAcross];
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kAcross; ++v) sum[i][v] = read(lanes + (top + i) * p + v * w);
    for (std::int64_t d = 0; d < top; ++d) {
      V<T> known[kAcross];
#pragma GCC unroll 8
      for (int v = 0; v < kAcross; ++v) known[v] = read(lanes + d * p + v * w);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const V<T> element = spread(l[i * stride + d]);
#pragma GCC unroll 8
        for (int v = 0; v < kAcross; ++v) sum[i][v] -= element * known[v];
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int k = 0; k < i; ++k) {
        const V<T> element = spread(l[i * stride + top + k]);
        for (int v = 0; v < kAcross; ++v) sum[i][v] -= element * sum[k][v];
      }
      const V<T> pivot = spread(l[i * stride + top + i]);
      for (int v = 0; v < kAcross; ++v) {
        sum[i][v] /= pivot;
        write(lanes + (top + i) * p + v * w, sum[i][v]);
      }
    }
  }
  for (; top < depth; ++top) {
    const T* l = factor + top * stride;
    for (int v = 0; v < kAcross; ++v) {
      V<T> sum = read(lanes + top * p + v * w);
      for (std::int64_t d = 0; d < top; ++d) sum -= spread(l[d]) * read(lanes + d * p + v * w);
      write(lanes + top * p + v * w, sum / spread(l[top]));
    }
  }
}

template <class T>
void add_lane_squares(std::int64_t depth, const T* __restrict lanes, double* __restrict sums) {
  for (std::int64_t d = 0; d < depth; ++d) {
    const T* __restrict row = lanes + d * kPanel<T>;
    for (std::int64_t j = 0; j < kPanel<T>; ++j) sums[j] += static_cast<double>(row[j]) * static_cast<double>(row[j]);
  }
}

template <class T>
constexpr Kernels<T> make_kernels() {
  return {
      {load<F32, T>, load<F64, T>, load<Bf16, T>, load<F16, T>},
      {store<F32, T>, store<F64, T>, store<Bf16, T>, store<F16, T>},
      dot<T>,
      dot4<T>,
      subtract4<T>,
      scale<T>,
      sum_of_squares<T>,
      add_squares<T>,
      add_abs_products<T>,
      change<T>,
      kPanel<T>,
      update<T>,
      solve<T>,
      add_lane_squares<T>,
  };
}

#undef HPA_INLINE

}  // namespace
}  // namespace HPA_ISA_NAMESPACE

const Table HPA_ISA_TABLE = {
    HPA_ISA_NAME,
    HPA_ISA_NAMESPACE::make_kernels<float>(),
    HPA_ISA_NAMESPACE::make_kernels<double>(),
    {HPA_ISA_NAMESPACE::merge<HPA_ISA_NAMESPACE::F32, float>, HPA_ISA_NAMESPACE::merge<HPA_ISA_NAMESPACE::F64, double>,
     HPA_ISA_NAMESPACE::merge<HPA_ISA_NAMESPACE::Bf16, float>, HPA_ISA_NAMESPACE::merge<HPA_ISA_NAMESPACE::F16, float>},
};

}  // namespace hpa::isa
