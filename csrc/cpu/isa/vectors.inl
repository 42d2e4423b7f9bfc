// Vectors, dot products and linear combinations of long vectors (project_, orthonormalize_, the factorisation of a
// diagonal block).  Part of kernels.inl, which says how.

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

// ---- Registers from storage ----

typedef std::uint16_t Halves __attribute__((vector_size(HPA_VECTOR_BYTES / 2)));
typedef std::uint32_t Words __attribute__((vector_size(HPA_VECTOR_BYTES)));

HPA_INLINE V<float> from_words(Words bits) { return __builtin_bit_cast(V<float>, bits); }

// Of the AVX-512 intrinsics the ones with a mask: GCC warns of the undefined register inside the others.
template <class Format>
HPA_INLINE V<float> widen_halves(Halves bits);

template <>
HPA_INLINE V<float> widen_halves<Bf16>(Halves bits) {
// GCC 12 converts vectors of 16-bit integers by halves.
#if HPA_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const Words words = __builtin_bit_cast(Words, _mm512_maskz_cvtepu16_epi32(0xffff, __builtin_bit_cast(__m256i, bits)));
#elif HPA_VECTOR_BYTES == 32 && defined(__AVX2__)
  const Words words = __builtin_bit_cast(Words, _mm256_cvtepu16_epi32(__builtin_bit_cast(__m128i, bits)));
#else
  const Words words = __builtin_convertvector(bits, Words);
#endif
  return from_words(words << 16);
}

template <>
HPA_INLINE V<float> widen_halves<F16>(Halves bits) {
#if HPA_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, __builtin_bit_cast(__m256i, bits));
#elif HPA_VECTOR_BYTES == 32 && defined(__F16C__)
  return _mm256_cvtph_ps(__builtin_bit_cast(__m128i, bits));
#else
  V<float> value;
  for (std::int64_t i = 0; i < Vector<float>::width; ++i) value[i] = F16::widen(bits[i]);
  return value;
#endif
}

HPA_INLINE void widen_floats(V<float> value, V<double> wide[2]) {
#if HPA_VECTOR_BYTES == 64 && defined(__AVX512F__)
  wide[0] = _mm512_maskz_cvtps_pd(0xff, __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7));
  wide[1] = _mm512_maskz_cvtps_pd(0xff, __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15));
#elif HPA_VECTOR_BYTES == 32 && defined(__AVX2__)
  wide[0] = _mm256_cvtps_pd(__builtin_shufflevector(value, value, 0, 1, 2, 3));
  wide[1] = _mm256_cvtps_pd(__builtin_shufflevector(value, value, 4, 5, 6, 7));
#else
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < Vector<double>::width; ++i) {
      wide[half][i] = static_cast<double>(value[Vector<double>::width * half + i]);
    }
  }
#endif
}

template <class Format>
HPA_INLINE Halves narrow_floats(V<float> value);

template <>
HPA_INLINE Halves narrow_floats<Bf16>(V<float> value) {
  const Words bits = __builtin_bit_cast(Words, value);
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Words halves = (value != value ? bits | 0x400000u : rounded) >> 16;
#if HPA_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return __builtin_bit_cast(Halves, _mm512_maskz_cvtepi32_epi16(0xffff, __builtin_bit_cast(__m512i, halves)));
#elif HPA_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m256i words = __builtin_bit_cast(__m256i, halves);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  return __builtin_bit_cast(Halves, _mm256_castsi256_si128(packed));
#else
  return __builtin_convertvector(halves, Halves);
#endif
}

template <>
HPA_INLINE Halves narrow_floats<F16>(V<float> value) {
#if HPA_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return __builtin_bit_cast(Halves, _mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT));
#elif HPA_VECTOR_BYTES == 32 && defined(__F16C__)
  return __builtin_bit_cast(Halves, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
  Halves bits;
  for (std::int64_t i = 0; i < Vector<float>::width; ++i) bits[i] = F16::narrow(value[i]);
  return bits;
#endif
}

// Stored elements as bits, as many as a register of T has lanes.
template <std::size_t kBytes>
struct Unsigned;
template <>
struct Unsigned<2> {
  using type = std::uint16_t;
};
template <>
struct Unsigned<4> {
  using type = std::uint32_t;
};
template <>
struct Unsigned<8> {
  using type = std::uint64_t;
};

template <class Format, class T>
struct Stored {
  using Word = typename Unsigned<sizeof(typename Format::Bits)>::type;
  typedef Word type __attribute__((vector_size(sizeof(Word) * Vector<T>::width)));
  typedef Word loose __attribute__((vector_size(sizeof(Word) * Vector<T>::width), aligned(sizeof(Word)), may_alias));

  static HPA_INLINE type read(const void* from) { return *static_cast<const loose*>(from); }
  static HPA_INLINE void write(void* to, type bits) { *static_cast<loose*>(to) = bits; }
  static HPA_INLINE V<T> widen(type bits) {
    if constexpr (sizeof(Word) == sizeof(T)) {
      return __builtin_bit_cast(V<T>, bits);
    } else {
      return widen_halves<Format>(bits);
    }
  }
  static HPA_INLINE type narrow(V<T> value) {
    if constexpr (sizeof(Word) == sizeof(T)) {
      return __builtin_bit_cast(type, value);
    } else {
      return narrow_floats<Format>(value);
    }
  }
};

// A register of T from as many stored elements.
template <class Format, class T>
HPA_INLINE V<T> read_wide(const typename Format::Bits* from) {
  return Stored<Format, T>::widen(Stored<Format, T>::read(from));
}

// `value - 0` is `value`, so the compiler leaves the subtraction out; `0 + value` it would have to compute, for -0.
template <class T>
HPA_INLINE V<T> spread(T value) {
  return value - V<T>{};
}

// How far ahead of its use a row is asked for: 4 lines, which is worth a tenth on Zen 3 and loses as much again at 16; 8
// with AVX-512, which is worth a tenth more than 4 on Intel's.
constexpr std::int64_t kFetchBytes = HPA_VECTOR_BYTES == 64 ? 512 : 256;

HPA_INLINE void fetch_ahead(const void* row, std::int64_t bytes) {
  // Added to a number: the place may lie beyond the array.
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(row) + static_cast<std::uintptr_t>(bytes)));
}

// Instead of memcpy, which the compiler would call and which copies by "rep movsb" where that is slower.
template <class T>
HPA_INLINE void copy_run(const T* from, std::int64_t count, T* to) {
  constexpr std::int64_t w = Vector<T>::width;
  std::int64_t i = 0;
  for (; i + 4 * w <= count; i += 4 * w) {
    for (std::int64_t k = 0; k < 4 * w; k += w) {
      fetch_ahead(from + i + k, kFetchBytes);
      write(to + i + k, read(from + i + k));
    }
  }
  for (; i < count; ++i) to[i] = from[i];
}

// Lanes in double, added in a tree.
HPA_INLINE double lanes_sum(V<double> value) {
#if HPA_VECTOR_BYTES == 64
  const auto halves =
      __builtin_shufflevector(value, value, 0, 1, 2, 3) + __builtin_shufflevector(value, value, 4, 5, 6, 7);
#else
  const auto halves = value;
#endif
#if HPA_VECTOR_BYTES >= 32
  const auto quarters = __builtin_shufflevector(halves, halves, 0, 1) + __builtin_shufflevector(halves, halves, 2, 3);
#else
  const auto quarters = halves;
#endif
  return quarters[0] + quarters[1];
}
HPA_INLINE double lanes_sum(V<float> value) {
  V<double> wide[2];
  widen_floats(value, wide);
  return lanes_sum(wide[0] + wide[1]);
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
  return lanes_sum((sum0 + sum1) + (sum2 + sum3)) + tail;
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
    out[r] = lanes_sum(sum[r][0] + sum[r][1]) + tail;
  }
}

template <class T>
void scale(double factor, std::int64_t count, T* x) {
  for (std::int64_t i = 0; i < count; ++i) x[i] = static_cast<T>(factor * static_cast<double>(x[i]));
}
