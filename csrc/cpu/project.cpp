// g -= sum_k <g, q_k> q_k  for each of m vectors g         grads[i] [m, *shape_i], basis[i] [rank, *shape_i]
//
// Arithmetic   float32, or float64 where any argument is.  Dot products: float32 over at most 2048 elements, float64
//              over blocks and over the list.  g is rounded to its storage dtype once a pass.
// Bytes moved  Few vectors: grads read twice and written once, basis read twice in its own dtype, both the minimum for a
//              dot product of the whole that must be finished before it is used.  Many vectors: groups of rows read the
//              basis twice each, against 2 * rank multiply-adds an element.
// Bound        Few vectors: reading the basis.  Zen 3, one thread under load, float32: 15-17 GB/s from memory, where a
//              plain read reached 16.4-16.7; 55 GB/s from the third-level cache (a basis of 2 MB) and 44 from the second
//              (256 KB).  bfloat16: 31-35 and 24 GB/s.
// Design       Two loops, chosen by shape.  Few vectors or a small basis: eight rows of the basis at a time meet a block
//              of the vector that stays in a cache; 16-bit rows are widened in registers.  The second pass goes
//              backwards and starts on what the first one left in the caches.  Many vectors and a large basis: two
//              products of packed panels for each group of vectors, which needs nothing from other groups.  Owners and
//              order of sums are fixed by shape: the result does not depend on the number of threads.
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

constexpr std::int64_t kBlock = 8192;        // elements of a row read in one go: long enough for the prefetchers
constexpr std::int64_t kSum = 2048;          // elements of a sum in T
constexpr std::int64_t kVectors = 8;         // vectors that share a reading of the basis
constexpr std::int64_t kGroups = 512;        // most groups of blocks over which partial sums are kept
constexpr std::int64_t kManyVectors = 32;    // from here on, with a basis of
constexpr std::int64_t kLargeRank = 16;      // this rank or more, panels pay
constexpr std::int64_t kGroupPanels = 4;     // panels of vectors in a task
constexpr std::int64_t kColumns = 256;       // columns updated at a time
constexpr std::int64_t kGrain = 256 * 1024;  // multiply-adds worth a thread

struct Slices {
  std::vector<RowsView> grads, basis;
  std::int64_t vectors = 0, rank = 0, length = 0;
};

// A piece of one slice.
struct Piece {
  std::size_t slice;
  std::int64_t start, count;
};

std::vector<Piece> cut(const Slices& slices, std::int64_t longest) {
  std::vector<Piece> pieces;
  for (std::size_t i = 0; i < slices.grads.size(); ++i) {
    const std::int64_t length = slices.grads[i].length();
    for (std::int64_t at = 0; at < length; at += longest) pieces.push_back({i, at, std::min(longest, length - at)});
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
        pieces_(cut(slices, block_)),
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

// ---- Many vectors: panels ----

// Packs `count` rows from `first` on into panels [depth][panel], lane = row.
template <class T>
void pack_rows(const isa::Kernels<T>& kernels, const RowsView& view, std::int64_t first, std::int64_t count,
               const Piece& piece, T* panels, T* scratch) {
  const std::int64_t p = kernels.panel;
  for (std::int64_t lane = 0; lane < ceil_div(count, p) * p; ++lane) {
    T* out = panels + lane / p * piece.count * p + lane % p;
    const T* values = nullptr;
    if (lane < count) values = view.read(kernels, first + lane, piece.start, piece.count, scratch);
    for (std::int64_t d = 0; d < piece.count; ++d) out[d * p] = values == nullptr ? T(0) : values[d];
  }
}

// Packs rows [first, first + depth) of the basis into panels [depth][panel], lane = element of the piece.
template <class T>
void pack_elements(const isa::Kernels<T>& kernels, const RowsView& view, std::int64_t first, std::int64_t depth,
                   const Piece& piece, T* panels, T* scratch) {
  const std::int64_t p = kernels.panel;
  for (std::int64_t d = 0; d < depth; ++d) {
    const T* values = view.read(kernels, first + d, piece.start, piece.count, scratch);
    for (std::int64_t at = 0; at < piece.count; at += p) {
      T* out = panels + at / p * depth * p + d * p;
      const std::int64_t width = std::min(p, piece.count - at);
      std::copy(values + at, values + at + width, out);
      std::fill(out + width, out + p, T(0));
    }
  }
}

template <class T>
class Blocked {
 public:
  Blocked(const Slices& slices, int threads)
      : kernels_(isa::active().kernels<T>()),
        slices_(slices),
        p_(kernels_.panel),
        group_(kGroupPanels * p_),
        rank_pad_(ceil_div(slices.rank, p_) * p_),
        columns_pad_(ceil_div(kColumns, p_) * p_),
        deep_(cut(slices, kDepth)),
        wide_(cut(slices, kColumns)),
        tasks_(ceil_div(slices.vectors, group_)),
        threads_(useful_threads(slices.vectors * slices.rank * slices.length, kGrain, threads)),
        sums_(threads_ * group_ * rank_pad_),
        product_(threads_ * group_ * std::max(rank_pad_, columns_pad_)),
        left_(threads_ * group_ * std::max(kDepth, rank_pad_)),
        right_(threads_ * std::max(rank_pad_ * kDepth, columns_pad_ * rank_pad_)),
        row_(threads_ * std::max(kDepth, kColumns)) {}

  void run() {
    parallel_for(tasks_, threads_, [&](std::int64_t task, int thread) {
      const std::int64_t first = task * group_, count = std::min(group_, slices_.vectors - first);
      double* sums = sums_.data() + thread * group_ * rank_pad_;
      T* product = product_.data() + thread * group_ * std::max(rank_pad_, columns_pad_);
      T* left = left_.data() + thread * group_ * std::max(kDepth, rank_pad_);
      T* right = right_.data() + thread * std::max(rank_pad_ * kDepth, columns_pad_ * rank_pad_);
      T* row = row_.data() + thread * std::max(kDepth, kColumns);
      coefficients(first, count, sums, product, left, right, row);
      subtract(first, count, sums, product, left, right, row);
    });
  }

 private:
  // product [rows, width] = A B^T for packed panels of `rows` and `width` lanes.
  void multiply(const T* a, std::int64_t rows, const T* b, std::int64_t width, std::int64_t depth, T* product) const {
    const std::int64_t pitch = ceil_div(width, p_) * p_;
    std::fill(product, product + ceil_div(rows, p_) * p_ * pitch, T(0));
    for (std::int64_t j = 0; j < width; j += p_) {
      for (std::int64_t i = 0; i < rows; i += p_) {
        kernels_.update(depth, a + i * depth, b + j * depth, T(1), p_, p_, p_, product + i * pitch + j, pitch);
      }
    }
  }

  void coefficients(std::int64_t first, std::int64_t count, double* sums, T* product, T* left, T* right, T* row) const {
    std::fill(sums, sums + group_ * rank_pad_, 0.0);
    for (const Piece& piece : deep_) {
      pack_rows(kernels_, slices_.grads[piece.slice], first, count, piece, left, row);
      pack_rows(kernels_, slices_.basis[piece.slice], 0, slices_.rank, piece, right, row);
      multiply(left, count, right, slices_.rank, piece.count, product);
      for (std::int64_t i = 0; i < count * rank_pad_; ++i) sums[i] += static_cast<double>(product[i]);
    }
  }

  void subtract(std::int64_t first, std::int64_t count, const double* sums, T* product, T* left, T* right,
                T* row) const {
    for (std::int64_t lane = 0; lane < ceil_div(count, p_) * p_; ++lane) {
      T* out = left + lane / p_ * slices_.rank * p_ + lane % p_;
      for (std::int64_t k = 0; k < slices_.rank; ++k) {
        out[k * p_] = lane < count ? static_cast<T>(sums[lane * rank_pad_ + k]) : T(0);
      }
    }
    for (const Piece& piece : wide_) {
      const RowsView& grads = slices_.grads[piece.slice];
      const std::int64_t pitch = ceil_div(piece.count, p_) * p_;
      pack_elements(kernels_, slices_.basis[piece.slice], 0, slices_.rank, piece, right, row);
      multiply(left, count, right, piece.count, slices_.rank, product);
      for (std::int64_t v = 0; v < count; ++v) {
        T* values = grads.read(kernels_, first + v, piece.start, piece.count, row);
        const T* part = product + v * pitch;
        for (std::int64_t j = 0; j < piece.count; ++j) values[j] -= part[j];
        grads.write(kernels_, first + v, piece.start, piece.count, values);
      }
    }
  }

  const isa::Kernels<T>& kernels_;
  const Slices& slices_;
  std::int64_t p_, group_, rank_pad_, columns_pad_;
  std::vector<Piece> deep_, wide_;
  std::int64_t tasks_;
  int threads_;
  Buffer<double> sums_;
  Buffer<T> product_, left_, right_, row_;
};

template <class T>
void project_slices(const Slices& slices, int passes, int threads) {
  if (slices.vectors >= kManyVectors && slices.rank >= kLargeRank) {
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
