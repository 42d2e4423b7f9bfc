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

template <class T>
void change(const T* __restrict before, const T* __restrict after, std::int64_t count, T* __restrict column,
            double sums[3]) {
  double dot_sum = 0, before_sum = 0, change_sum = 0;
#pragma omp simd reduction(+ : dot_sum, before_sum, change_sum)
  for (std::int64_t i = 0; i < count; ++i) {
    const T difference = after[i] - before[i];
    column[i] += difference * difference;
    const double d = difference, b = before[i];  // products of two floats are exact in double
    dot_sum += d * b;
    before_sum += b * b;
    change_sum += d * d;
  }
  sums[0] += dot_sum;
  sums[1] += before_sum;
  sums[2] += change_sum;
}

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
