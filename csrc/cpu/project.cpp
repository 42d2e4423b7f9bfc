// g -= sum_k <g, q_k> q_k  for each of m vectors g         grads[i] [m, *shape_i], basis[i] [rank, *shape_i]
//
// Arithmetic   float32, or float64 where any argument is.  Dot products: float32 over at most 2048 elements, float64
//              over blocks and over the list.  g is rounded to its storage dtype once a pass.
// Bytes moved  Few vectors, or a large basis: grads read twice and written once, basis read twice in its own dtype, both the
//              minimum for a dot product of the whole that must be finished before it is used.  Many vectors: groups of
//              48 (96 with AVX-512) read the basis twice each, from a cache, against 2 * rank multiply-adds an element.
// Bound        Few vectors: reading the basis.  Zen 3, one thread under load, float32: 15-17 GB/s from memory, where a
//              plain read reached 16.4-16.7; 55 GB/s from the third-level cache (a basis of 2 MB) and 44 from the second
//              (256 KB).  bfloat16: 31-35 and 24 GB/s.  Many vectors: multiply-adds, and memory for the grads: rank 64,
//              4096 vectors of 4096, 2 threads: 105 GF/s (float32) and 93 (bfloat16) of some 150.  Emerald Rapids,
//              AVX-512: 186 and 176 of some 330; in pieces of 448, each with its sums over lanes, it was 128 and 133.
// Design       Two loops, chosen by shape.  Few vectors or a large basis: eight rows of the basis at a time meet a block
//              of the vector that stays in a cache; 16-bit rows are widened in registers.  The second pass goes
//              backwards and starts on what the first one left in the caches.  Many vectors: two products of matrices
//              for each group of vectors, which needs nothing from other groups.  Owners and order of sums are fixed by
//              shape: the result does not depend on the number of threads.
#include <algorithm>
#include <vector>

#include "buffer.h"
#include "hpa/check.h"
#include "hpa/kernels.h"
#include "panels.h"
#include "parallel.h"
#include "rows.h"

namespace hpa {
namespace {

constexpr std::int64_t kBlock = 8192;           // elements of a row read in one go: long enough for the prefetchers
constexpr std::int64_t kSum = 2048;             // elements of a sum in T
constexpr std::int64_t kVectors = 8;            // vectors that share a reading of the basis
constexpr std::int64_t kGroups = 512;           // most groups of blocks over which partial sums are kept
constexpr std::int64_t kManyVectors = 32;       // from here on, with a basis of
constexpr std::int64_t kLargeRank = 16;         // this rank or more, products of matrices pay
constexpr std::int64_t kCachedBasis = 2 << 20;  // and no more bytes than a cache serves again and again
constexpr std::int64_t kFewestTasks = 8;        // of groups
constexpr std::int64_t kGroup = 48;             // of so many vectors at most, twice as many in
constexpr std::int64_t kLargeCache = 1 << 20;   // a second-level cache of this size
constexpr std::int64_t kGrain = 256 * 1024;     // multiply-adds worth a thread

struct Slices {
  std::vector<RowsView> grads, basis;
  std::int64_t vectors = 0, rank = 0, length = 0;
};

// A piece of one slice.
struct Piece {
  std::size_t slice;
  std::int64_t start, count;
};

// Pieces of at most `longest` elements, equal in each slice but for rounding up to a multiple of `round`, which divides
// `longest`.
std::vector<Piece> cut(const Slices& slices, std::int64_t longest, std::int64_t round) {
  std::vector<Piece> pieces;
  pieces.reserve(slices.grads.size());
  for (std::size_t i = 0; i < slices.grads.size(); ++i) {
    if (slices.grads[i].length() == 0) continue;
    const Steps steps(slices.grads[i].length(), longest, round);
    for (std::int64_t k = 0; k < steps.count(); ++k) pieces.push_back({i, steps.start(k), steps.size(k)});
  }
  return pieces;
}

// ---- Few vectors: streams ----

template <class T>
class Stream {
 public:
  Stream(const Slices& slices, int threads)
      : kernels_(isa::active().kernels<T>()),
        slices_(slices),
        block_(std::min(kBlock, longest_slice(slices))),
        pieces_(cut(slices, block_, block_)),
        together_(std::min(kVectors, slices.vectors)),
        vector_groups_(ceil_div(slices.vectors, kVectors)),
        piece_groups_(std::clamp<std::int64_t>(kGroups / vector_groups_, 1, static_cast<std::int64_t>(pieces_.size()))),
        threads_(useful_threads(slices.vectors * slices.rank * slices.length, kGrain, threads)),
        coefficients_(slices.vectors * slices.rank),
        partial_(piece_groups_ * slices.vectors * slices.rank),
        vectors_(threads_ * together_ * block_),
        rows_(needs_copy(slices) ? threads_ * isa::kRows * block_ : 0) {}

  void run() {
    const std::int64_t tasks = vector_groups_ * piece_groups_;
    parallel_for(tasks, threads_, [&](std::int64_t task, int thread) { multiply(task, thread); });
    const std::int64_t count = slices_.vectors * slices_.rank;
    for (std::int64_t i = 0; i < count; ++i) {
      double sum = 0;
      for (std::int64_t group = 0; group < piece_groups_; ++group) sum += partial_[group * count + i];
      coefficients_[i] = static_cast<T>(sum);
    }
    // Backwards: what was read last is still in a cache.
    parallel_for(tasks, threads_, [&](std::int64_t task, int thread) { subtract(tasks - 1 - task, thread); });
  }

 private:
  struct Task {
    std::int64_t first_vector, vectors, group;
    std::size_t first_piece, last_piece;
  };

  // Rows of the basis, side by side in their own dtype or as T.
  struct Rows {
    const void* at[isa::kRows];
    DType dtype;
  };

  static std::int64_t longest_slice(const Slices& slices) {
    std::int64_t longest = 0;
    for (const RowsView& grads : slices.grads) longest = std::max(longest, grads.length());
    return longest;
  }

  static bool needs_copy(const Slices& slices) {
    const isa::Kernels<T>& kernels = isa::active().kernels<T>();
    return std::any_of(slices.basis.begin(), slices.basis.end(), [&](const RowsView& basis) {
      return basis.find(0, 0) == nullptr || kernels.add_dots[static_cast<int>(basis.dtype())] == nullptr;
    });
  }

  Task describe(std::int64_t task) const {
    const std::int64_t group = task / vector_groups_, first = task % vector_groups_ * kVectors;
    const auto pieces = static_cast<std::int64_t>(pieces_.size());
    return {first, std::min(kVectors, slices_.vectors - first), group,
            static_cast<std::size_t>(group * pieces / piece_groups_),
            static_cast<std::size_t>((group + 1) * pieces / piece_groups_)};
  }

  Rows read_basis(const Piece& piece, std::int64_t first, std::int64_t number, int thread) const {
    const RowsView& basis = slices_.basis[piece.slice];
    Rows rows{{}, basis.dtype()};
    const bool direct = basis.find(0, 0) != nullptr && kernels_.add_dots[static_cast<int>(rows.dtype)] != nullptr;
    if (!direct) rows.dtype = kNative<T>;
    for (std::int64_t r = 0; r < number; ++r) {
      rows.at[r] = direct ? basis.find(first + r, piece.start)
                          : basis.read(kernels_, first + r, piece.start, piece.count,
                                       rows_.data() + (thread * isa::kRows + r) * block_);
    }
    return rows;
  }

  T* read_vector(const Task& task, std::int64_t v, const Piece& piece, int thread) const {
    return slices_.grads[piece.slice].read(kernels_, task.first_vector + v, piece.start, piece.count,
                                           vectors_.data() + (thread * together_ + v) * block_);
  }

  void multiply(std::int64_t number, int thread) const {
    const Task task = describe(number);
    double* sums = partial_.data() + (task.group * slices_.vectors + task.first_vector) * slices_.rank;
    std::fill(sums, sums + task.vectors * slices_.rank, 0.0);
    for (std::size_t index = task.first_piece; index < task.last_piece; ++index) {
      const Piece& piece = pieces_[index];
      const T* vectors[kVectors];
      for (std::int64_t v = 0; v < task.vectors; ++v) vectors[v] = read_vector(task, v, piece, thread);
      for (std::int64_t k = 0; k < slices_.rank; k += isa::kRows) {
        const std::int64_t count = std::min<std::int64_t>(isa::kRows, slices_.rank - k);
        const Rows rows = read_basis(piece, k, count, thread);
        const auto add_dots = kernels_.add_dots[static_cast<int>(rows.dtype)];
        for (std::int64_t v = 0; v < task.vectors; ++v) {
          Rows part = rows;
          for (std::int64_t at = 0; at < piece.count; at += kSum) {
            add_dots(part.at, count, vectors[v] + at, std::min(kSum, piece.count - at), sums + v * slices_.rank + k);
            for (int r = 0; r < count; ++r)
              part.at[r] = static_cast<const char*>(part.at[r]) + kSum * element_size(rows.dtype);
          }
        }
      }
    }
  }

  void subtract(std::int64_t number, int thread) const {
    const Task task = describe(number);
    for (std::size_t index = task.last_piece; index-- > task.first_piece;) {
      const Piece& piece = pieces_[index];
      T* vectors[kVectors];
      for (std::int64_t v = 0; v < task.vectors; ++v) vectors[v] = read_vector(task, v, piece, thread);
      for (std::int64_t k = 0; k < slices_.rank; k += isa::kRows) {
        const std::int64_t count = std::min<std::int64_t>(isa::kRows, slices_.rank - k);
        const Rows rows = read_basis(piece, k, count, thread);
        const auto subtract_rows = kernels_.subtract_rows[static_cast<int>(rows.dtype)];
        for (std::int64_t v = 0; v < task.vectors; ++v) {
          const T* factors = coefficients_.data() + (task.first_vector + v) * slices_.rank + k;
          subtract_rows(rows.at, count, factors, piece.count, vectors[v]);
        }
      }
      for (std::int64_t v = 0; v < task.vectors; ++v) {
        slices_.grads[piece.slice].write(kernels_, task.first_vector + v, piece.start, piece.count, vectors[v]);
      }
    }
  }

  const isa::Kernels<T>& kernels_;
  const Slices& slices_;
  std::int64_t block_;
  std::vector<Piece> pieces_;
  std::int64_t together_, vector_groups_, piece_groups_;
  int threads_;
  Buffer<T> coefficients_;
  Buffer<double> partial_;
  Buffer<T> vectors_, rows_;
};

// ---- Many vectors: two products of matrices ----

// A task takes a group of vectors through both products.  What they multiply is copied, as T, next to each other in the
// second-level cache: rows as they lie in memory are often a power of two apart, and then compete for a few of its sets.
template <class T>
class Blocked {
 public:
  Blocked(const Slices& slices, int threads)
      : kernels_(isa::active().kernels<T>()),
        slices_(slices),
        p_(kernels_.panel),
        strip_(kernels_.strip),
        group_(ceil_div(std::clamp(ceil_div(slices.vectors, kFewestTasks), kManyVectors / 2,
                                   kernels_.cache < kLargeCache ? kGroup : 2 * kGroup),
                        strip_) *
               strip_),
        span_(std::clamp(kernels_.cache / 5 * 4 / (slices.rank + group_) / static_cast<std::int64_t>(sizeof(T)) / p_,
                         std::int64_t{2}, kSum / p_) *
              p_),
        pitch_(span_ + 64 / static_cast<std::int64_t>(sizeof(T))),
        pieces_(cut(slices, span_, p_)),
        tasks_(ceil_div(slices.vectors, group_)),
        threads_(useful_threads(slices.vectors * slices.rank * slices.length, kGrain, threads)),
        products_(threads_ * slices.rank * group_),
        strips_(threads_ * slices.rank * group_),
        vectors_(threads_ * group_ * pitch_),
        basis_(threads_ * slices.rank * pitch_) {}

  void run() {
    parallel_for(tasks_, threads_, [&](std::int64_t task, int thread) {
      const std::int64_t first = task * group_, count = std::min(group_, slices_.vectors - first);
      double* products = products_.data() + thread * slices_.rank * group_;
      T* strips = strips_.data() + thread * slices_.rank * group_;
      T* vectors = vectors_.data() + thread * group_ * pitch_;
      T* basis = basis_.data() + thread * slices_.rank * pitch_;
      std::fill(products, products + slices_.rank * count, 0.0);
      for (const Piece& piece : pieces_) multiply(piece, first, count, products, vectors, basis);
      for (std::int64_t k = 0; k < slices_.rank; ++k) {
        for (std::int64_t v = 0; v < ceil_div(count, strip_) * strip_; ++v) {
          const T product = v < count ? static_cast<T>(products[k * count + v]) : T(0);
          strips[(v / strip_ * slices_.rank + k) * strip_ + v % strip_] = product;
        }
      }
      // Backwards: what was read last is still in a cache.
      for (auto piece = pieces_.rbegin(); piece != pieces_.rend(); ++piece) {
        subtract(*piece, first, count, strips, vectors, basis);
      }
    });
  }

 private:
  // Rows [first, first + count) of a piece, padded with zeros to whole panels.
  void copy_rows(const RowsView& view, std::int64_t first, std::int64_t count, const Piece& piece, T* to) const {
    for (std::int64_t r = 0; r < count; ++r, to += pitch_) {
      const T* values = view.read(kernels_, first + r, piece.start, piece.count, to);
      if (values != to) std::copy(values, values + piece.count, to);
      std::fill(to + piece.count, to + ceil_div(piece.count, p_) * p_, T(0));
    }
  }

  void multiply(const Piece& piece, std::int64_t first, std::int64_t count, double* products, T* vectors,
                T* basis) const {
    copy_rows(slices_.grads[piece.slice], first, count, piece, vectors);
    copy_rows(slices_.basis[piece.slice], 0, slices_.rank, piece, basis);
    kernels_.add_cross_products(slices_.rank, basis, count, vectors, pitch_, ceil_div(piece.count, p_) * p_, products);
  }

  void subtract(const Piece& piece, std::int64_t first, std::int64_t count, const T* strips, T* vectors,
                T* panels) const {
    const RowsView &grads = slices_.grads[piece.slice], &basis = slices_.basis[piece.slice];
    for (std::int64_t k = 0; k < slices_.rank; ++k) {  // panels [rank][panel]
      const T* values = basis.read(kernels_, k, piece.start, piece.count, vectors);
      for (std::int64_t at = 0; at < piece.count; at += p_) {
        T* out = panels + (at / p_ * slices_.rank + k) * p_;
        const std::int64_t width = std::min(p_, piece.count - at);
        std::copy(values + at, values + at + width, out);
        std::fill(out + width, out + p_, T(0));
      }
    }
    const std::int64_t all = piece.count + p_;  // no triangle
    for (std::int64_t v = 0; v < count; v += strip_) {
      const std::int64_t rows = std::min(strip_, count - v);
      const T* factors = strips + v * slices_.rank;
      if (T* c = grads.in_place<T>(first + v, piece.start)) {
        kernels_.multiply_run(slices_.rank, factors, panels, T(-1), rows, piece.count, all, c, grads.row_stride());
        continue;
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        grads.read(kernels_, first + v + r, piece.start, piece.count, vectors + r * pitch_);
      }
      kernels_.multiply_run(slices_.rank, factors, panels, T(-1), rows, piece.count, all, vectors, pitch_);
      for (std::int64_t r = 0; r < rows; ++r) {
        grads.write(kernels_, first + v + r, piece.start, piece.count, vectors + r * pitch_);
      }
    }
  }

  const isa::Kernels<T>& kernels_;
  const Slices& slices_;
  std::int64_t p_, strip_, group_, span_, pitch_;
  std::vector<Piece> pieces_;
  std::int64_t tasks_;
  int threads_;
  Buffer<double> products_;
  Buffer<T> strips_, vectors_, basis_;
};

template <class T>
void project_slices(const Slices& slices, int passes, int threads) {
  const std::int64_t basis_bytes = slices.rank * slices.length * static_cast<std::int64_t>(sizeof(T));
  if (slices.vectors >= kManyVectors && slices.rank >= kLargeRank && basis_bytes <= kCachedBasis) {
    Blocked<T> blocked(slices, threads);
    for (int pass = 0; pass < passes; ++pass) blocked.run();
  } else {
    Stream<T> stream(slices, threads);
    for (int pass = 0; pass < passes; ++pass) stream.run();
  }
}

}  // namespace

void project(const std::vector<TensorView>& grads, const std::vector<TensorView>& basis, int passes, int threads) {
  check(basis.size() == grads.size(), "basis", "expected as many tensors as grads");
  if (grads.empty()) return;
  Slices slices;
  bool wide = false;
  slices.grads.reserve(grads.size());
  slices.basis.reserve(basis.size());
  for (std::size_t i = 0; i < grads.size(); ++i) {
    check_float("grads", grads[i]);
    check_float("basis", basis[i]);
    check(grads[i].dims >= 1 && grads[i].shape[0] == grads[0].shape[0], "grads", "expected as many vectors in each");
    check(basis[i].dims == grads[i].dims && basis[i].shape[0] == basis[0].shape[0] &&
              std::equal(basis[i].shape + 1, basis[i].shape + basis[i].dims, grads[i].shape + 1),
          "basis", "expected [rank, *shape of grads]");
    slices.grads.emplace_back(grads[i], 1);
    slices.basis.emplace_back(basis[i], 1);
    slices.length += slices.grads.back().length();
    wide = wide || grads[i].dtype == DType::f64 || basis[i].dtype == DType::f64;
  }
  slices.vectors = grads[0].shape[0];
  slices.rank = basis[0].shape[0];
  if (slices.vectors == 0 || slices.rank == 0 || slices.length == 0) return;
  if (wide) {
    project_slices<double>(slices, passes, threads);
  } else {
    project_slices<float>(slices, passes, threads);
  }
}

}  // namespace hpa
