// Storage formats, and conversion of runs of elements.  Part of kernels.inl, which says how.

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

template <class T>
HPA_INLINE void copy_run(const T* from, std::int64_t count, T* to);  // vectors.inl

template <class Format, class T>
void load(const void* source, std::int64_t stride, std::int64_t count, T* __restrict target) {
  const auto* __restrict from = static_cast<const typename Format::Bits*>(source);
  if (stride == 1) {
    if constexpr (__is_same(typename Format::Bits, T)) return copy_run(from, count, target);
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
    if constexpr (__is_same(typename Format::Bits, T)) return copy_run(source, count, to);
    for (std::int64_t i = 0; i < count; ++i) to[i] = narrow<Format>(source[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) to[i * stride] = narrow<Format>(source[i]);
  }
}
