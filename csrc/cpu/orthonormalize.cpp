// Rows v of `vectors` become orthonormal, and orthogonal to the rows of `basis`     vectors [m, n], basis [known, n]
//
// Method       Block Gram-Schmidt with reorthogonalisation (Barlow and Smoktunowicz 2013).  For each block of up to 128
//              rows, twice: take out the basis and the rows kept so far (project.cpp), then V = L Q with the Cholesky
//              factor L of the block's Gram matrix (CholeskyQR2).  The first Gram matrix is summed in float32 over at
//              most 2048 columns and in float64 beyond.  Where its factor finds that less than 1e-4 of a row's squared
//              length is new, or that a row may have to be dropped, it is summed again in float64 throughout, in which
//              products of two floats are exact: that stands conditions up to 1e6, float32 1e3.  The second round starts
//              from nearly orthonormal rows and ends at the unit roundoff; where its Gram matrix says that the first
//              has got there (rows of random numbers), it is left out.
//              Q comes from forward substitution, not from an inverse: each column of Q solves a triangular system that
//              differs from L by roundoff, so L Q is V up to the roundoff of V, whatever the condition.
// Ill cases    Where float64 cannot tell whether a row is kept (less than 1e-12 of its squared length is left and rtol
//              is smaller than that), or lengths are extreme, no factor has been used and the block goes the slow way:
//              eight rows at a time, vector by vector within them, each orthogonalised twice.
// Dropped      rows with |rest| <= rtol * |v|, and rows that the second round shrinks below 1/sqrt(2) (Kahan and
//              Parlett): what is left of those is rounding noise, which must not be normalised into a direction.
// Arithmetic   as project.cpp; rows are stored in their own dtype between rounds.
// Flops        4 m^2 n for m <= 128 without a basis: two Gram matrices and two substitutions of m^2 n each; 3 m^2 n
//              without the second substitution, 5 m^2 n where the first Gram matrix is summed twice. Householder QR with
//              its Q takes 4.
// Bytes moved  five times `vectors`: read for the first Gram matrix, then read and written by two substitutions (three
//              times by one). The second Gram matrix is summed from each chunk of columns while it is in the cache.
// Bound        multiply-adds. Zen 3, one thread under load, 64 x 131072 float32, when all first sums were float64: 36
//              GF/s by the count above, where torch.linalg.qr gets 14. Seven tenths of the time are the inner loops,
//              three tenths the copies between memory and the second-level cache.
// Design       Kept rows move up over dropped ones, so that rows [0, kept) are always the basis so far.  A chunk of
//              columns is copied into the second-level cache and worked on there.  Chunks are dealt to tasks by shape
//              alone and the tasks' Gram matrices added in order: the result does not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "buffer.h"
#include "hpa/check.h"
#include "hpa/kernels.h"
#include "panels.h"
#include "parallel.h"
#include "rows.h"

namespace hpa {
namespace {

constexpr std::int64_t kBlockRows = 128;          // rows that share a Gram matrix
constexpr std::int64_t kFewRows = 8;              // rows orthogonalised together on the slow way
constexpr std::int64_t kChunkBytes = 256 * 1024;  // of rows in the second-level cache
constexpr std::int64_t kSum = 2048;               // most columns of them: the length of a sum in float32
constexpr std::int64_t kTasks = 64;               // most tasks, each with a Gram matrix of its own
constexpr double kTrust = 1e-12;      // part of a squared length that is surely not rounding of the Gram matrix
constexpr double kTrustShort = 1e-4;  // the same where its sums are float32
constexpr double kShortSums[] = {1e-20, 1e20};  // squared lengths for which those are
constexpr double kOrthonormal = 8 * 0x1p-24;    // Frobenius norm of what a second round would take out for nothing
constexpr double kShortest = 1e-15;             // lengths whose ratios
constexpr double kLongest = 1e15;               // float32 can represent
constexpr std::int64_t kPiece = 4096;           // elements in scratch
constexpr std::int64_t kTask = 16 * kPiece;     // elements of a task
constexpr std::int64_t kGrain = 64 * 1024;      // elements worth a thread

TensorView select_rows(TensorView tensor, std::int64_t first, std::int64_t count) {
  tensor.data = static_cast<char*>(tensor.data) + first * tensor.stride[0] * element_size(tensor.dtype);
  tensor.shape[0] = count;
  return tensor;
}

// Rows of a block that are independent, and the Cholesky factor of their Gram matrix: a lower triangle, [kept][rows].
struct Factor {
  std::vector<std::int64_t> kept;
  std::vector<double> lower;
  bool is_sure = true;

  std::int64_t order() const { return static_cast<std::int64_t>(kept.size()); }
};

// Rows cut into chunks of columns that stay in the second-level cache as T, and chunks dealt to tasks.
template <class T>
struct Chunks {
  std::int64_t length, width, pitch, per_task, tasks;

  Chunks(std::int64_t rows, std::int64_t columns) : length(columns) {
    constexpr std::int64_t size = sizeof(T), line = 64;
    const std::int64_t p = isa::active().kernels<T>().panel;
    const std::int64_t widest =
        std::clamp<std::int64_t>(kChunkBytes / (std::max<std::int64_t>(rows, 1) * size), 1, kSum);
    width = ceil_div(std::clamp<std::int64_t>(columns, 1, widest), p) * p;
    pitch = (ceil_div(width * size, line) | 1) * line / size;  // an odd number of lines: no two rows share all sets
    per_task = std::max<std::int64_t>(ceil_div(ceil_div(columns, width), kTasks), 1);
    tasks = ceil_div(columns, per_task * width);
  }

  template <class Body>
  void for_each(std::int64_t task, const Body& body) const {
    const std::int64_t stop = std::min(length, (task + 1) * per_task * width);
    for (std::int64_t at = task * per_task * width; at < stop; at += width) body(at, std::min(width, length - at));
  }
};

template <class T>
class Orthonormalizer {
 public:
  Orthonormalizer(const TensorView& vectors, const std::optional<TensorView>& basis, double rtol, int threads)
      : kernels_(isa::active().kernels<T>()),
        vectors_(vectors),
        rows_(vectors, 1),
        matrix_(as_matrix("vectors", vectors)),
        basis_(basis),
        rtol_(rtol),
        threads_(threads),
        row_threads_(useful_threads(rows_.length(), kGrain, threads)),
        tasks_(ceil_div(rows_.length(), kTask)),
        partial_(tasks_),
        scratch_(row_threads_ * kPiece) {}

  OrthonormalizeResult run() {
    OrthonormalizeResult result;
    // With nothing to take out of them first, the Gram matrix of the rows says their lengths.
    const bool alone = !basis_ && rows_.rows() <= kBlockRows;
    Sums sums;
    if (alone) sums = add_up(0, rows_.rows());
    std::vector<double> lengths;
    for (std::int64_t row = 0; row < rows_.rows(); ++row) {
      lengths.push_back(alone ? std::sqrt(sums.gram[row * rows_.rows() + row]) : norm(row));
      if (!std::isfinite(lengths.back())) {
        result.bad_row = row;
        return result;
      }
    }
    std::int64_t kept = 0;
    for (std::int64_t start = 0; start < rows_.rows(); start += kBlockRows) {
      const std::int64_t count = std::min(kBlockRows, rows_.rows() - start);
      const double* length = lengths.data() + start;
      const bool ordinary = std::all_of(
          length, length + count, [](double value) { return value == 0 || (kShortest < value && value < kLongest); });
      if (ordinary && !alone) {
        project_out(start, count, kept);
        sums = add_up(start, count);
      }
      const std::optional<std::int64_t> end = ordinary ? add_block(start, count, kept, length, sums) : std::nullopt;
      kept = end ? *end : add_few_at_a_time(start, count, kept, lengths);
    }
    for (std::int64_t row = kept; row < rows_.rows(); ++row) scale_to(row, row, 0.0);
    result.kept = kept;
    return result;
  }

 private:
  using Gram = Buffer<double>;

  // The Gram matrix of a block, and whether it was summed in T within a chunk.
  struct Sums {
    Gram gram = Gram(0);
    bool is_short = false;
  };

  // In float32 if that does, else in float64.
  Sums add_up(std::int64_t start, std::int64_t count) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      Sums sums{add_up_gram<T>(start, count), true};
      bool does = true;
      for (std::int64_t row = 0; row < count; ++row) {
        const double square = sums.gram[row * count + row];
        does = does && kShortSums[0] < square && square < kShortSums[1];
      }
      if (does) return sums;
    }
    return {add_up_gram<double>(start, count), false};
  }

  // Takes rows [start, start + count), whose Gram matrix is given, writes those that are independent from row `kept`
  // on.  Returns where they end, or nothing, with nothing written, where float64 cannot tell.
  std::optional<std::int64_t> add_block(std::int64_t start, std::int64_t count, std::int64_t kept, const double* length,
                                        const Sums& sums) {
    std::vector<double> smallest(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) smallest[static_cast<std::size_t>(i)] = std::pow(rtol_ * length[i], 2);
    const Factor first = first_factor(start, count, smallest, sums);
    if (!first.is_sure) return std::nullopt;
    if (first.order() == 0) return kept;
    const bool alone = !basis_ && kept == 0;
    Gram next(0);
    substitute(start, count, first, kept, alone ? &next : nullptr);
    if (!alone) {
      project_out(kept, first.order(), kept);
      next = add_up_gram<double>(kept, first.order());
    }
    if (is_orthonormal(first.order(), next)) return kept + first.order();
    const Factor second = factorize(first.order(), next, std::vector<double>(first.kept.size(), 0.5), kTrust);
    substitute(kept, first.order(), second, kept, nullptr);
    return kept + second.order();
  }

  // Of short sums, where they keep every row by a margin; which row is dropped is decided in float64 alone.
  Factor first_factor(std::int64_t start, std::int64_t count, const std::vector<double>& smallest,
                      const Sums& sums) const {
    if (!sums.is_short) return factorize(count, sums.gram, smallest, kTrust);
    std::vector<double> with_margin = smallest;
    for (double& limit : with_margin) limit *= 1.01;
    Factor factor = factorize(count, sums.gram, with_margin, kTrustShort);
    if (factor.is_sure && factor.order() == count) return factor;
    return factorize(count, add_up_gram<double>(start, count), smallest, kTrust);
  }

  // Whether a second round would give rows that are no closer to orthonormal.
  static bool is_orthonormal(std::int64_t order, const Gram& gram) {
    if (sizeof(T) != sizeof(float)) return false;
    double squares = 0;
    for (std::int64_t i = 0; i < order; ++i) {
      for (std::int64_t j = 0; j < i; ++j) squares += 2 * std::pow(gram[i * order + j], 2);
      squares += std::pow(gram[i * order + i] - 1, 2);
    }
    return std::sqrt(squares) <= kOrthonormal;
  }

  // Cholesky factorisation of a Gram matrix [count, count], which leaves out rows of which not more than `smallest`
  // remains as a squared length.  What is less than the part `trust` of a squared length may be rounding of the matrix.
  static Factor factorize(std::int64_t count, const Gram& gram, const std::vector<double>& smallest, double trust) {
    Factor result;
    result.lower.resize(static_cast<std::size_t>(count * count));
    for (std::int64_t row = 0; row < count; ++row) {
      const std::int64_t known = result.order();
      double* l = result.lower.data() + known * count;
      double rest = gram[row * count + row];
      for (std::int64_t k = 0; k < known; ++k) {
        const double* other = result.lower.data() + k * count;
        double sum = gram[row * count + result.kept[static_cast<std::size_t>(k)]];
        for (std::int64_t i = 0; i < k; ++i) sum -= l[i] * other[i];
        l[k] = sum / other[k];
        rest -= l[k] * l[k];
      }
      const double limit = smallest[static_cast<std::size_t>(row)];
      const double noise = trust * gram[row * count + row];
      if (rest > limit && rest > noise) {
        l[known] = std::sqrt(rest);
        result.kept.push_back(row);
      } else if (limit < noise) {
        result.is_sure = false;
        return result;
      }
    }
    return result;
  }

  // Lower triangle of the Gram matrix of rows [start, start + count): S within a chunk, float64 over chunks.
  template <class S>
  Gram add_up_gram(std::int64_t start, std::int64_t count) const {
    const isa::Kernels<S>& kernels = isa::active().kernels<S>();
    const Chunks<S> chunks(count, matrix_.cols);
    const int threads = block_threads(count);
    const auto load = kernels.load[static_cast<int>(matrix_.dtype)];
    Gram partial(std::max<std::int64_t>(chunks.tasks, 1) * count * count);
    Buffer<S> scratch(threads * count * chunks.pitch);
    parallel_for(chunks.tasks, threads, [&](std::int64_t task, int thread) {
      double* gram = partial.data() + task * count * count;
      S* rows = scratch.data() + thread * count * chunks.pitch;
      std::fill(gram, gram + count * count, 0.0);
      chunks.for_each(task, [&](std::int64_t at, std::int64_t columns) {
        const std::int64_t padded = ceil_div(columns, kernels.panel) * kernels.panel;
        for (std::int64_t row = 0; row < count; ++row) {
          S* to = rows + row * chunks.pitch;
          load(matrix_.at(start + row, at), matrix_.col_stride, columns, to);
          std::fill(to + columns, to + padded, S(0));
        }
        kernels.add_row_products(count, rows, chunks.pitch, padded, gram);
      });
    });
    add_over_tasks(chunks.tasks, count, partial);
    return partial;
  }

  // Rows [to, to + order) = L^-1 times those of rows [start, ...) that the factor keeps; to <= start.  Their Gram matrix
  // is added up on the way where the caller wants it: in T within a chunk, which serves rows close to orthonormal.
  void substitute(std::int64_t start, std::int64_t count, const Factor& factor, std::int64_t to, Gram* gram) const {
    const std::int64_t order = factor.order(), q = kernels_.strip, padded_order = ceil_div(order, q) * q;
    if (order == 0) return;
    const Chunks<T> chunks(padded_order, matrix_.cols);
    const int threads = block_threads(order);
    Buffer<T> strips(padded_order * padded_order), scratch(threads * padded_order * chunks.pitch);
    for (std::int64_t i = 0; i < padded_order; ++i) {
      for (std::int64_t d = 0; d < padded_order; ++d) {
        const double element = i >= order ? static_cast<double>(i == d)
                                          : factor.lower[static_cast<std::size_t>(i * count + std::min(d, i))];
        strips[i / q * q * padded_order + d * q + i % q] = d <= i ? static_cast<T>(element) : T(0);
      }
    }
    std::fill(scratch.data(), scratch.data() + threads * padded_order * chunks.pitch, T(0));
    if (gram != nullptr) *gram = Gram(std::max<std::int64_t>(chunks.tasks, 1) * order * order);
    parallel_for(chunks.tasks, threads, [&](std::int64_t task, int thread) {
      T* rows = scratch.data() + thread * padded_order * chunks.pitch;
      double* sums = gram != nullptr ? gram->data() + task * order * order : nullptr;
      if (sums != nullptr) std::fill(sums, sums + order * order, 0.0);
      chunks.for_each(task, [&](std::int64_t at, std::int64_t columns) {
        const std::int64_t padded = ceil_div(columns, kernels_.panel) * kernels_.panel;
        for (std::int64_t i = 0; i < order; ++i) {
          T* row = rows + i * chunks.pitch;
          load(start + factor.kept[static_cast<std::size_t>(i)], at, columns, row);
          std::fill(row + columns, row + padded, T(0));
        }
        kernels_.substitute_rows(padded_order, strips.data(), rows, chunks.pitch, padded);
        for (std::int64_t i = 0; i < order; ++i) {
          T* row = rows + i * chunks.pitch;
          kernels_.store[static_cast<int>(matrix_.dtype)](row, columns, matrix_.at(to + i, at), matrix_.col_stride);
          if (sums != nullptr && matrix_.dtype != kNative<T>) load(to + i, at, columns, row);  // as it is stored
        }
        if (sums != nullptr) kernels_.add_row_products(order, rows, chunks.pitch, padded, sums);
      });
    });
    if (gram != nullptr) add_over_tasks(chunks.tasks, order, *gram);
  }

  void load(std::int64_t row, std::int64_t at, std::int64_t columns, T* to) const {
    kernels_.load[static_cast<int>(matrix_.dtype)](matrix_.at(row, at), matrix_.col_stride, columns, to);
  }

  // The sum of the tasks' matrices, in the place of the first.
  static void add_over_tasks(std::int64_t tasks, std::int64_t order, const Gram& partial) {
    const std::int64_t size = order * order;
    if (tasks == 0) std::fill(partial.data(), partial.data() + size, 0.0);
    for (std::int64_t task = 1; task < tasks; ++task) {
      for (std::int64_t i = 0; i < size; ++i) partial[i] += partial[task * size + i];
    }
  }

  int block_threads(std::int64_t count) const {
    return useful_threads(count * count * rows_.length(), kGrain, threads_);
  }

  // The slow way for a block: rows a few at a time, vector by vector within them.
  std::int64_t add_few_at_a_time(std::int64_t start, std::int64_t count, std::int64_t kept,
                                 const std::vector<double>& lengths) {
    for (std::int64_t row = start; row < start + count; row += kFewRows) {
      const std::int64_t found = first_sweep(row, std::min(kFewRows, start + count - row), kept, lengths);
      kept = second_sweep(kept, found);
    }
    return kept;
  }

  // Takes rows [start, start + count), writes those that are independent from row `kept` on; returns where they end.
  std::int64_t first_sweep(std::int64_t start, std::int64_t count, std::int64_t kept,
                           const std::vector<double>& lengths) {
    project_out(start, count, kept);
    std::int64_t found = kept;
    for (std::int64_t row = start; row < start + count; ++row) {
      project_rows(row, 1, select_rows(vectors_, kept, found - kept));
      const double rest = norm(row);
      if (rest > rtol_ * lengths[static_cast<std::size_t>(row)]) scale_to(row, found++, 1.0 / rest);
    }
    return found;
  }

  // Orthogonalises unit rows [kept, found) once more; returns where those that survive end.
  std::int64_t second_sweep(std::int64_t kept, std::int64_t found) {
    project_out(kept, found - kept, kept);
    std::int64_t survivors = kept;
    for (std::int64_t row = kept; row < found; ++row) {
      project_rows(row, 1, select_rows(vectors_, kept, survivors - kept));
      const double rest = norm(row);
      if (rest >= std::sqrt(0.5)) scale_to(row, survivors++, 1.0 / rest);
    }
    return survivors;
  }

  void project_out(std::int64_t start, std::int64_t count, std::int64_t kept) {
    if (basis_) project_rows(start, count, *basis_);
    project_rows(start, count, select_rows(vectors_, 0, kept));
  }

  void project_rows(std::int64_t start, std::int64_t count, const TensorView& known) {
    if (known.shape[0] > 0) project({select_rows(vectors_, start, count)}, {known}, 1, threads_);
  }

  double norm(std::int64_t row) {
    for_each_piece([&](std::int64_t task, std::int64_t at, std::int64_t count, T* scratch) {
      const double squares = kernels_.sum_of_squares(rows_.read(kernels_, row, at, count, scratch), count);
      partial_[task] = (at == task * kTask ? 0.0 : partial_[task]) + squares;
    });
    double sum = 0;
    for (std::int64_t task = 0; task < tasks_; ++task) sum += partial_[task];
    return std::sqrt(sum);
  }

  // Row `to` = factor * row `from`.
  void scale_to(std::int64_t from, std::int64_t to, double factor) {
    for_each_piece([&](std::int64_t, std::int64_t at, std::int64_t count, T* scratch) {
      const T* values = rows_.read(kernels_, from, at, count, scratch);
      if (factor == 0) {
        std::fill(scratch, scratch + count, T(0));
      } else {
        if (values != scratch) std::copy(values, values + count, scratch);
        kernels_.scale(factor, count, scratch);
      }
      rows_.write(kernels_, to, at, count, scratch);
    });
  }

  template <class Body>
  void for_each_piece(const Body& body) {
    parallel_for(tasks_, row_threads_, [&](std::int64_t task, int thread) {
      const std::int64_t stop = std::min(rows_.length(), (task + 1) * kTask);
      for (std::int64_t at = task * kTask; at < stop; at += kPiece) {
        body(task, at, std::min(kPiece, stop - at), scratch_.data() + thread * kPiece);
      }
    });
  }

  const isa::Kernels<T>& kernels_;
  TensorView vectors_;
  RowsView rows_;
  MatrixView matrix_;
  std::optional<TensorView> basis_;
  double rtol_;
  int threads_, row_threads_;
  std::int64_t tasks_;
  Buffer<double> partial_;
  Buffer<T> scratch_;
};

}  // namespace

OrthonormalizeResult orthonormalize(const TensorView& vectors, const std::optional<TensorView>& basis, double rtol,
                                    int threads) {
  const MatrixView rows = as_matrix("vectors", vectors);
  if (basis) {
    const MatrixView known = as_matrix("basis", *basis);
    check_shape("basis", *basis, {known.rows, rows.cols});
    check(known.dtype == rows.dtype, "basis", "expected the dtype of vectors");
  }
  if (rows.dtype == DType::f64) return Orthonormalizer<double>(vectors, basis, rtol, threads).run();
  return Orthonormalizer<float>(vectors, basis, rtol, threads).run();
}

}  // namespace hpa
