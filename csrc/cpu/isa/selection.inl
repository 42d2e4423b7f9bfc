// Choosing columns by their scores (balanced_mask).  Part of kernels.inl, which says how.

// ---- Moving what is wanted to the front ----

#ifdef __AVX2__
// For each set of four doubles its members' halves first, in their order.
alignas(32) constexpr std::int32_t kMembers[16][8] = {
    {0, 1, 2, 3, 4, 5, 6, 7}, {0, 1, 2, 3, 4, 5, 6, 7}, {2, 3, 0, 1, 4, 5, 6, 7}, {0, 1, 2, 3, 4, 5, 6, 7},
    {4, 5, 0, 1, 2, 3, 6, 7}, {0, 1, 4, 5, 2, 3, 6, 7}, {2, 3, 4, 5, 0, 1, 6, 7}, {0, 1, 2, 3, 4, 5, 6, 7},
    {6, 7, 0, 1, 2, 3, 4, 5}, {0, 1, 6, 7, 2, 3, 4, 5}, {2, 3, 6, 7, 0, 1, 4, 5}, {0, 1, 2, 3, 6, 7, 4, 5},
    {4, 5, 6, 7, 0, 1, 2, 3}, {0, 1, 4, 5, 6, 7, 2, 3}, {2, 3, 4, 5, 6, 7, 0, 1}, {0, 1, 2, 3, 4, 5, 6, 7}};

// For each set of four its members as bytes of 1.
constexpr std::uint32_t kMarks[16] = {0x00000000, 0x00000001, 0x00000100, 0x00000101, 0x00010000, 0x00010001,
                                      0x00010100, 0x00010101, 0x01000000, 0x01000001, 0x01000100, 0x01000101,
                                      0x01010000, 0x01010001, 0x01010100, 0x01010101};

// Writes four doubles, of which the first are the members; returns their number.  As many are read before, so that no
// array needs room beyond its end.
[[maybe_unused]] HPA_INLINE std::int64_t write_members(double* to, __m256d values, int members) {
  const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kMembers[members]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(_mm256_castpd_si256(values), order));
  return __builtin_popcount(static_cast<unsigned>(members));
}
#endif

#if HPA_VECTOR_BYTES == 64 && defined(__AVX512F__)
// Likewise eight, by a bit each.
HPA_INLINE std::int64_t write_members(double* to, V<double> values, __mmask8 members) {
  write(to, static_cast<V<double>>(_mm512_maskz_compress_pd(members, values)));
  return __builtin_popcount(members);
}

// A bit for each of eight bytes that are 0 or 1.
HPA_INLINE __mmask8 read_marks(const std::uint8_t* marks) {
  std::int64_t eight;
  __builtin_memcpy(&eight, marks, sizeof eight);
  return static_cast<__mmask8>(_mm_test_epi8_mask(_mm_cvtsi64_si128(eight), _mm_set1_epi8(1)));
}
#endif

// The numbers in [low, high], in their order; returns how many, and adds to `above` how many are larger.
HPA_INLINE std::int64_t keep_between(const double* from, std::int64_t count, double low, double high, double* kept,
                                     std::int64_t* above) {
  std::int64_t i = 0, left = 0, larger = 0;
#if HPA_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const V<double> lows = spread(low), highs = spread(high);
  for (; i + 8 <= count; i += 8) {
    const V<double> values = read(from + i);
    const __mmask8 over = _mm512_cmp_pd_mask(values, highs, _CMP_GT_OQ);
    const __mmask8 in = _mm512_cmp_pd_mask(values, lows, _CMP_GE_OQ);
    larger += __builtin_popcount(over);
    left += write_members(kept + left, values, static_cast<__mmask8>(in & ~over));
  }
#elif defined(__AVX2__)
  const __m256d lows = _mm256_set1_pd(low), highs = _mm256_set1_pd(high);
  __m256i over_each = _mm256_setzero_si256();
  for (; i + 4 <= count; i += 4) {
    const __m256d values = _mm256_loadu_pd(from + i);
    const __m256d over = _mm256_cmp_pd(values, highs, _CMP_GT_OQ), in = _mm256_cmp_pd(values, lows, _CMP_GE_OQ);
    over_each = _mm256_sub_epi64(over_each, _mm256_castpd_si256(over));
    left += write_members(kept + left, values, _mm256_movemask_pd(_mm256_andnot_pd(over, in)));
  }
  larger = over_each[0] + over_each[1] + over_each[2] + over_each[3];
#endif
  for (; i < count; ++i) {
    const double value = from[i];
    const bool over = value > high;
    kept[left] = value;
    left += value >= low && !over;
    larger += over;
  }
  *above += larger;
  return left;
}

// The numbers at the places that are marked by 1, in their order; returns how many.
std::int64_t keep_marked(const double* from, const std::uint8_t* marked, std::int64_t count, double* kept) {
  std::int64_t i = 0, left = 0;
#if HPA_VECTOR_BYTES == 64 && defined(__AVX512F__)
  for (; i + 8 <= count; i += 8) left += write_members(kept + left, read(from + i), read_marks(marked + i));
#elif defined(__AVX2__)
  for (; i + 4 <= count; i += 4) {
    std::int32_t four;
    __builtin_memcpy(&four, marked + i, sizeof four);
    const __m256i lanes = _mm256_slli_epi64(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four)), 63);
    left += write_members(kept + left, _mm256_loadu_pd(from + i), _mm256_movemask_pd(_mm256_castsi256_pd(lanes)));
  }
#endif
  for (; i < count; ++i) {
    kept[left] = from[i];
    left += marked[i];
  }
  return left;
}

// ---- Selection ----

constexpr std::int64_t kFew = 32;  // numbers whose ranks are found by comparing each with all

template <class T>
struct SignedAs;
template <>
struct SignedAs<float> {
  using type = std::int32_t;
};
template <>
struct SignedAs<double> {
  using type = std::int64_t;
};
template <class T>
using SignedOf = typename SignedAs<T>::type;

// Of kFew numbers the ones of two ranks, 0 the largest: the least number of which no more than `rank` others are larger.
template <class T>
HPA_INLINE void select_two_of_few(const T* few, const std::int64_t ranks[2], T found[2]) {
  constexpr std::int64_t w = Vector<T>::width, kBlock = kFew / w < 4 ? kFew / w : 4;
  typedef SignedOf<T> Counts __attribute__((vector_size(HPA_VECTOR_BYTES)));
  const V<T> infinite = spread(static_cast<T>(__builtin_inf()));
  V<T> least[2] = {infinite, infinite};
  for (std::int64_t block = 0; block < kFew; block += kBlock * w) {
    V<T> numbers[kBlock];
    Counts larger[kBlock] = {};
#pragma GCC unroll 4
    for (std::int64_t v = 0; v < kBlock; ++v) numbers[v] = read(few + block + v * w);
    for (std::int64_t i = 0; i < kFew; ++i) {
      const V<T> other = spread(few[i]);
#pragma GCC unroll 4
      for (std::int64_t v = 0; v < kBlock; ++v) larger[v] -= other > numbers[v];
    }
    for (int which = 0; which < 2; ++which) {
#pragma GCC unroll 4
      for (std::int64_t v = 0; v < kBlock; ++v) {
        const Counts better = (larger[v] <= static_cast<SignedOf<T>>(ranks[which])) & (numbers[v] < least[which]);
        least[which] = better ? numbers[v] : least[which];
      }
    }
  }
  for (int which = 0; which < 2; ++which) {
    found[which] = least[which][0];
    for (std::int64_t lane = 1; lane < w; ++lane) {
      found[which] = least[which][lane] < found[which] ? least[which][lane] : found[which];
    }
  }
}

// The same of every (size / kFew)-th number.  In float, of which a register has twice as many: any numbers do as bounds.
HPA_INLINE void select_two_of_sample(const double* values, std::int64_t size, const std::int64_t ranks[2],
                                     double found[2]) {
  float few[kFew], bounds[2];
  for (std::int64_t i = 0; i < kFew; ++i) few[i] = static_cast<float>(values[i * size / kFew]);
  select_two_of_few(few, ranks, bounds);
  found[0] = static_cast<double>(bounds[0]);
  found[1] = static_cast<double>(bounds[1]);
  if (found[0] > found[1]) return;
  // Many equal numbers, which are between bounds only if these are exact; or numbers beyond float.
  double exact[kFew];
  for (std::int64_t i = 0; i < kFew; ++i) exact[i] = values[i * size / kFew];
  select_two_of_few(exact, ranks, found);
}

// Numbers in the order of doubles.
HPA_INLINE std::int64_t place_of(double value) {
  const auto bits = __builtin_bit_cast(std::int64_t, value);
  return bits ^ static_cast<std::int64_t>(static_cast<std::uint64_t>(bits >> 63) >> 1);
}
HPA_INLINE double at_place(std::int64_t place) {
  return __builtin_bit_cast(double, place ^ static_cast<std::int64_t>(static_cast<std::uint64_t>(place >> 63) >> 1));
}

// A sample tells between which two numbers the one that is sought lies most likely; one pass keeps those, and counts
// what is larger.  Where a pass leaves too much (many equal numbers, unlucky samples) the next one halves the doubles
// that are possible, so at most 64 such passes follow.
double nth_largest(const double* values, std::int64_t size, std::int64_t count, double* target, double* spare) {
  constexpr std::int64_t kMargin = 4;  // about 1.5 standard deviations of a rank in the sample
  double low = -__builtin_inf(), high = __builtin_inf();
  double few[kFew], bounds[2];
  bool is_stuck = false;
  while (size > kFew) {
    if (is_stuck) {
      const std::int64_t a = place_of(low), b = place_of(high);
      bounds[0] = high;
      bounds[1] = at_place((a >> 1) + (b >> 1) + (a & b & 1) + (((a ^ b) & 1)));
    } else {
      const std::int64_t rank = count * kFew / size, ranks[2] = {rank - kMargin, rank + kMargin};
      select_two_of_sample(values, size, ranks, bounds);
      if (ranks[0] < 0) bounds[0] = high;
      if (ranks[1] >= kFew) bounds[1] = low;
    }
    std::int64_t above = 0, left = keep_between(values, size, bounds[1], bounds[0], target, &above);
    if (count <= above) {  // larger than the bounds
      bounds[1] = at_place(place_of(bounds[0]) + 1);
      bounds[0] = high;
      above = 0;
      left = keep_between(values, size, bounds[1], bounds[0], target, &above);
    } else if (count > above + left) {  // smaller
      bounds[0] = at_place(place_of(bounds[1]) - 1);
      bounds[1] = low;
      above = 0;
      left = keep_between(values, size, bounds[1], bounds[0], target, &above);
    }
    high = bounds[0];
    low = bounds[1];
    if (low == high) return low;
    is_stuck = left > size - size / 4;
    count -= above;
    size = left;
    values = target;
    double* const next = spare;
    spare = target;
    target = next;
  }
  for (std::int64_t i = 0; i < kFew; ++i) few[i] = i < size ? values[i] : -__builtin_inf();
  const std::int64_t ranks[2] = {count - 1, count - 1};
  select_two_of_few(few, ranks, bounds);
  return bounds[0];
}

// How many of the bytes, each 0 or 1, are 1.
std::int64_t count_marks(const std::uint8_t* marks, std::int64_t count) {
  constexpr std::uint64_t kOnes = 0x0101010101010101;
  std::int64_t i = 0, total = 0;
  while (i + 8 <= count) {
    std::uint64_t eight = 0;
    for (const std::int64_t stop = i + 31 * 8; i + 8 <= count && i < stop; i += 8) {  // 8 * 31 fit a byte
      std::uint64_t word;
      __builtin_memcpy(&word, marks + i, sizeof word);
      eight += word;
    }
    total += static_cast<std::int64_t>(eight * kOnes >> 56);
  }
  for (; i < count; ++i) total += marks[i];
  return total;
}

// chosen[i] = scores[i] >= least, and marked where `marked` is not null; returns how many.
std::int64_t mark_from(const double* scores, const std::uint8_t* marked, double least, std::int64_t count,
                       std::uint8_t* chosen) {
  std::int64_t i = 0, total = 0;
#if HPA_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const V<double> leasts = spread(least);
  for (; i + 8 <= count; i += 8) {
    __mmask8 eight = _mm512_cmp_pd_mask(read(scores + i), leasts, _CMP_GE_OQ);
    if (marked != nullptr) eight &= read_marks(marked + i);
    const std::int64_t bytes = _mm_cvtsi128_si64(_mm_maskz_set1_epi8(eight, 1));
    __builtin_memcpy(chosen + i, &bytes, sizeof bytes);
    total += __builtin_popcount(eight);
  }
#elif defined(__AVX2__)
  const __m256d leasts = _mm256_set1_pd(least);
  for (; i + 4 <= count; i += 4) {
    std::uint32_t four = 0x01010101;
    if (marked != nullptr) __builtin_memcpy(&four, marked + i, sizeof four);
    four &= kMarks[_mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(scores + i), leasts, _CMP_GE_OQ))];
    __builtin_memcpy(chosen + i, &four, sizeof four);
    total += __builtin_popcount(four);
  }
#endif
  for (; i < count; ++i) {
    chosen[i] = static_cast<std::uint8_t>(scores[i] >= least) & (marked == nullptr ? std::uint8_t{1} : marked[i]);
    total += chosen[i];
  }
  return total;
}

// Whether all are finite and not negative.
bool are_scores(const double* scores, std::int64_t count) {
  constexpr std::int64_t w = Vector<double>::width, kChains = 4;
  // Zero times a finite number is zero, else NaN, and stays so in a sum.
  V<double> finite[kChains] = {}, least[kChains] = {};
  std::int64_t i = 0;
  for (; i + kChains * w <= count; i += kChains * w) {
#pragma GCC unroll 4
    for (std::int64_t c = 0; c < kChains; ++c) {
      const V<double> values = read(scores + i + c * w);
      finite[c] += values * 0.0;
      least[c] = values < least[c] ? values : least[c];
    }
  }
  double zero = 0, smallest = 0;
  for (; i < count; ++i) {
    zero += scores[i] * 0.0;
    smallest = scores[i] < smallest ? scores[i] : smallest;
  }
  const V<double> sum = (finite[0] + finite[1]) + (finite[2] + finite[3]);
  for (std::int64_t lane = 0; lane < w; ++lane) {
    zero += sum[lane];
    for (std::int64_t c = 0; c < kChains; ++c) smallest = least[c][lane] < smallest ? least[c][lane] : smallest;
  }
  return zero == 0 && smallest >= 0;
}

// ---- Products, carried in two doubles ----

// a * b = product + error exactly.
HPA_INLINE void multiply_exactly(V<double> a, V<double> b, V<double>* product, V<double>* error) {
  *product = a * b;
#if HPA_VECTOR_BYTES == 64 && defined(__AVX512F__)
  *error = _mm512_fmsub_pd(a, b, *product);
#elif HPA_VECTOR_BYTES == 32 && defined(__FMA__)
  *error = _mm256_fmsub_pd(a, b, *product);
#elif defined(__FP_FAST_FMA)
  for (std::int64_t i = 0; i < Vector<double>::width; ++i) (*error)[i] = __builtin_fma(a[i], b[i], -(*product)[i]);
#else  // Dekker's halves of 26 bits
  const V<double> split = spread(134217729.0), a_split = split * a, b_split = split * b;
  const V<double> a_high = a_split - (a_split - a), a_low = a - a_high;
  const V<double> b_high = b_split - (b_split - b), b_low = b - b_high;
  *error = ((a_high * b_high - *product) + a_high * b_low + a_low * b_high) + a_low * b_low;
#endif
}

// One chain of products of pairs: high + low is multiplied.  Low, and with it the distance from the exact product, grows
// by up to 2^-53 of high in a step; after the most steps, 256, about 2^-90 is lost.
template <bool kSubnormal>
struct Chain {
  typedef std::uint64_t Bits __attribute__((vector_size(HPA_VECTOR_BYTES)));
  V<double> high[2] = {spread(1.0), spread(1.0)}, low[2] = {};
  Bits exponents[2] = {}, pairs{};  // with their bias of 1023;  pairs that count
  Bits subnormal{};                 // bits where one of a pair that counts is, which needs kSubnormal

  HPA_INLINE void multiply(V<double> a, V<double> b) {
    constexpr double kNormal = 0x1p-1022;  // the smallest with an implicit one
    const V<double> values[2] = {a, b}, less = a < b ? a : b;
    const auto counts = less > V<double>{};
    pairs -= __builtin_bit_cast(Bits, counts);
    if constexpr (!kSubnormal) subnormal |= __builtin_bit_cast(Bits, counts & (less < kNormal));
#pragma GCC unroll 2
    for (int side = 0; side < 2; ++side) {
      V<double> value = counts ? values[side] : spread(1.0);
      if constexpr (kSubnormal) {
        const auto is_small = value < kNormal;
        value = is_small ? value * 0x1p64 : value;
        exponents[side] -= __builtin_bit_cast(Bits, is_small) & 64;
      }
      const Bits bits = __builtin_bit_cast(Bits, value);
      exponents[side] += bits >> 52;
      const V<double> factor = __builtin_bit_cast(V<double>, (bits & 0xfffffffffffff) | 0x3ff0000000000000);
      V<double> product, error;
      multiply_exactly(high[side], factor, &product, &error);
      low[side] = low[side] * factor + error;
      high[side] = product;
    }
  }
};

template <bool kSubnormal>
std::int64_t multiply_pairs_of(const double* a, const double* b, std::int64_t count, SplitProduct products[2]) {
  constexpr std::int64_t w = Vector<double>::width;
  using Bits = typename Chain<kSubnormal>::Bits;
  Chain<kSubnormal> chain, other;
  std::int64_t i = 0;
  for (; i + 2 * w <= count; i += 2 * w) {
    chain.multiply(read(a + i), read(b + i));
    other.multiply(read(a + i + w), read(b + i + w));
  }
  std::int64_t lanes = i;
  for (; i < count; i += w, lanes += w) {
    double rest[2][w] = {};  // zeros: pairs that do not count
    for (std::int64_t j = i; j < count && j < i + w; ++j) {
      rest[0][j - i] = a[j];
      rest[1][j - i] = b[j];
    }
    chain.multiply(read(rest[0]), read(rest[1]));
  }
  if constexpr (!kSubnormal) {
    const Bits subnormal = chain.subnormal | other.subnormal;
    std::uint64_t any = 0;
    for (std::int64_t lane = 0; lane < w; ++lane) any |= subnormal[lane];
    if (any != 0) return multiply_pairs_of<true>(a, b, count, products);
  }
  for (int side = 0; side < 2; ++side) {
    SplitProduct& product = products[side];
    V<double> high, low;
    multiply_exactly(chain.high[side], other.high[side], &high, &low);
    low += chain.high[side] * other.low[side] + chain.low[side] * other.high[side];
    const Bits exponents = chain.exponents[side] + other.exponents[side];
    product.lanes = w;
    product.exponent = -1023 * lanes;
    for (std::int64_t lane = 0; lane < w; ++lane) {
      product.high[lane] = high[lane];
      product.low[lane] = low[lane];
      product.exponent += static_cast<std::int64_t>(exponents[lane]);
    }
  }
  const Bits pairs = chain.pairs + other.pairs;
  std::int64_t number = 0;
  for (std::int64_t lane = 0; lane < w; ++lane) number += static_cast<std::int64_t>(pairs[lane]);
  return number;
}

// Products of a[i] and of b[i] over the pairs of which both are positive, count <= kFactors; returns how many these are.
std::int64_t multiply_pairs(const double* a, const double* b, std::int64_t count, SplitProduct products[2]) {
  return multiply_pairs_of<false>(a, b, count, products);
}
