// Rows of a matrix as they are stored times one vector of T: dot products and linear combinations (project_).  Part of
// kernels.inl, which says how.
//
// A step takes two registers of elements of each row.  Rows of 16 bits are read as 32-bit words: the lower halves of a
// register of words are its elements 0, 2, 4, ..., the upper halves 1, 3, 5, ..., and one shift or mask widens each half
// where a widening load takes a shuffle an element.  The vector's two registers are put in that order once for all rows.

// ---- Two registers of a row ----

template <class Bits, class T>
struct PairOrdering;

// Elements of the arithmetic's own type.
template <class T>
struct PairOrdering<T, T> {
  static HPA_INLINE void arrange(V<T>&, V<T>&) {}
  static HPA_INLINE void restore(V<T>&, V<T>&) {}
};

#ifdef __clang__
#define HPA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef std::int32_t PairOrder __attribute__((vector_size(HPA_VECTOR_BYTES)));
#define HPA_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, PairOrder{__VA_ARGS__})
#endif

template <int... Lane>
struct PairLanes {
  static constexpr int w = sizeof...(Lane);
  static HPA_INLINE void arrange(V<float>& first, V<float>& second) {
    const V<float> even = HPA_SHUFFLE(first, second, (2 * Lane)...);
    second = HPA_SHUFFLE(first, second, (2 * Lane + 1)...);
    first = even;
  }
  static HPA_INLINE void restore(V<float>& even, V<float>& odd) {
    const V<float> first = HPA_SHUFFLE(even, odd, (Lane / 2 + Lane % 2 * w)...);
    odd = HPA_SHUFFLE(even, odd, (w / 2 + Lane / 2 + Lane % 2 * w)...);
    even = first;
  }
};
#undef HPA_SHUFFLE

template <int Count, int... Lane>
struct CountPairLanes : CountPairLanes<Count - 1, Count - 1, Lane...> {};
template <int... Lane>
struct CountPairLanes<0, Lane...> {
  using type = PairLanes<Lane...>;
};

// Elements of 16 bits, even ones and odd ones.
template <>
struct PairOrdering<std::uint16_t, float> : CountPairLanes<Vector<float>::width>::type {};

typedef std::uint32_t PairWords __attribute__((vector_size(HPA_VECTOR_BYTES)));
typedef std::uint32_t LoosePairWords __attribute__((vector_size(HPA_VECTOR_BYTES), aligned(2), may_alias));

HPA_INLINE PairWords pair_words(std::uint32_t value) { return value - PairWords{}; }
HPA_INLINE V<float> as_floats(PairWords bits) { return __builtin_bit_cast(V<float>, bits); }

// F16::widen for each word.
HPA_INLINE V<float> widen_f16_words(PairWords half) {
  const PairWords magnitude = (half & pair_words(0x7fffu)) << 13;
  const PairWords exponent = magnitude & pair_words(0x0f800000u);
  const PairWords normal = magnitude + pair_words(112u << 23);
  const PairWords subnormal =
      __builtin_bit_cast(PairWords, as_floats(normal + pair_words(1u << 23)) - spread(0x1p-14f));
  PairWords bits = exponent == pair_words(0u) ? subnormal : normal;
  bits = exponent == pair_words(0x0f800000u) ? normal + pair_words(112u << 23) : bits;
  return as_floats(bits | (half & pair_words(0x8000u)) << 16);
}

template <class Format, class T>
HPA_INLINE void read_pair(const typename Format::Bits* from, V<T>& first, V<T>& second) {
  if constexpr (sizeof(typename Format::Bits) == sizeof(T)) {
    first = read(from);
    second = read(from + Vector<T>::width);
  } else {
    const PairWords pairs = *reinterpret_cast<const LoosePairWords*>(from);
    if constexpr (__is_same(Format, Bf16)) {
      first = as_floats(pairs << 16);
      second = as_floats(pairs & pair_words(0xffff0000u));
    } else {
      first = widen_f16_words(pairs & pair_words(0xffffu));
      second = widen_f16_words(pairs >> 16);
    }
  }
}

// Asks for what comes later in a row of 16-bit elements, which are used up faster than the prefetchers of a core with
// AVX-512 bring eight rows: worth a sixth there.  Rows of float32 keep them busy anyway.
template <class Bits>
HPA_INLINE void fetch_pair(const Bits* row) {
  if constexpr (HPA_VECTOR_BYTES == 64 && sizeof(Bits) == 2) fetch_ahead(row, kFetchBytes);
}

// Whether rows of that format can be read without a conversion beforehand.
template <class Format, class T>
constexpr bool kReadable =
    sizeof(typename Format::Bits) == sizeof(T) || (sizeof(typename Format::Bits) == 2 && sizeof(T) == 4);

// ---- Dot products ----

template <class Format, class T, int Rows>
HPA_INLINE void add_dots_of(const typename Format::Bits* const* rows, const T* x, std::int64_t count, double* sums) {
  constexpr std::int64_t w = Vector<T>::width;
  constexpr int kChains = Rows > 4 ? 1 : Rows > 1 ? 2 : 4;  // sums a row: enough that none waits for the one before
  constexpr int kPairs = Rows > 1 ? 1 : 2;
  V<T> sum[Rows][kChains] = {};
  std::int64_t i = 0;
  for (; i + 2 * kPairs * w <= count; i += 2 * kPairs * w) {
#pragma GCC unroll 2
    for (int pair = 0; pair < kPairs; ++pair) {
      const std::int64_t at = i + 2 * pair * w;
      V<T> x0 = read(x + at), x1 = read(x + at + w);
      PairOrdering<typename Format::Bits, T>::arrange(x0, x1);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        V<T> first, second;
        fetch_pair(rows[r] + at);
        read_pair<Format, T>(rows[r] + at, first, second);
        sum[r][2 * pair % kChains] += first * x0;
        sum[r][(2 * pair + 1) % kChains] += second * x1;
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    V<T> total = sum[r][0];
    for (int chain = 1; chain < kChains; ++chain) total += sum[r][chain];
    double tail = 0;
    for (std::int64_t j = i; j < count; ++j) {
      tail += static_cast<double>(Format::widen(rows[r][j])) * static_cast<double>(x[j]);
    }
    sums[r] += lanes_sum(total) + tail;
  }
}

template <class Format, class T>
void add_dots(const void* const* rows, std::int64_t number, const T* x, std::int64_t count, double* sums) {
  using Bits = typename Format::Bits;
  const Bits* from[kRows];
  for (std::int64_t r = 0; r < number; ++r) from[r] = static_cast<const Bits*>(rows[r]);
  std::int64_t r = 0;
  if (number == kRows) {
    add_dots_of<Format, T, kRows>(from, x, count, sums);
    return;
  }
  for (; r + 4 <= number; r += 4) add_dots_of<Format, T, 4>(from + r, x, count, sums + r);
  for (; r < number; ++r) add_dots_of<Format, T, 1>(from + r, x, count, sums + r);
}

template <class Format, class T>
constexpr typename Kernels<T>::AddDots choose_add_dots() {
  if constexpr (kReadable<Format, T>) {
    return add_dots<Format, T>;
  } else {
    return nullptr;
  }
}

// ---- Linear combinations ----

template <class Format, class T, int Rows>
HPA_INLINE void subtract_rows_of(const typename Format::Bits* const* rows, const T* factors, std::int64_t count, T* y) {
  constexpr std::int64_t w = Vector<T>::width;
  std::int64_t i = 0;
  for (; i + 2 * w <= count; i += 2 * w) {
    V<T> sum0{}, sum1{};
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      V<T> first, second;
      fetch_pair(rows[r] + i);
      read_pair<Format, T>(rows[r] + i, first, second);
      sum0 += spread(factors[r]) * first;
      sum1 += spread(factors[r]) * second;
    }
    PairOrdering<typename Format::Bits, T>::restore(sum0, sum1);
    write(y + i, read(y + i) - sum0);
    write(y + i + w, read(y + i + w) - sum1);
  }
  for (; i < count; ++i) {
    T sum = 0;
    for (int r = 0; r < Rows; ++r) sum += factors[r] * static_cast<T>(Format::widen(rows[r][i]));
    y[i] -= sum;
  }
}

template <class Format, class T>
void subtract_rows(const void* const* rows, std::int64_t number, const T* factors, std::int64_t count, T* y) {
  using Bits = typename Format::Bits;
  const Bits* from[kRows];
  T factor[kRows];
  for (std::int64_t r = 0; r < number; ++r) {
    from[r] = static_cast<const Bits*>(rows[r]);
    factor[r] = factors[r];
  }
  std::int64_t r = 0;
  if (number == kRows) {
    subtract_rows_of<Format, T, kRows>(from, factor, count, y);
    return;
  }
  for (; r + 4 <= number; r += 4) subtract_rows_of<Format, T, 4>(from + r, factor + r, count, y);
  for (; r < number; ++r) subtract_rows_of<Format, T, 1>(from + r, factor + r, count, y);
}

template <class Format, class T>
constexpr typename Kernels<T>::SubtractRows choose_subtract_rows() {
  if constexpr (kReadable<Format, T>) {
    return subtract_rows<Format, T>;
  } else {
    return nullptr;
  }
}
