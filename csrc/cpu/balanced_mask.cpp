// S, T = the `focus` best columns by safety and by task;  O = S & T,  N = S - T
// m     = mean of log(safety / task) over columns where both are positive          (0 where there is none)
// alpha = alpha0 + (alpha1 - alpha0) (1 + tanh(sign m)) / 2,   phi = safety - alpha * task
// mask  = columns of N, best safety first, then columns of O, best phi first, until there are `keep`
//                                                                           safety, task [cols], mask bool [cols]
//
// Arithmetic   float64.  Every ranking is by (-score, index), a total order, so ties have one answer.  The sum of logs
//              is the log of a product: the scores' significands are multiplied as integers of 128 bits, their
//              exponents added, and two logs at the end say what 2 * cols would, with less rounding and in any order.
//              phi is a product and a difference, each rounded (this file is compiled without contraction to fused
//              multiply-add): alpha and phi are the same numbers as the reference's, or equal phi could change places.
// Bytes moved  both scores once, the mask once; a few arrays of cols doubles.
// Design       Selection, not sorting: a score is found by counting in bins, linear in cols, and the rest is a few passes
//              over vectors that fit the cache.  One thread.  Bounded by these passes: of about 20 microseconds at 1,000
//              columns selections take 9, m takes 4, copies and checks of the scores 2 (Zen 3).
#include "selection.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numbers>
#include <utility>

#include "buffer.h"
#include "hpa/check.h"
#include "hpa/kernels.h"
#include "rows.h"

namespace hpa {

SelectionScratch::SelectionScratch(std::int64_t cols)
    : phi(cols),
      keys(cols),
      rest(cols),
      safety_focus(cols),
      task_focus(cols),
      both(cols),
      chosen(cols),
      also_chosen(cols) {}

namespace {

constexpr std::uint64_t kSign = std::uint64_t{1} << 63;
constexpr int kBinBits = 8;            // 256 bins: their counts stay in the first-level cache
constexpr std::int64_t kFewKeys = 24;  // sorted by insertion

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

// Unsigned numbers in the order of the scores; adding zero makes one zero of two.
std::uint64_t as_key(double score) {
  const auto bits = std::bit_cast<std::uint64_t>(score + 0.0);
  return (bits & kSign) != 0 ? ~bits : bits | kSign;
}

double as_score(std::uint64_t key) { return std::bit_cast<double>((key & kSign) != 0 ? key & ~kSign : ~key); }

// The count-th largest of the keys, 1 <= count <= size, all in [low, high]: bins cut this range in 256, again and again,
// until few keys are left in it.  No branch depends on a key.  Both arrays are overwritten.
std::uint64_t nth_largest(std::uint64_t* keys, std::uint64_t* rest, std::int64_t size, std::int64_t count,
                          std::uint64_t low, std::uint64_t high) {
  while (size > kFewKeys) {
    if (low == high) return low;
    const int shift = std::max(0, static_cast<int>(std::bit_width(high - low)) - kBinBits);
    std::int64_t bins[1 << kBinBits] = {};
    for (std::int64_t i = 0; i < size; ++i) ++bins[(keys[i] - low) >> shift];
    std::uint64_t bin = (high - low) >> shift;
    for (; count > bins[bin]; --bin) count -= bins[bin];
    std::int64_t left = 0;
    for (std::int64_t i = 0; i < size; ++i) {
      rest[left] = keys[i];
      left += (keys[i] - low) >> shift == bin;
    }
    std::swap(keys, rest);
    size = left;
    low += bin << shift;
    high = std::min(high, low + ((std::uint64_t{1} << shift) - 1));
  }
  for (std::int64_t i = 1; i < size; ++i) {
    const std::uint64_t key = keys[i];
    std::int64_t place = i;
    for (; place > 0 && keys[place - 1] < key; --place) keys[place] = keys[place - 1];
    keys[place] = key;
  }
  return keys[count - 1];
}

std::int64_t count_of(const std::uint8_t* columns, std::int64_t cols) {
  std::int64_t count = 0;
  for (std::int64_t j = 0; j < cols; ++j) count += columns[j];
  return count;
}

// chosen = the `count` best of the columns `among` (null: of all) by (-score, index).  A score is selected, not columns:
// the one that the last of them has; of those that share it the last ones go.
void choose_best(std::uint8_t* chosen, const std::uint8_t* among, const double* scores, std::int64_t cols,
                 std::int64_t count, const SelectionScratch& scratch) {
  if (count <= 0) {
    std::fill(chosen, chosen + cols, std::uint8_t{0});
    return;
  }
  std::uint64_t* keys = scratch.keys.data();
  std::uint64_t low = ~std::uint64_t{0}, high = 0;
  std::int64_t size = 0;
  for (std::int64_t j = 0; j < cols; ++j) {
    const std::uint64_t key = as_key(scores[j]);
    low = std::min(low, key);
    high = std::max(high, key);
    keys[size] = key;
    size += among == nullptr ? 1 : among[j];
  }
  const double last = count >= size ? -std::numeric_limits<double>::infinity()
                                    : as_score(nth_largest(keys, scratch.rest.data(), size, count, low, high));
  for (std::int64_t j = 0; j < cols; ++j) chosen[j] = scores[j] >= last;
  if (among != nullptr) {
    for (std::int64_t j = 0; j < cols; ++j) chosen[j] &= among[j];
  }
  std::int64_t excess = count_of(chosen, cols) - count;
  for (std::int64_t j = cols - 1; excess > 0 && j >= 0; --j) {
    const bool leaves = chosen[j] != 0 && scores[j] == last;
    chosen[j] = leaves ? 0 : chosen[j];
    excess -= leaves;
  }
}

// The product of positive numbers as significand * 2^exponent.  128 bits are kept of the significand, of which the
// leading 64 are used: what others cut off stays far below them.
class Product {
 public:
  // normalize() has to follow after 16 factors at the latest: each can cost a bit.
  void multiply(double factor) {
    const auto bits = std::bit_cast<std::uint64_t>(factor);
    const std::uint64_t fraction = bits & (kOne - 1), exponent = bits >> kFractionBits;
    std::uint64_t significand = (fraction | kOne) << (63 - kFractionBits);  // [2^63, 2^64)
    exponent_ += static_cast<std::int64_t>(exponent) - kBias + 1;
    if (exponent == 0) {  // subnormal: no implicit one
      const int zeros = std::countl_zero(fraction);
      significand = fraction << zeros;
      exponent_ += 64 - kFractionBits - zeros;
    }
    const Wide high = static_cast<Wide>(static_cast<std::uint64_t>(significand_ >> 64)) * significand;
    const Wide low = static_cast<Wide>(static_cast<std::uint64_t>(significand_)) * significand;
    significand_ = high + (low >> 64);
  }
  void normalize() {
    const int zeros = std::countl_zero(static_cast<std::uint64_t>(significand_ >> 64));
    significand_ <<= zeros;
    exponent_ -= zeros;
  }
  // Of a normalized product: [1, 2].
  double significand() const {
    return std::ldexp(static_cast<double>(static_cast<std::uint64_t>(significand_ >> 64)), -63);
  }
  std::int64_t exponent() const { return exponent_; }

 private:
  __extension__ using Wide = unsigned __int128;
  static constexpr int kFractionBits = 52, kBias = 1023;
  static constexpr std::uint64_t kOne = std::uint64_t{1} << kFractionBits;
  Wide significand_ = static_cast<Wide>(1) << 127;
  std::int64_t exponent_ = 0;
};

double mean_log_ratio(const double* safety, const double* task, std::int64_t cols) {
  constexpr std::int64_t kFactors = 16;
  Product safeties, tasks;
  std::int64_t count = 0;
  for (std::int64_t start = 0; start < cols; start += kFactors) {
    for (std::int64_t j = start; j < std::min(start + kFactors, cols); ++j) {
      if (!(safety[j] > 0 && task[j] > 0)) continue;
      safeties.multiply(safety[j]);
      tasks.multiply(task[j]);
      ++count;
    }
    safeties.normalize();
    tasks.normalize();
  }
  if (count == 0) return 0.0;
  const auto exponent = static_cast<double>(safeties.exponent() - tasks.exponent());
  const double sum = std::log(safeties.significand()) - std::log(tasks.significand()) + exponent * std::numbers::ln2;
  return sum / static_cast<double>(count);
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

// What scores are divided by for their mean to be 1; 1 where it is zero.
double mean_or_one(const double* scores, std::int64_t cols) {
  Sum sum;
  for (std::int64_t j = 0; j < cols; ++j) sum.add(scores[j]);
  const double mean = cols == 0 ? 0.0 : sum.value() / static_cast<double>(cols);
  return mean > 0 ? mean : 1.0;
}

// Copies the scores; false where one of them is not finite or negative.
bool read_scores(const TensorView& tensor, double* scores) {
  const RowsView view(tensor, 0);
  const isa::Kernels<double>& kernels = isa::active().f64;
  const double* read = view.read(kernels, 0, 0, view.length(), scores);
  std::int64_t bad = 0;  // of the scores' size, and no branch: vectors
  for (std::int64_t j = 0; j < view.length(); ++j) {
    scores[j] = read[j];
    bad |= scores[j] >= 0 ? 0 : 1;
    bad |= scores[j] <= std::numeric_limits<double>::max() ? 0 : 1;
  }
  return bad == 0;
}

}  // namespace

Selection select_columns(bool* mask, std::int64_t stride, const double* safety, const double* task, std::int64_t cols,
                         const SelectionOptions& options, const SelectionScratch& scratch) {
  using Mode = SelectionOptions::Mode;
  std::uint8_t *safety_focus = scratch.safety_focus.data(), *task_focus = scratch.task_focus.data();
  std::uint8_t *both = scratch.both.data(), *safety_only = task_focus;
  choose_best(safety_focus, nullptr, safety, cols, options.focus, scratch);
  choose_best(task_focus, nullptr, task, cols, options.focus, scratch);
  for (std::int64_t j = 0; j < cols; ++j) {
    both[j] = safety_focus[j] & task_focus[j];
    safety_only[j] = safety_focus[j] & ~task_focus[j];
  }

  Selection result;
  result.overlap = count_of(both, cols);
  result.log_ratio = mean_log_ratio(safety, task, cols);
  result.alpha = choose_alpha(options, result.log_ratio);

  std::uint8_t *chosen = scratch.chosen.data(), *also_chosen = scratch.also_chosen.data();
  std::int64_t left = options.keep;  // to be chosen from the overlap
  std::fill(chosen, chosen + cols, std::uint8_t{0});
  if (options.mode == Mode::eps) {
    choose_best(chosen, nullptr, safety, cols, options.keep, scratch);
    left = 0;
  } else if (options.mode == Mode::full) {
    const bool cap = options.overflow == SelectionOptions::Overflow::cap;
    choose_best(chosen, safety_only, safety, cols, cap ? options.keep : cols, scratch);
    left -= count_of(chosen, cols);
  }
  if (left > 0) {
    const bool over_mean = options.phi_norm == SelectionOptions::PhiNorm::mean;
    const double safety_mean = over_mean ? mean_or_one(safety, cols) : 1.0;
    const double task_mean = over_mean ? mean_or_one(task, cols) : 1.0;
    double* phi = scratch.phi.data();
    for (std::int64_t j = 0; j < cols; ++j) phi[j] = safety[j] / safety_mean - result.alpha * (task[j] / task_mean);
    choose_best(also_chosen, both, phi, cols, left, scratch);
    for (std::int64_t j = 0; j < cols; ++j) chosen[j] |= also_chosen[j];
  }

  for (std::int64_t j = 0; j < cols; ++j) {
    mask[j * stride] = chosen[j] != 0;
    both[j] &= chosen[j];
  }
  result.kept_overlap = count_of(both, cols);
  result.kept_safety_only = count_of(chosen, cols) - result.kept_overlap;
  return result;
}

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

  const Buffer<double> eps(cols), zeta(cols);
  check(read_scores(safety, eps.data()), "safety", "expected finite, non-negative scores");
  check(read_scores(task, zeta.data()), "task", "expected finite, non-negative scores");
  const SelectionScratch scratch(cols);
  return select_columns(static_cast<bool*>(mask.data), mask.stride[0], eps.data(), zeta.data(), cols, options, scratch);
}

}  // namespace hpa
