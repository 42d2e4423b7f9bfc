// Dense algebra on packed panels (accumulate_gram_, inverse_diagonal, project_ with many vectors).  Part of
// kernels.inl, which says how.

// ---- Panels ----

constexpr int kAcross = HPA_TILE_VECTORS;
constexpr int kDown = HPA_TILE_ROWS;
template <class T>
constexpr std::int64_t kPanel = kAcross * Vector<T>::width;

// Depth of one sum in registers: a panel of that depth fills three quarters of a first-level cache of 32 KB.
template <class T>
constexpr std::int64_t kFullDepth = 24576 / (kPanel<T> * static_cast<std::int64_t>(sizeof(T)));
template <class T>
constexpr std::int64_t kPanelDepth = kFullDepth<T> < 256 ? kFullDepth<T> : 256;

// kDown lanes of one operand (`pitch` elements from depth to depth) times a panel, summed over depth in registers.  Each
// element is one chain of multiply-adds in the order of depth: its value does not depend on where it stands in a tile.
template <class T, std::int64_t pitch>
HPA_INLINE void tile(std::int64_t depth, const T* a, const T* b, V<T> sum[kDown][kAcross]) {
  constexpr std::int64_t p = kPanel<T>;
  for (int i = 0; i < kDown; ++i)
    for (int v = 0; v < kAcross; ++v) sum[i][v] = V<T>{};
#pragma GCC unroll 4
  for (std::int64_t d = 0; d < depth; ++d, a += pitch, b += p) {
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
void finish(std::int64_t depth, const T* a, const T* b, T alpha, std::int64_t rows, std::int64_t cols,
            std::int64_t reach, const T* carry, T* c, std::int64_t stride) {
  constexpr std::int64_t p = kPanel<T>, w = Vector<T>::width, line = 64 / sizeof(T);
  static_assert(p % kDown == 0);
  for (std::int64_t top = 0; top < rows; top += kDown) {
    // Rows of c are far apart, which no hardware prefetcher guesses; the sums below take longer than a miss.
    for (std::int64_t i = top; i < top + kDown && i < rows; ++i) {
      for (std::int64_t j = 0; j < cols + line - 1; j += line) {
        __builtin_prefetch(c + i * stride + (j < cols ? j : cols - 1), 1);
      }
    }
    V<T> sum[kDown][kAcross];
    tile<T, p>(depth, a + top, b, sum);
    if (carry != nullptr) {
#pragma GCC unroll 16
      for (int i = 0; i < kDown; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < kAcross; ++v) sum[i][v] += read(carry + (top + i) * p + v * w);
      }
    }
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

template <class T>
void update(std::int64_t depth, const T* a, const T* b, T alpha, std::int64_t rows, std::int64_t cols,
            std::int64_t reach, T* c, std::int64_t stride) {
  finish<T>(depth, a, b, alpha, rows, cols, reach, nullptr, c, stride);
}

template <class T>
void add_lane_squares(std::int64_t depth, const T* __restrict lanes, double* __restrict sums) {
  for (std::int64_t d = 0; d < depth; ++d) {
    const T* __restrict row = lanes + d * kPanel<T>;
    for (std::int64_t j = 0; j < kPanel<T>; ++j) sums[j] += static_cast<double>(row[j]) * static_cast<double>(row[j]);
  }
}
