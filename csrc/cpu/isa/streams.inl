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

// Columns of a tile of rows: a cache line of storage, in at most four registers.
template <class Format, class T>
constexpr std::int64_t kLineVectors = 64 / static_cast<std::int64_t>(sizeof(typename Format::Bits)) / Vector<T>::width;
template <class Format, class T>
constexpr std::int64_t kTileVectors = kLineVectors<Format, T> < 4 ? kLineVectors<Format, T> : 4;

// Bytes from a tile to what comes a little later in its rows, which the prefetchers of a core with several rows open may
// miss.  At the end of a band of `rows` rows that is the beginning of the next band: rows of 2 to 8 KB would else begin
// with misses, which costs a tenth to a fifth.
template <class Bits>
HPA_INLINE std::int64_t bytes_ahead(std::int64_t j, std::int64_t cols, std::int64_t stride, std::int64_t rows) {
  constexpr std::int64_t bytes = kFetchBytes, size = sizeof(Bits);
  return j * size + bytes < cols * size ? bytes : bytes + (rows * stride - cols) * size;
}

// ---- Change statistics ----

constexpr std::int64_t kChangeRows = 4;

// A line of a row as T; bfloat16 in pairs of registers (rows.inl), which takes half the operations of widening loads and
// leaves the elements of each pair in another order, until restore_line.
template <class Format, class T>
constexpr bool kLineInPairs = __is_same(Format, Bf16) && sizeof(T) == 4;

template <class Format, class T, std::int64_t n>
HPA_INLINE void read_line(const typename Format::Bits* from, V<T> (&values)[n]) {
  constexpr std::int64_t w = Vector<T>::width;
  if constexpr (kLineInPairs<Format, T>) {
    static_assert(n % 2 == 0);
#pragma GCC unroll 2
    for (std::int64_t v = 0; v < n; v += 2) read_pair<Format, T>(from + v * w, values[v], values[v + 1]);
  } else {
#pragma GCC unroll 4
    for (std::int64_t v = 0; v < n; ++v) values[v] = read_wide<Format, T>(from + v * w);
  }
}

template <class Format, class T, std::int64_t n>
HPA_INLINE void restore_line(V<T> (&values)[n]) {
  if constexpr (kLineInPairs<Format, T>) {
#pragma GCC unroll 2
    for (std::int64_t v = 0; v < n; v += 2) {
      PairOrdering<typename Format::Bits, T>::restore(values[v], values[v + 1]);
    }
  }
}

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
                            const typename Format::Bits* after, std::int64_t after_stride, std::int64_t before_ahead,
                            std::int64_t after_ahead, double* column, double* dot_lanes, double* square_lanes) {
  constexpr std::int64_t n = kTileVectors<Format, T>, w = Vector<T>::width;
  V<T> change[n] = {}, dot[n] = {}, square[n] = {};
#pragma GCC unroll 8
  for (std::int64_t row = 0; row < kRows; ++row, before += before_stride, after += after_stride) {
    fetch_ahead(before, before_ahead);
    fetch_ahead(after, after_ahead);
    V<T> old[n], changed[n];
    read_line<Format, T>(before, old);
    read_line<Format, T>(after, changed);
#pragma GCC unroll 4
    for (std::int64_t v = 0; v < n; ++v) {
      const V<T> difference = changed[v] - old[v];
      change[v] += difference * difference;
      dot[v] += difference * old[v];
      square[v] += old[v] * old[v];
    }
  }
  restore_line<Format, T>(change);
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
  constexpr std::int64_t tile = kTileVectors<Format, T> * Vector<T>::width;
  std::int64_t j = 0;
  for (; j + tile <= cols; j += tile) {
    change_tile<Format, T, kRows>(before + j, before_stride, after + j, after_stride,
                                  bytes_ahead<Bits>(j, cols, before_stride, kRows),
                                  bytes_ahead<Bits>(j, cols, after_stride, kRows), column + j, dot_lanes, square_lanes);
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
  change_tile<Format, T, kRows>(old, tile, changed, tile, 0, 0, sums, dot_lanes, square_lanes);
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

constexpr std::int64_t kMergeRows = 4;

// Kept elements are moved, never computed with, so that they stay the same bits.
template <class Format, class T, std::int64_t kRows, bool kProject>
HPA_INLINE void merge_tile(typename Format::Bits* after, std::int64_t after_stride, const typename Format::Bits* before,
                           std::int64_t before_stride, std::int64_t after_ahead, std::int64_t before_ahead,
                           const typename Stored<Format, T>::Word* mask, T projection) {
  using Store = Stored<Format, T>;
  constexpr std::int64_t n = kTileVectors<Format, T>, w = Vector<T>::width;
  typename Store::type kept[n];
  for (std::int64_t v = 0; v < n; ++v) kept[v] = Store::read(mask + v * w);
#pragma GCC unroll 4
  for (std::int64_t row = 0; row < kRows; ++row, after += after_stride, before += before_stride) {
    fetch_ahead(after, after_ahead);
    fetch_ahead(before, before_ahead);
#pragma GCC unroll 4
    for (std::int64_t v = 0; v < n; ++v) {
      const typename Store::type old = Store::read(before + v * w);
      typename Store::type changed = Store::read(after + v * w);
      if constexpr (kProject) {
        changed = Store::narrow(Store::widen(changed) - spread(projection) * Store::widen(old));
      }
      Store::write(after + v * w, (old & kept[v]) | (changed & ~kept[v]));
    }
  }
}

template <class Format, class T, std::int64_t kRows, bool kProject>
HPA_INLINE void merge_rows(typename Format::Bits* after, std::int64_t after_stride, const typename Format::Bits* before,
                           std::int64_t before_stride, std::int64_t cols, const typename Stored<Format, T>::Word* mask,
                           T projection) {
  using Bits = typename Format::Bits;
  constexpr std::int64_t tile = kTileVectors<Format, T> * Vector<T>::width;
  std::int64_t j = 0;
  for (; j + tile <= cols; j += tile) {
    merge_tile<Format, T, kRows, kProject>(after + j, after_stride, before + j, before_stride,
                                           bytes_ahead<Bits>(j, cols, after_stride, kRows),
                                           bytes_ahead<Bits>(j, cols, before_stride, kRows), mask + j, projection);
  }
  if (j == cols) return;
  // The last columns, in a tile of their own.
  Bits to[kRows * tile] = {}, old[kRows * tile] = {};
  typename Stored<Format, T>::Word kept[tile] = {};
  const std::size_t bytes = static_cast<std::size_t>(cols - j) * sizeof(Bits);
  __builtin_memcpy(kept, mask + j, bytes);
  for (std::int64_t row = 0; row < kRows; ++row) {
    __builtin_memcpy(to + row * tile, after + row * after_stride + j, bytes);
    __builtin_memcpy(old + row * tile, before + row * before_stride + j, bytes);
  }
  merge_tile<Format, T, kRows, kProject>(to, tile, old, tile, 0, 0, kept, projection);
  for (std::int64_t row = 0; row < kRows; ++row) {
    __builtin_memcpy(after + row * after_stride + j, to + row * tile, bytes);
  }
}

template <class Format, class T, bool kProject>
void merge_all(void* after, std::int64_t after_stride, const void* before, std::int64_t before_stride,
               std::int64_t rows, std::int64_t cols, const void* mask, T projection) {
  auto* to = static_cast<typename Format::Bits*>(after);
  const auto* old = static_cast<const typename Format::Bits*>(before);
  const auto* kept = static_cast<const typename Stored<Format, T>::Word*>(mask);
  std::int64_t row = 0;
  for (; row + kMergeRows <= rows; row += kMergeRows) {
    merge_rows<Format, T, kMergeRows, kProject>(to + row * after_stride, after_stride, old + row * before_stride,
                                                before_stride, cols, kept, projection);
  }
  for (; row < rows; ++row) {
    merge_rows<Format, T, 1, kProject>(to + row * after_stride, after_stride, old + row * before_stride, before_stride,
                                       cols, kept, projection);
  }
}

template <class Format, class T>
void merge(void* after, std::int64_t after_stride, const void* before, std::int64_t before_stride, std::int64_t rows,
           std::int64_t cols, const void* mask, double projection) {
  const auto all = projection == 0 ? merge_all<Format, T, false> : merge_all<Format, T, true>;
  all(after, after_stride, before, before_stride, rows, cols, mask, static_cast<T>(projection));
}
