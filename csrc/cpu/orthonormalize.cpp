// Rows v of `vectors` become orthonormal, and orthogonal to the rows of `basis`     vectors [m, n], basis [known, n]
//
// Method       Block Gram-Schmidt with reorthogonalisation (Barlow and Smoktunowicz 2013).  For each block of up to 128
//              rows, twice: take out the basis and the rows kept so far (project.cpp), then orthonormalise within the
//              block by the Cholesky factor of its Gram matrix (CholeskyQR2).  The Gram matrix is summed in float64, in
//              which products of two floats are exact, so the first factorisation stands conditions up to 1e6 where one
//              in float32 stands 1e3; the second round starts from nearly orthonormal rows and ends at the unit
//              roundoff.
// Ill cases    Where float64 cannot tell whether a row is kept (less than 1e-12 of its squared length is left and rtol
//              is smaller than that), or lengths are extreme, nothing has been changed and the block goes the slow way:
//              eight rows at a time, vector by vector within them, each orthogonalised twice.
// Dropped      rows with |rest| <= rtol * |v|, and rows that the second round shrinks below 1/sqrt(2) (Kahan and
//              Parlett): what is left of those is rounding noise, which must not be normalised into a direction.
// Arithmetic   as project.cpp; Gram matrices and norms in float64.  Rows are stored in their own dtype between rounds.
// Bytes moved  m <= 128: six times `vectors` (read for each Gram matrix, read and written for each change of rows), where
//              the minimum for two rounds is the same; 2 m^2 n multiply-adds, half of them in float64.
// Design       Kept rows move up over dropped ones, so that rows [0, kept) are always the basis so far.  Columns are cut
//              into tasks by shape alone; partial Gram matrices are added in order.
#include <algorithm>
#include <cmath>
#include <vector>

#include "buffer.h"
#include "hpa/check.h"
#include "hpa/kernels.h"
#include "panels.h"
#include "parallel.h"
#include "rows.h"

namespace hpa {
namespace {

constexpr std::int64_t kBlockRows = 128;     // rows that share a Gram matrix
constexpr std::int64_t kFewRows = 8;         // rows orthogonalised together on the slow way
constexpr std::int64_t kColumns = 512;       // columns of a block that are replaced together
constexpr std::int64_t kChunk = 16 * 1024;   // columns of a task, or more where there would be
constexpr std::int64_t kChunks = 64;         // more tasks than this
constexpr double kTrust = 1e-12;             // part of a squared length that is surely not rounding of the Gram matrix
constexpr double kShortest = 1e-15;          // lengths whose ratios
constexpr double kLongest = 1e15;            // float32 can represent
constexpr std::int64_t kPiece = 4096;        // elements in scratch
constexpr std::int64_t kTask = 16 * kPiece;  // elements of a task
constexpr std::int64_t kGrain = 64 * 1024;   // elements worth a thread

TensorView select_rows(TensorView tensor, std::int64_t first, std::int64_t count) {
  tensor.data = static_cast<char*>(tensor.data) + first * tensor.stride[0] * element_size(tensor.dtype);
  tensor.shape[0] = count;
  return tensor;
}

// Rows of a block that are independent, and for each of them the combination of the block's rows that is orthonormal:
// a lower triangle, [kept][rows].
struct Combination {
  std::vector<std::int64_t> kept;
  std::vector<double> weights;
  bool is_sure = true;
};

template <class T>
class Orthonormalizer {
 public:
  Orthonormalizer(const TensorView& vectors, const std::optional<TensorView>& basis, double rtol, int threads)
      : kernels_(isa::active().kernels<T>()),
        vectors_(vectors),
        rows_(vectors, 1),
        basis_(basis),
        rtol_(rtol),
        threads_(threads),
        row_threads_(useful_threads(rows_.length(), kGrain, threads)),
        tasks_(ceil_div(rows_.length(), kTask)),
        partial_(tasks_),
        chunk_(std::max(kChunk, ceil_div(ceil_div(rows_.length(), kChunks), kColumns) * kColumns)),
        scratch_(row_threads_ * kPiece) {}

  OrthonormalizeResult run() {
    OrthonormalizeResult result;
    std::vector<double> lengths;
    for (std::int64_t row = 0; row < rows_.rows(); ++row) {
      lengths.push_back(norm(row));
      if (!std::isfinite(lengths.back())) {
        result.bad_row = row;
        return result;
      }
    }
    std::int64_t kept = 0;
    for (std::int64_t start = 0; start < rows_.rows(); start += kBlockRows) {
      const std::int64_t count = std::min(kBlockRows, rows_.rows() - start);
      kept = add_block(start, count, kept, lengths);
    }
    for (std::int64_t row = kept; row < rows_.rows(); ++row) scale_to(row, row, 0.0);
    result.kept = kept;
    return result;
  }

 private:
  // Takes rows [start, start + count), writes those that are independent from row `kept` on; returns where they end.
  std::int64_t add_block(std::int64_t start, std::int64_t count, std::int64_t kept,
                         const std::vector<double>& lengths) {
    const double* length = lengths.data() + start;
    const bool ordinary = std::all_of(
        length, length + count, [](double value) { return value == 0 || (kShortest < value && value < kLongest); });
    if (!ordinary) return add_few_at_a_time(start, count, kept, lengths);
    project_out(start, count, kept);
    std::vector<double> smallest(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) smallest[static_cast<std::size_t>(i)] = std::pow(rtol_ * length[i], 2);
    const Combination first = factor(start, count, smallest);
    if (!first.is_sure) return add_few_at_a_time(start, count, kept, lengths);
    combine(start, count, first, kept);
    const auto found = static_cast<std::int64_t>(first.kept.size());
    project_out(kept, found, kept);
    const Combination second = factor(kept, found, std::vector<double>(first.kept.size(), 0.5));
    combine(kept, found, second, kept);
    return kept + static_cast<std::int64_t>(second.kept.size());
  }

  // Cholesky factorisation of the Gram matrix of rows [start, start + count), which leaves out rows of which not more
  // than `smallest` remains as a squared length.
  Combination factor(std::int64_t start, std::int64_t count, const std::vector<double>& smallest) {
    const Buffer<double> gram = add_up_gram(start, count);
    Combination result;
    std::vector<double> lower;  // of the factor, [kept][kept]: pitch count
    lower.resize(static_cast<std::size_t>(count * count));
    for (std::int64_t row = 0; row < count; ++row) {
      const auto known = static_cast<std::int64_t>(result.kept.size());
      double* l = lower.data() + known * count;
      double rest = gram[row * count + row];
      for (std::int64_t k = 0; k < known; ++k) {
        const double* other = lower.data() + k * count;
        double sum = gram[row * count + result.kept[static_cast<std::size_t>(k)]];
        for (std::int64_t i = 0; i < k; ++i) sum -= l[i] * other[i];
        l[k] = sum / other[k];
        rest -= l[k] * l[k];
      }
      const double limit = smallest[static_cast<std::size_t>(row)];
      const double noise = kTrust * gram[row * count + row];
      if (rest > limit && rest > noise) {
        l[known] = std::sqrt(rest);
        result.kept.push_back(row);
      } else if (limit < noise) {
        result.is_sure = false;
        return result;
      }
    }
    // Rows of the inverse of the factor, spread to the places of the rows that they weigh.
    const auto found = static_cast<std::int64_t>(result.kept.size());
    result.weights.resize(static_cast<std::size_t>(found * count));
    for (std::int64_t i = 0; i < found; ++i) {
      const double* l = lower.data() + i * count;
      double* weights = result.weights.data() + i * count;
      weights[result.kept[static_cast<std::size_t>(i)]] = 1;
      for (std::int64_t k = 0; k < i; ++k) {
        const double* other = result.weights.data() + k * count;
        for (std::int64_t j = 0; j < count; ++j) weights[j] -= l[k] * other[j];
      }
      for (std::int64_t j = 0; j < count; ++j) weights[j] /= l[i];
    }
    return result;
  }

  // Lower triangle of the Gram matrix of rows [start, start + count), [count, count].
  Buffer<double> add_up_gram(std::int64_t start, std::int64_t count) {
    const std::int64_t chunks = ceil_div(rows_.length(), chunk_), size = count * count;
    Buffer<double> partial(std::max<std::int64_t>(chunks, 1) * size);
    const isa::Kernels<double>& wide = isa::active().kernels<double>();
    parallel_for(chunks, block_threads(count), [&](std::int64_t task, int) {
      double* out = partial.data() + task * size;
      std::fill(out, out + size, 0.0);
      const std::int64_t first = task * chunk_;
      const MatrixView source{
          static_cast<char*>(vectors_.data) +
              (start * vectors_.stride[0] + first * vectors_.stride[1]) * element_size(vectors_.dtype),
          vectors_.dtype,
          count,
          std::min(chunk_, rows_.length() - first),
          vectors_.stride[0],
          vectors_.stride[1]};
      add_gram(wide, source, 1.0, MatrixView{out, DType::f64, count, count, count, 1}, 1);
    });
    for (std::int64_t task = 1; task < chunks; ++task) {
      for (std::int64_t i = 0; i < size; ++i) partial[i] += partial[task * size + i];
    }
    if (chunks == 0) std::fill(partial.data(), partial.data() + size, 0.0);
    return partial;
  }

  // Rows [to, to + kept) = the combination of rows [start, start + count); to <= start.
  void combine(std::int64_t start, std::int64_t count, const Combination& combination, std::int64_t to) {
    const auto found = static_cast<std::int64_t>(combination.kept.size());
    if (found == 0) return;
    const std::int64_t p = kernels_.panel, panels = ceil_div(found, p), width = ceil_div(kColumns, p) * p;
    const int threads = block_threads(count);
    Buffer<T> weights(panels * p * count);  // panels [depth = row][lane = result]
    for (std::int64_t lane = 0; lane < panels * p; ++lane) {
      T* out = weights.data() + lane / p * count * p + lane % p;
      for (std::int64_t j = 0; j < count; ++j) {
        out[j * p] =
            lane < found ? static_cast<T>(combination.weights[static_cast<std::size_t>(lane * count + j)]) : T(0);
      }
    }
    Buffer<T> packed(threads * count * width), product(threads * p * width), line(threads * kColumns);
    parallel_for(ceil_div(rows_.length(), kColumns), threads, [&](std::int64_t task, int thread) {
      const std::int64_t at = task * kColumns, columns = std::min(kColumns, rows_.length() - at);
      T* source = packed.data() + thread * count * width;
      T* out = product.data() + thread * p * width;
      T* scratch = line.data() + thread * kColumns;
      for (std::int64_t row = 0; row < count; ++row) {
        const T* values = rows_.read(kernels_, start + row, at, columns, scratch);
        for (std::int64_t j = 0; j < columns; j += p) {
          T* panel = source + j * count + row * p;
          const std::int64_t lanes = std::min(p, columns - j);
          std::copy(values + j, values + j + lanes, panel);
          std::fill(panel + lanes, panel + p, T(0));
        }
      }
      for (std::int64_t i = 0; i < panels; ++i) {
        const std::int64_t results = std::min(p, found - i * p);
        // The last row that a panel of the triangle weighs.
        const std::int64_t depth = combination.kept[static_cast<std::size_t>(i * p + results - 1)] + 1;
        std::fill(out, out + p * width, T(0));
        for (std::int64_t j = 0; j < columns; j += p) {
          kernels_.update(depth, weights.data() + i * count * p, source + j * count, T(1), p, p, p, out + j, width);
        }
        for (std::int64_t r = 0; r < results; ++r) write(to + i * p + r, at, columns, out + r * width);
      }
    });
  }

  void write(std::int64_t row, std::int64_t at, std::int64_t count, const T* values) {
    if (T* direct = rows_.in_place<T>(row, at)) {
      std::copy(values, values + count, direct);
    } else {
      rows_.write(kernels_, row, at, count, values);
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
  std::optional<TensorView> basis_;
  double rtol_;
  int threads_, row_threads_;
  std::int64_t tasks_;
  Buffer<double> partial_;
  std::int64_t chunk_;
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
