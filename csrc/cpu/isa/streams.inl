// Loops that read each element once: importance, change statistics, merge.  Part of kernels.inl, which says how.

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

// ---- Change statistics ----

// Columns of a tile: a cache line of storage, in at most four registers.
template <class Format, class T>
constexpr std::int64_t kLineVectors = 64 / static_cast<std::int64_t>(sizeof(typename Format::Bits)) / Vector<T>::width;
template <class Format, class T>
constexpr std::int64_t kChangeVectors = kLineVectors<Format, T> < 4 ? kLineVectors<Format, T> : 4;
constexpr std::int64_t kChangeRows = 8;

// Adds the lanes of `value` to sums in double precision.
HPA_INLINE void add_lanes(V<double> value, double* sums) { write(sums, read(sums) + value); }
HPA_INLINE void add_lanes(V<float> value, double* sums) {
  V<double> wide[2];
  widen_floats(value, wide);
  add_lanes(wide[0], sums);
  add_lanes(wide[1], sums + Vector<double>::width);
}

// One tile: its sums stay in registers, chains of kRows multiply-adds, and are then added to the double ones.
template <class Format, class T, std::int64_t kRows>
HPA_INLINE void change_tile(const typename Format::Bits* before, std::int64_t before_stride,
                            const typename Format::Bits* after, std::int64_t after_stride, double* column,
                            double* dot_lanes, double* square_lanes) {
  constexpr std::int64_t n = kChangeVectors<Format, T>, w = Vector<T>::width;
  V<T> change[n] = {}, dot[n] = {}, square[n] = {};
#pragma GCC unroll 8
  for (std::int64_t row = 0; row < kRows; ++row, before += before_stride, after += after_stride) {
#pragma GCC unroll 4
    for (std::int64_t v = 0; v < n; ++v) {
      const V<T> old = read_wide<Format, T>(before + v * w);
      const V<T> difference = read_wide<Format, T>(after + v * w) - old;
      change[v] += difference * difference;
      dot[v] += difference * old;
      square[v] += old * old;
    }
  }
  for (std::int64_t v = 0; v < n; ++v) add_lanes(change[v], column + v * w);
  for (std::int64_t v = 1; v < n; ++v) {
    dot[0] += dot[v];
    square[0] += square[v];
  }
  add_lanes(dot[0], dot_lanes);
  add_lanes(square[0], square_lanes);
}

template <class Format, class T, std::int64_t kRows>
HPA_INLINE void change_rows(const typename Format::Bits* before, std::int64_t before_stride,
                            const typename Format::Bits* after, std::int64_t after_stride, std::int64_t cols,
                            double* column, double* dot_lanes, double* square_lanes) {
  using Bits = typename Format::Bits;
  constexpr std::int64_t tile = kChangeVectors<Format, T> * Vector<T>::width;
  std::int64_t j = 0;
  for (; j + tile <= cols; j += tile) {
    change_tile<Format, T, kRows>(before + j, before_stride, after + j, after_stride, column + j, dot_lanes,
                                  square_lanes);
  }
  if (j == cols) return;
  // The last columns, beside zeros, which add nothing.
  Bits old[kRows * tile] = {}, changed[kRows * tile] = {};
  double sums[tile] = {};
  for (std::int64_t row = 0; row < kRows; ++row) {
    for (std::int64_t k = 0; k < cols - j; ++k) {
      old[row * tile + k] = before[row * before_stride + j + k];
      changed[row * tile + k] = after[row * after_stride + j + k];
    }
  }
  change_tile<Format, T, kRows>(old, tile, changed, tile, sums, dot_lanes, square_lanes);
  for (std::int64_t k = 0; k < cols - j; ++k) column[j + k] += sums[k];
}

template <class Format, class T>
void change(const void* before, std::int64_t before_stride, const void* after, std::int64_t after_stride,
            std::int64_t rows, std::int64_t cols, double* column, double sums[2]) {
  const auto* old = static_cast<const typename Format::Bits*>(before);
  const auto* changed = static_cast<const typename Format::Bits*>(after);
  double dot[Vector<T>::width] = {}, square[Vector<T>::width] = {};
  std::int64_t row = 0;
  for (; row + kChangeRows <= rows; row += kChangeRows) {
    change_rows<Format, T, kChangeRows>(old + row * before_stride, before_stride, changed + row * after_stride,
                                        after_stride, cols, column, dot, square);
  }
  for (; row < rows; ++row) {
    change_rows<Format, T, 1>(old + row * before_stride, before_stride, changed + row * after_stride, after_stride,
                              cols, column, dot, square);
  }
  for (std::int64_t i = 0; i < Vector<T>::width; ++i) {
    sums[0] += dot[i];
    sums[1] += square[i];
  }
}

// ---- Merge ----

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
