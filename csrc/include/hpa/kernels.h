// The kernels.  Pointers, shapes and strides come in, results go into memory that the caller owns; no kernel
// knows of Python or torch.  `threads` is an upper bound: small work stays on one thread.  Results do not depend on it.
//
// All throw std::invalid_argument for arguments that do not fit and std::bad_alloc when scratch memory runs out, both
// before anything is written.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "hpa/tensor_view.h"

namespace hpa {

// gram[i, j] += scale * sum_t x[t, i] x[t, j]  for j <= i.   gram [cols, cols] f32|f64, x [tokens, cols].
void accumulate_gram(const TensorView& gram, const TensorView& x, double scale, int threads);

enum class FactorStatus { ok, not_positive_definite, non_finite };
enum class DiagonalMode { exact, pivot };

struct InverseDiagonalResult {
  FactorStatus status = FactorStatus::ok;
  double lambda = 0;  // not positive: nothing was computed
  bool low_rank = false;
};

// out[j] = [(G + lambda I)^-1]_jj, or U_jj^2 with (G + lambda I)^-1 = U^T U; lambda = damping * mean(diag G).
// G is the lower triangle of gram [cols, cols], or scale * x^T x with x = activations [tokens, cols].
InverseDiagonalResult inverse_diagonal(const TensorView& out, const std::optional<TensorView>& gram,
                                       const std::optional<TensorView>& activations, double scale, double damping,
                                       DiagonalMode mode, int threads);

// importance += g^2, or += |w g| where weights are given; lists of equal shapes.
void accumulate_importance(const std::vector<TensorView>& importance, const std::vector<TensorView>& grads,
                           const std::vector<TensorView>& weights, int threads);

// With d = after - before:  column_change[j] = mean_i d[i, j]^2,  scalars = { <d, before>, |before|^2, |d|^2 },
// for each layer by itself.
struct ChangeLayer {
  TensorView column_change, scalars, before, after;
};
void change_statistics(std::span<const ChangeLayer> layers, int threads);

inline void change_statistics(const TensorView& column_change, const TensorView& scalars, const TensorView& before,
                              const TensorView& after, int threads) {
  const ChangeLayer layer = {column_change, scalars, before, after};
  change_statistics(std::span(&layer, 1), threads);
}

struct SelectionOptions {
  std::int64_t keep = 0;
  std::int64_t focus = 0;
  double alpha0 = 0.4;
  double alpha1 = 0.8;
  enum class Mode { full, eps, phi } mode = Mode::full;
  enum class AlphaMode { affine, relu, abs, constant } alpha_mode = AlphaMode::affine;
  int alpha_sign = 1;
  enum class Overflow { cap, keep } overflow = Overflow::cap;
  enum class PhiNorm { none, mean } phi_norm = PhiNorm::none;
};

struct Selection {
  double alpha = 0;
  double log_ratio = 0;
  std::int64_t overlap = 0;
  std::int64_t kept_safety_only = 0;
  std::int64_t kept_overlap = 0;
};

// The columns that go back to the old weights: mask [cols] bool from two scores [cols].
Selection balanced_mask(const TensorView& mask, const TensorView& safety, const TensorView& task,
                        const SelectionOptions& options);

// after[:, j] = mask[j] ? before[:, j] : after[:, j] - projection * before[:, j],  for each layer by itself.
struct MergeLayer {
  TensorView after, before, mask;
  double projection = 0;
};
void merge(std::span<const MergeLayer> layers, int threads);

inline void merge(const TensorView& after, const TensorView& before, const TensorView& mask, double projection,
                  int threads) {
  const MergeLayer layer = {after, before, mask, projection};
  merge(std::span(&layer, 1), threads);
}

// The paper's whole rule on each layer: change_statistics, a selection by scores column_change / diagonal, merge with
// projection = <after - before, before> / |before|^2 (0 where not `adjusts`).  `options` says all but the counts.
struct EditLayer {
  TensorView after, before, safety_diagonal, task_diagonal;  // diagonals [cols], positive and finite
  TensorView column_change, scalars, mask;                   // results, as of the three functions
  std::int64_t keep = 0, focus = 0;
  Selection selection{};  // results
  double projection = 0;

  bool is_changed() const { return projection != 0 || selection.kept_safety_only + selection.kept_overlap > 0; }
};
// Answers how many layers were edited, from the first on: all, or fewer where a number was not finite or scratch memory ran
// out later than at the first.  The others' weights are as they were.
std::size_t edit(std::span<EditLayer> layers, const SelectionOptions& options, bool adjusts, int threads);

// g -= sum_k <g, q_k> q_k for m vectors at once.  grads[i] is [m, *shape_i], basis[i] is [rank, *shape_i]: slice i of
// every vector; dot products are summed over the list.
void project(const std::vector<TensorView>& grads, const std::vector<TensorView>& basis, int passes, int threads);

struct OrthonormalizeResult {
  std::int64_t kept = 0;
  std::int64_t bad_row = -1;  // first row with NaN or Inf: nothing was written
};

// Rows of vectors [m, n] become orthonormal, also to the rows of basis [known, n]; dependent rows are dropped.
OrthonormalizeResult orthonormalize(const TensorView& vectors, const std::optional<TensorView>& basis, double rtol,
                                    int threads);

}  // namespace hpa
