// Dense algebra on packed panels (accumulate_gram_, inverse_diagonal, project_ with many vectors).  Part of
// kernels.inl, which says how.

// ---- Panels ----

constexpr int kAcross = HPA_TILE_VECTORS;
constexpr int kDown = HPA_TILE_ROWS;
template <class T>
constexpr std::int64_t kPanel = kAcross * Vector<T>::width;

// Depth of one sum in registers.  A panel of AVX-512 then takes 48 KB, more than a first-level cache may have: a tile reads
// 192 bytes of it for 24 multiply-adds, which a second-level cache serves.
constexpr std::int64_t kPanelDepth = 256;

// Lanes of a block of the result: at kPanelDepth its rows and its sums take at most 350 KB of a second-level cache, 630 KB
// with AVX-512, where servers (and Zen 4) have 1 MB or more.
template <class T>
constexpr std::int64_t kBlock = (HPA_VECTOR_BYTES == 64 ? 1152 : 768) / static_cast<std::int64_t>(sizeof(T));

// What a tile multiplies.  Elements of T: a vector of sums gains the element a times each of b.
template <class T>
struct Elements {
  using Entry = T;
  using Sum = T;
  static HPA_INLINE V<T> read_entries(const T* from) { return read(from); }
  static HPA_INLINE V<T> add_product(V<T> sum, T a, V<T> b) { return sum + spread(a) * b; }
};

// kDown lanes of one operand (`pitch` entries from depth to depth) times a panel, summed over depth in registers.  Each
// element is one chain of multiply-adds in the order of depth: its value does not depend on where it stands in a tile.
template <class Of, std::int64_t pitch>
HPA_INLINE void tile(std::int64_t depth, const typename Of::Entry* a, const typename Of::Entry* b,
                     V<typename Of::Sum> sum[kDown][kAcross]) {
  using T = typename Of::Sum;
  static_assert(sizeof(typename Of::Entry) == sizeof(T));
  for (int i = 0; i < kDown; ++i)
    for (int v = 0; v < kAcross; ++v) sum[i][v] = V<T>{};
#pragma GCC unroll 4
  for (std::int64_t d = 0; d < depth; ++d, a += pitch, b += kPanel<T>) {
    decltype(Of::read_entries(b)) across[kAcross];
#pragma GCC unroll 8
    for (int v = 0; v < kAcross; ++v) across[v] = Of::read_entries(b + v * Vector<T>::width);
#pragma GCC unroll 16
    for (int i = 0; i < kDown; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kAcross; ++v) sum[i][v] = Of::add_product(sum[i][v], a[i], across[v]);
    }
  }
}

// Rows [top, top + kDown) of c += alpha * sum, inside of rows, cols and the triangle j <= i + reach.
template <class T>
HPA_INLINE void add_tile(const V<T> sum[kDown][kAcross], T alpha, std::int64_t top, std::int64_t rows,
                         std::int64_t cols, std::int64_t reach, T* c, std::int64_t stride) {
  constexpr std::int64_t p = kPanel<T>, w = Vector<T>::width;
  if (top + kDown <= rows && cols == p && top + reach >= p - 1) {
#pragma GCC unroll 16
    for (int i = 0; i < kDown; ++i) {
      T* row = c + (top + i) * stride;
#pragma GCC unroll 8
      for (int v = 0; v < kAcross; ++v) write(row + v * w, read(row + v * w) + spread(alpha) * sum[i][v]);
    }
    return;
  }
  alignas(64) T values[kDown * p];
  for (int i = 0; i < kDown; ++i)
    for (int v = 0; v < kAcross; ++v) write(values + i * p + v * w, sum[i][v]);
  for (std::int64_t i = 0; i < kDown && top + i < rows; ++i) {
    const std::int64_t last = top + i + reach;
    for (std::int64_t j = 0; j < cols && j <= last; ++j) c[(top + i) * stride + j] += alpha * values[i * p + j];
  }
}

// ---- Symmetric products ----

// A panel in strips of kDown lanes, `pitch` elements apart, so that a tile reads whole cache lines of its rows.
template <class E>
void cut_panel(std::int64_t depth, const E* __restrict panel, E* __restrict strips, std::int64_t pitch) {
  constexpr std::int64_t p = kPanel<E>;
  static_assert(p % kDown == 0);
  for (std::int64_t d = 0; d < depth; ++d, panel += p) {
    for (std::int64_t s = 0; s < p / kDown; ++s) {
#pragma GCC unroll 16
      for (int i = 0; i < kDown; ++i) strips[s * pitch + d * kDown + i] = panel[s * kDown + i];
    }
  }
}

template <class E>
void turn(std::int64_t depth, const E* right, E* left) {
  cut_panel(depth, right, left, depth * kDown);
}

template <class Of>
void multiply(std::int64_t depth, const typename Of::Entry* left, const typename Of::Entry* right,
              typename Of::Sum alpha, std::int64_t rows, std::int64_t cols, std::int64_t reach,
              const typename Of::Sum* carry, typename Of::Sum* c, std::int64_t stride) {
  using T = typename Of::Sum;
  constexpr std::int64_t p = kPanel<T>, w = Vector<T>::width, line = 64 / sizeof(T);
  for (std::int64_t top = 0; top < rows; top += kDown) {
    // Rows of c are far apart, which no hardware prefetcher guesses; the sums below take longer than a miss.
    for (std::int64_t i = top; i < top + kDown && i < rows; ++i) {
      for (std::int64_t j = 0; j < cols + line - 1; j += line) {
        __builtin_prefetch(c + i * stride + (j < cols ? j : cols - 1), 1);
      }
    }
    V<T> sum[kDown][kAcross];
    tile<Of, kDown>(depth, left + top * depth, right, sum);
    if (carry != nullptr) {
#pragma GCC unroll 16
      for (int i = 0; i < kDown; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < kAcross; ++v) sum[i][v] += read(carry + (top + i) * p + v * w);
      }
    }
    add_tile<T>(sum, alpha, top, rows, cols, reach, c, stride);
  }
}

// One strip of rows, along panel after panel: a run of memory in each of its rows.
template <class T>
void multiply_run(std::int64_t depth, const T* strip, const T* panels, T alpha, std::int64_t rows, std::int64_t cols,
                  std::int64_t reach, T* c, std::int64_t stride) {
  constexpr std::int64_t p = kPanel<T>, line = 64 / sizeof(T);
  for (std::int64_t j = 0; j < cols && j < rows + reach; j += p, panels += depth * p) {
    for (int i = 0; i < kDown; ++i) {
      for (std::int64_t k = 0; k < p; k += line) __builtin_prefetch(c + (i + kDown) * stride + j + k, 1);
    }
    V<T> sum[kDown][kAcross];
    tile<Elements<T>, kDown>(depth, strip, panels, sum);
    add_tile<T>(sum, alpha, 0, rows, cols - j < p ? cols - j : p, reach - j, c + j, stride);
  }
}

template <class Format, class T>
void pack(const void* source, std::int64_t lane_stride, std::int64_t depth_stride, std::int64_t lanes,
          std::int64_t depth, T* __restrict right, std::int64_t pitch) {
  constexpr std::int64_t p = kPanel<T>;
  const auto* __restrict from = static_cast<const typename Format::Bits*>(source);
  const std::int64_t whole = lane_stride == 1 ? lanes / p : 0;
  // Depth outside, so that rows of the source are read in long runs.
  for (std::int64_t d = 0; d < depth && whole > 0; ++d) {
    const auto* __restrict row = from + d * depth_stride;
    for (std::int64_t k = 0; k < whole; ++k, row += p) {
      T* __restrict to = right + k * pitch + d * p;
      for (std::int64_t i = 0; i < p; ++i) to[i] = static_cast<T>(Format::widen(row[i]));
    }
  }
  for (std::int64_t lane = whole * p; lane % p != 0 || lane < lanes; ++lane) {
    T* __restrict to = right + lane / p * pitch + lane % p;
    const auto* __restrict column = from + lane * lane_stride;
    for (std::int64_t d = 0; d < depth; ++d) {
      to[d * p] = lane < lanes ? static_cast<T>(Format::widen(column[d * depth_stride])) : T(0);
    }
  }
}

template <class T>
constexpr Product<T, T> make_product() {
  return {
      kPanel<T>,
      kPanelDepth,
      1,
      kBlock<T>,
      {pack<F32, T>, pack<F64, T>, pack<Bf16, T>, pack<F16, T>},
      turn<T>,
      multiply<Elements<T>>,
      nullptr,
      nullptr,
  };
}

template <class T>
void add_lane_squares(std::int64_t depth, const T* __restrict lanes, double* __restrict sums) {
  for (std::int64_t d = 0; d < depth; ++d) {
    const T* __restrict row = lanes + d * kPanel<T>;
    for (std::int64_t j = 0; j < kPanel<T>; ++j) sums[j] += static_cast<double>(row[j]) * static_cast<double>(row[j]);
  }
}
