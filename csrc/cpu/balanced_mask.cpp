// S, T = the `focus` best columns by safety and by task;  O = S & T,  N = S - T
// m     = mean of log(safety / task) over columns where both are positive          (0 where there is none)
// alpha = alpha0 + (alpha1 - alpha0) (1 + tanh(sign m)) / 2,   phi = safety - alpha * task
// mask  = columns of N, best safety first, then columns of O, best phi first, until there are `keep`
//                                                                           safety, task [cols], mask bool [cols]
//
// Arithmetic   float64.  Every ranking is by (-score, index), a total order, so ties have one answer.  The sum behind m
//              is carried in two doubles (about 106 bits), so that its rounding does not depend on the order, and phi
//              is a product and a difference, each rounded (this file is compiled without contraction to fused
//              multiply-add): alpha and phi are the same numbers in every backend, or equal phi could change places.
// Bytes moved  both scores once, the mask once; a few arrays of cols doubles.
// Design       Selection, not sorting: nth_element over values is linear in cols, and the rest is a few passes over
//              vectors that fit the cache.  One thread.  Bounded by the 2 * cols logarithms of the C library, which must
//              be rounded like the other backends' ones: of about 27 microseconds at 1,000 columns 10 (Zen 3).
#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <numeric>
#include <vector>

#include "buffer.h"
#include "hpa/check.h"
#include "hpa/kernels.h"
#include "rows.h"

namespace hpa {
namespace {

using Scores = std::vector<double>;
using Columns = std::vector<std::int64_t>;

// A sum carried in two doubles (Knuth's exact addition), about 106 bits.
class Sum {
 public:
  void add(double value) {
    const double sum = high_ + value;
    const double part = sum - high_;
    low_ += (high_ - (sum - part)) + (value - part);
    high_ = sum;
  }
  double value() const { return high_ + low_; }

 private:
  double high_ = 0, low_ = 0;
};

Scores read_scores(const char* name, const TensorView& tensor) {
  Scores scores(static_cast<std::size_t>(tensor.shape[0]));
  const RowsView view(tensor, 0);
  const isa::Kernels<double>& kernels = isa::active().f64;
  const double* read = view.read(kernels, 0, 0, view.length(), scores.data());
  if (read != scores.data()) std::copy(read, read + scores.size(), scores.data());
  const auto is_good = [](double score) { return 0 <= score && score <= std::numeric_limits<double>::max(); };
  check(std::all_of(scores.begin(), scores.end(), is_good), name, "expected finite, non-negative scores");
  return scores;
}

// The `count` best of `columns`, which ascend, by (-score, index); ascending.  Values are selected, not indices: the score
// that the last of them has says which columns are in, but for those that share it, of which the first ones are.
Columns best_of(const Columns& columns, const Scores& scores, std::int64_t count) {
  if (count >= static_cast<std::int64_t>(columns.size())) return columns;
  Columns chosen;
  if (count <= 0) return chosen;
  Scores values(columns.size());
  for (std::size_t i = 0; i < columns.size(); ++i) values[i] = scores[static_cast<std::size_t>(columns[i])];
  Scores ranked = values;
  std::nth_element(ranked.begin(), ranked.begin() + (count - 1), ranked.end(), std::greater<>());
  const double last = ranked[static_cast<std::size_t>(count - 1)];
  std::int64_t shared = count - std::count_if(values.begin(), values.end(), [&](double value) { return value > last; });
  chosen.reserve(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < columns.size(); ++i) {
    if (values[i] > last || (values[i] == last && shared-- > 0)) chosen.push_back(columns[i]);
  }
  return chosen;
}

Columns all_columns(std::size_t cols) {
  Columns columns(cols);
  std::iota(columns.begin(), columns.end(), 0);
  return columns;
}

// Columns of ascending `a` that are, or are not, in ascending `b`.
Columns common(const Columns& a, const Columns& b) {
  Columns found;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(found));
  return found;
}

Columns difference(const Columns& a, const Columns& b) {
  Columns found;
  std::set_difference(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(found));
  return found;
}

double mean_log_ratio(const Scores& safety, const Scores& task) {
  Sum sum;
  std::int64_t count = 0;
  for (std::size_t j = 0; j < safety.size(); ++j) {
    if (!(safety[j] > 0 && task[j] > 0)) continue;
    sum.add(std::log(safety[j]) - std::log(task[j]));
    ++count;
  }
  return count == 0 ? 0.0 : sum.value() / static_cast<double>(count);
}

double choose_alpha(const SelectionOptions& options, double log_ratio) {
  const double low = options.alpha0, span = options.alpha1 - options.alpha0;
  const double t = std::tanh(options.alpha_sign * log_ratio);
  switch (options.alpha_mode) {
    case SelectionOptions::AlphaMode::affine: return low + span * (1.0 + t) / 2.0;
    case SelectionOptions::AlphaMode::relu: return low + span * std::max(0.0, t);
    case SelectionOptions::AlphaMode::abs: return low + span * std::fabs(t);
    case SelectionOptions::AlphaMode::constant: return low;
  }
  return low;
}

Scores over_mean(const Scores& scores) {
  Sum sum;
  for (const double score : scores) sum.add(score);
  const double mean = scores.empty() ? 0.0 : sum.value() / static_cast<double>(scores.size());
  Scores normalised = scores;
  if (mean > 0) {
    for (double& score : normalised) score /= mean;
  }
  return normalised;
}

Scores balance(const Scores& safety, const Scores& task, double alpha) {
  Scores phi(safety.size());
  for (std::size_t j = 0; j < safety.size(); ++j) phi[j] = safety[j] - alpha * task[j];
  return phi;
}

}  // namespace

Selection balanced_mask(const TensorView& mask, const TensorView& safety, const TensorView& task,
                        const SelectionOptions& options) {
  check_float("safety", safety);
  check_float("task", task);
  check(safety.dims == 1, "safety", "expected 1 dimension");
  const std::int64_t cols = safety.shape[0];
  check_shape("task", task, {cols});
  check_shape("mask", mask, {cols});
  check(mask.dtype == DType::boolean, "mask", "expected bool");
  check(0 <= options.keep && options.keep <= options.focus && options.focus <= cols, "focus",
        "expected 0 <= keep <= focus <= cols");

  const Scores eps = read_scores("safety", safety), zeta = read_scores("task", task);
  const Columns columns = all_columns(eps.size());
  const Columns safety_focus = best_of(columns, eps, options.focus), task_focus = best_of(columns, zeta, options.focus);
  const Columns both = common(safety_focus, task_focus), safety_only = difference(safety_focus, task_focus);

  Selection result;
  result.overlap = static_cast<std::int64_t>(both.size());
  result.log_ratio = mean_log_ratio(eps, zeta);
  result.alpha = choose_alpha(options, result.log_ratio);
  const Scores phi = options.phi_norm == SelectionOptions::PhiNorm::mean
                         ? balance(over_mean(eps), over_mean(zeta), result.alpha)
                         : balance(eps, zeta, result.alpha);

  Columns from_safety_only, from_both;
  switch (options.mode) {
    case SelectionOptions::Mode::eps: {
      const Columns chosen = best_of(columns, eps, options.keep);
      from_both = common(chosen, both);
      from_safety_only = difference(chosen, both);
      break;
    }
    case SelectionOptions::Mode::phi: from_both = best_of(both, phi, options.keep); break;
    case SelectionOptions::Mode::full: {
      const bool cap = options.overflow == SelectionOptions::Overflow::cap;
      from_safety_only = cap ? best_of(safety_only, eps, options.keep) : safety_only;
      from_both = best_of(both, phi, options.keep - static_cast<std::int64_t>(from_safety_only.size()));
      break;
    }
  }
  result.kept_safety_only = static_cast<std::int64_t>(from_safety_only.size());
  result.kept_overlap = static_cast<std::int64_t>(from_both.size());

  auto* out = static_cast<bool*>(mask.data);
  const std::int64_t stride = mask.stride[0];
  for (std::int64_t j = 0; j < cols; ++j) out[j * stride] = false;
  for (const std::int64_t j : from_safety_only) out[j * stride] = true;
  for (const std::int64_t j : from_both) out[j * stride] = true;
  return result;
}

}  // namespace hpa
