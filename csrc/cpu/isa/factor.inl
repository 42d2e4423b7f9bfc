// Blocks of a Cholesky factorisation (inverse_diagonal).  Part of kernels.inl, which says how.
//
// Lanes of an operand are packed twice: in panels [depth][kPanel], the vectors of a tile, and in strips [depth][kDown],
// its rows.  A tile of the result is [kDown][kPanel].

template <class T>
void multiply_strips(std::int64_t depth, std::int64_t count, const T* strips, std::int64_t pitch, const T* panel,
                     T alpha, T* c) {
  constexpr std::int64_t p = kPanel<T>, w = Vector<T>::width;
  const V<T> factor = spread(alpha);
  for (std::int64_t s = 0; s < count; ++s, strips += pitch, c += kDown * p) {
    V<T> sum[kDown][kAcross];
    tile<Elements<T>, kDown>(depth, strips, panel, sum);
#pragma GCC unroll 16
    for (int i = 0; i < kDown; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kAcross; ++v) {
        T* at = c + i * p + v * w;
        write(at, read(at) + factor * sum[i][v]);
      }
    }
  }
}

// kRows rows of a forward substitution, a panel wide and `p` elements apart.  `x` holds their right-hand sides and, in
// the `before` rows above, what is solved; element [i][d] of the factor is factor[d * pitch + i].
template <class T, int kRows>
HPA_INLINE void solve_rows(std::int64_t before, const T* factor, std::int64_t pitch, T* x,
                           std::int64_t p = kPanel<T>) {
  constexpr std::int64_t w = Vector<T>::width;
  V<T> sum[kRows][kAcross];
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kAcross; ++v) sum[i][v] = read(x + i * p + v * w);
  const T* known = x - before * p;
  for (std::int64_t d = 0; d < before; ++d, known += p, factor += pitch) {
    V<T> across[kAcross];
#pragma GCC unroll 8
    for (int v = 0; v < kAcross; ++v) across[v] = read(known + v * w);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const V<T> element = spread(factor[i]);
#pragma GCC unroll 8
      for (int v = 0; v < kAcross; ++v) sum[i][v] -= element * across[v];
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < kRows; ++k) {
    const T* column = factor + k * pitch;
    const V<T> reciprocal = spread(T(1) / column[k]);
    for (int v = 0; v < kAcross; ++v) {
      sum[k][v] *= reciprocal;
      write(x + k * p + v * w, sum[k][v]);
    }
    for (int i = k + 1; i < kRows; ++i) {
      const V<T> element = spread(column[i]);
      for (int v = 0; v < kAcross; ++v) sum[i][v] -= element * sum[k][v];
    }
  }
}

template <class T>
void solve_strips(std::int64_t depth, std::int64_t first, const T* strips, T* panel) {
  for (std::int64_t row = first; row < depth; row += kDown) {
    solve_rows<T, kDown>(row - first, strips + row * depth + first * kDown, kDown, panel + row * kPanel<T>);
  }
}

// A corner is small enough for the first-level cache, and most of its time is the latency of its pivots.
template <class T>
std::int64_t factor_corner(T* corner) {
  constexpr std::int64_t p = kPanel<T>, w = Vector<T>::width;
  for (std::int64_t d = 0; d < p; ++d) {
    T* row = corner + d * p;
    const T pivot = row[d];
    if (!(pivot > 0 && __builtin_isfinite(pivot))) return d;
    const T root = __builtin_sqrt(pivot), reciprocal = T(1) / root;
    const std::int64_t from = d / w;  // the first vector that has lanes to the right of the pivot
    V<T> values[kAcross];
    for (std::int64_t v = from; v < kAcross; ++v) {
      values[v] = read(row + v * w) * spread(reciprocal);
      write(row + v * w, values[v]);
    }
    row[d] = root;
    for (std::int64_t e = d + 1; e < p; ++e) {
      const V<T> element = spread(row[e]);
      T* below = corner + e * p;
      for (std::int64_t v = e / w; v < kAcross; ++v) write(below + v * w, read(below + v * w) - element * values[v]);
    }
  }
  return p;
}

template <class T>
void solve_corner(const T* corner, T* panel) {
  constexpr std::int64_t p = kPanel<T>;
  constexpr int kRows = 4;
  static_assert(p % kRows == 0);
  for (std::int64_t row = 0; row < p; row += kRows) solve_rows<T, kRows>(row, corner + row, p, panel + row * p);
}

template <class T>
void transpose_square(const T* __restrict from, T* __restrict to) {
  constexpr std::int64_t p = kPanel<T>;
  for (std::int64_t i = 0; i < p; ++i)
    for (std::int64_t j = 0; j < p; ++j) to[i * p + j] = from[j * p + i];
}
