// Products of rows (orthonormalize_, project_), and triangular systems whose unknowns are rows (orthonormalize_).  Part of
// kernels.inl, which says how.
//
// The rows are many times longer than there are of them, and lie `pitch` elements apart in a cache.  Vectors run along
// the rows, so nothing is packed; lengths are multiples of kPanel, padded with zeros.

// Rows of the two sides of a tile of products: as many sums as a tile of panels.inl has.
constexpr int kTall = HPA_TILE_VECTORS;
constexpr int kWide = HPA_TILE_ROWS;

// Tiles of a block of products, whose sums stay in a first-level cache of 32 KB, and its rows kSpan elements at a time.
// Where a register is a cache line, kSpan would be a few registers: there one wide tile stays, and tall rows pass it.
constexpr bool kOneWide = HPA_VECTOR_BYTES == 64;
constexpr int kTallTiles = 4;
constexpr int kWideTiles = kOneWide ? 1 : 3;
template <class T>
constexpr std::int64_t kSpan =
    24576 / ((kOneWide ? kTall + kWide : kTall * kTallTiles + kWide * kWideTiles) * static_cast<int>(sizeof(T))) /
    kPanel<T> * kPanel<T>;

// Sums of a block: element [i][j] of a tile is still one sum a lane.
template <class T>
using RowTile = V<T>[kTall][kWide];

template <class T>
HPA_INLINE void add_tile_products(const T* const tall[kTall], const T* const wide[kWide], std::int64_t from,
                                  std::int64_t to, RowTile<T>& tile) {
  constexpr std::int64_t w = Vector<T>::width;
  V<T> sum[kTall][kWide];
#pragma GCC unroll 16
  for (int i = 0; i < kTall; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kWide; ++j) sum[i][j] = tile[i][j];
  }
#pragma GCC unroll 2
  for (std::int64_t at = from; at < to; at += w) {
    V<T> a[kTall];
#pragma GCC unroll 16
    for (int i = 0; i < kTall; ++i) a[i] = read(tall[i] + at);
#pragma GCC unroll 16
    for (int j = 0; j < kWide; ++j) {
      const V<T> b = read(wide[j] + at);
#pragma GCC unroll 16
      for (int i = 0; i < kTall; ++i) sum[i][j] += a[i] * b;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTall; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kWide; ++j) tile[i][j] = sum[i][j];
  }
}

// products[i][j] += <row i of a, row j of b>; where `lower`, for j <= i alone.
template <class T, bool lower>
HPA_INLINE void add_products(std::int64_t a_count, const T* a, std::int64_t b_count, const T* b, std::int64_t pitch,
                             std::int64_t length, double* products) {
  constexpr std::int64_t tall_rows = kTall * kTallTiles, wide_rows = kWide * kWideTiles;
  for (std::int64_t top = 0; top < a_count; top += tall_rows) {
    for (std::int64_t left = 0; left < b_count && !(lower && left >= top + tall_rows); left += wide_rows) {
      RowTile<T> tiles[kTallTiles][kWideTiles] = {};
      for (std::int64_t from = 0; from < length; from += kSpan<T>) {
        const std::int64_t to = from + kSpan<T> < length ? from + kSpan<T> : length;
        for (int s = 0; s < kTallTiles; ++s) {
          const std::int64_t i = top + s * kTall;
          // Rows past the end are read as the last one and their sums left where they are.
          const T *tall[kTall], *wide[kWide];
          for (int r = 0; r < kTall; ++r) tall[r] = a + (i + r < a_count ? i + r : a_count - 1) * pitch;
          for (int t = 0; t < kWideTiles; ++t) {
            const std::int64_t j = left + t * kWide;
            if (i >= a_count || j >= b_count || (lower && j >= i + kTall)) break;
            for (int r = 0; r < kWide; ++r) wide[r] = b + (j + r < b_count ? j + r : b_count - 1) * pitch;
            add_tile_products<T>(tall, wide, from, to, tiles[s][t]);
          }
        }
      }
      for (int s = 0; s < kTallTiles; ++s) {
        for (int t = 0; t < kWideTiles; ++t) {
          for (int r = 0; r < kTall; ++r) {
            for (int c = 0; c < kWide; ++c) {
              const std::int64_t i = top + s * kTall + r, j = left + t * kWide + c;
              if (i < a_count && j < b_count && !(lower && j > i)) {
                products[i * b_count + j] += lanes_sum(tiles[s][t][r][c]);
              }
            }
          }
        }
      }
    }
  }
}

template <class T>
void add_row_products(std::int64_t count, const T* rows, std::int64_t pitch, std::int64_t length, double* gram) {
  add_products<T, true>(count, rows, count, rows, pitch, length, gram);
}

template <class T>
void add_cross_products(std::int64_t a_count, const T* a, std::int64_t b_count, const T* b, std::int64_t pitch,
                        std::int64_t length, double* products) {
  add_products<T, false>(a_count, a, b_count, b, pitch, length, products);
}

template <class T>
void substitute_rows(std::int64_t count, const T* strips, T* rows, std::int64_t pitch, std::int64_t length) {
  for (std::int64_t at = 0; at < length; at += kPanel<T>) {
    for (std::int64_t row = 0; row < count; row += kDown) {
      solve_rows<T, kDown>(row, strips + row * count, kDown, rows + row * pitch + at, pitch);
    }
  }
}
