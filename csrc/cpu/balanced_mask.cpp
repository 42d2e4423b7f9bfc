// S, T = the `focus` best columns by safety and by task;  O = S & T,  N = S - T
// m     = mean of log(safety / task) over columns where both are positive          (0 where there is none)
// alpha = alpha0 + (alpha1 - alpha0) (1 + tanh(sign m)) / 2,   phi = safety - alpha * task
// mask  = columns of N, best safety first, then columns of O, best phi first, until there are `keep`
//                                                                           safety, task [cols], mask bool [cols]
//
// Arithmetic   float64.  Every ranking is by (-score, index), a total order, so ties have one answer.  The sum of logs
//              is the log of a product: significands are multiplied with the errors of these multiplications carried
//              along, exponents added, and two logs at the end say what 2 * cols would, with less rounding and in any
//              order.  phi is a product and a difference, each rounded (this file is compiled without contraction to
//              fused multiply-add): alpha and phi are the same numbers as the reference's, or equal phi could change
//              places.
// Bytes moved  both scores once, the mask once; a few arrays of cols doubles.
// Design       Selection, not sorting: the score of a rank is found by keeping what lies between two numbers of a sample,
//              linear in cols, and the rest is a few passes over vectors that fit the cache, on vectors of the
//              instruction set (isa/selection.inl).  One thread.  Bounded by the instructions of these passes: of 4.2
//              microseconds at 1,000 columns selections take 1.9, marks 0.8, m 0.7 (Zen 3, AVX2); 2.9 with AVX-512 (Emerald
//              Rapids), which keeps and marks eight numbers an instruction.
#include "selection.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>

#include "buffer.h"
#include "hpa/check.h"
#include "hpa/kernels.h"
#include "rows.h"

namespace hpa {

// Two allocations, not nine: each takes as long as a pass over 200 columns.
SelectionScratch::SelectionScratch(std::int64_t cols)
    : numbers(4 * cols),
      phi(numbers.data()),
      kept(phi + cols),
      first(kept + cols),
      second(first + cols),
      marks(5 * cols),
      safety_focus(marks.data()),
      task_focus(safety_focus + cols),
      both(task_focus + cols),
      chosen(both + cols),
      also_chosen(chosen + cols) {}

namespace {

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

// chosen = the `count` best of the columns `among` (null: of all) by (-score, index).  A score is selected, not columns:
// the one that the last of them has; of those that share it the last ones go.  Returns how many are chosen.
std::int64_t choose_best(std::uint8_t* chosen, const std::uint8_t* among, const double* scores, std::int64_t cols,
                         std::int64_t count, const SelectionScratch& scratch) {
  if (count <= 0) {
    std::fill(chosen, chosen + cols, std::uint8_t{0});
    return 0;
  }
  const isa::Table& table = isa::active();
  double* const kept = scratch.kept;
  const double* values = among == nullptr ? scores : kept;
  const std::int64_t size = among == nullptr ? cols : table.keep_marked(scores, among, cols, kept);
  const double last = count >= size ? -std::numeric_limits<double>::infinity()
                                    : table.nth_largest(values, size, count, scratch.first, scratch.second);
  const std::int64_t marked = table.mark_from(scores, among, last, cols, chosen);
  std::int64_t excess = marked - std::min(count, marked);
  for (std::int64_t j = cols - 1; excess > 0; --j) {
    const bool leaves = chosen[j] != 0 && scores[j] == last;
    chosen[j] = leaves ? 0 : chosen[j];
    excess -= leaves;
  }
  return std::min(count, marked);
}

// The product of positive numbers as significand * 2^exponent.  128 bits are kept of the significand, which is rounded to
// 64 at the end: what was lost before stays far below them.
class Product {
 public:
  void multiply(const isa::SplitProduct& product) {
    exponent_ += product.exponent;
    for (std::int64_t lane = 0; lane < product.lanes; ++lane) multiply(product.high[lane], product.low[lane]);
  }
  // Rounded to 64 bits, then to double: [1, 2].
  double significand() const {
    const std::uint64_t rounded =
        static_cast<std::uint64_t>(significand_ >> 64) + (static_cast<std::uint64_t>(significand_) >> 63);
    return rounded == 0 ? 2.0 : std::ldexp(static_cast<double>(rounded), -63);
  }
  std::int64_t exponent() const { return exponent_; }

 private:
  __extension__ using Wide = unsigned __int128;
  __extension__ using Signed = __int128;

  // 1 <= high < 2^1023, and low far below it.
  void multiply(double high, double low) {
    const double sum = high + low;
    low -= sum - high;  // now at most half the last bit of the sum, 2^-53 of its leading one
    const auto bits = std::bit_cast<std::uint64_t>(sum);
    const auto exponent = static_cast<std::int64_t>(bits >> 52) - 1023;
    const std::uint64_t leading = (bits << 11) | static_cast<std::uint64_t>(1) << 63;
    const auto scale = std::bit_cast<double>(static_cast<std::uint64_t>(1023 + 115 - exponent) << 52);
    const Wide a = significand_,
               b = (static_cast<Wide>(leading) << 64) +
                   static_cast<Wide>(static_cast<Signed>(static_cast<std::int64_t>(low * scale)) * 4096);
    const Wide a_high = a >> 64, a_low = static_cast<std::uint64_t>(a);
    const Wide b_high = b >> 64, b_low = static_cast<std::uint64_t>(b);
    significand_ = a_high * b_high + (a_high * b_low >> 64) + (a_low * b_high >> 64);
    const int zeros = std::countl_zero(static_cast<std::uint64_t>(significand_ >> 64));
    significand_ <<= zeros;
    exponent_ += exponent + 1 - zeros;
  }

  Wide significand_ = static_cast<Wide>(1) << 127;
  std::int64_t exponent_ = 0;
};

double mean_log_ratio(const double* safety, const double* task, std::int64_t cols) {
  Product safeties, tasks;
  std::int64_t count = 0;
  for (std::int64_t start = 0; start < cols; start += isa::kFactors) {
    isa::SplitProduct products[2];
    count +=
        isa::active().multiply_pairs(safety + start, task + start, std::min(cols - start, isa::kFactors), products);
    safeties.multiply(products[0]);
    tasks.multiply(products[1]);
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

// The scores as doubles, where they lie or in `scratch`; null where one of them is not finite or negative.
const double* read_scores(const TensorView& tensor, double* scratch) {
  const RowsView view(tensor, 0);
  const isa::Table& table = isa::active();
  const double* scores = view.read(table.f64, 0, 0, view.length(), scratch);
  return table.are_scores(scores, view.length()) ? scores : nullptr;
}

}  // namespace

Selection select_columns(bool* mask, std::int64_t stride, const double* safety, const double* task, std::int64_t cols,
                         const SelectionOptions& options, const SelectionScratch& scratch) {
  using Mode = SelectionOptions::Mode;
  const isa::Table& table = isa::active();
  std::uint8_t *safety_focus = scratch.safety_focus, *task_focus = scratch.task_focus;
  std::uint8_t *both = scratch.both, *safety_only = task_focus;
  choose_best(safety_focus, nullptr, safety, cols, options.focus, scratch);
  choose_best(task_focus, nullptr, task, cols, options.focus, scratch);
  for (std::int64_t j = 0; j < cols; ++j) {
    both[j] = safety_focus[j] & task_focus[j];
    safety_only[j] = safety_focus[j] & ~task_focus[j];
  }

  Selection result;
  result.overlap = table.count_marks(both, cols);
  result.log_ratio = mean_log_ratio(safety, task, cols);
  result.alpha = choose_alpha(options, result.log_ratio);

  std::uint8_t *chosen = scratch.chosen, *also_chosen = scratch.also_chosen;
  std::int64_t kept = 0, left = options.keep;  // to be chosen from the overlap
  if (options.mode == Mode::eps) {
    kept = choose_best(chosen, nullptr, safety, cols, options.keep, scratch);
    left = 0;
  } else if (options.mode == Mode::full) {
    const bool cap = options.overflow == SelectionOptions::Overflow::cap;
    kept = choose_best(chosen, safety_only, safety, cols, cap ? options.keep : cols, scratch);
    left -= kept;
  } else {
    std::fill(chosen, chosen + cols, std::uint8_t{0});
  }
  if (left > 0) {
    double* phi = scratch.phi;
    if (options.phi_norm == SelectionOptions::PhiNorm::mean) {
      const double safety_mean = mean_or_one(safety, cols), task_mean = mean_or_one(task, cols);
      for (std::int64_t j = 0; j < cols; ++j) phi[j] = safety[j] / safety_mean - result.alpha * (task[j] / task_mean);
    } else {
      for (std::int64_t j = 0; j < cols; ++j) phi[j] = safety[j] - result.alpha * task[j];
    }
    kept += choose_best(also_chosen, both, phi, cols, left, scratch);
    for (std::int64_t j = 0; j < cols; ++j) chosen[j] |= also_chosen[j];
  }

  if (stride == 1) {
    std::memcpy(mask, chosen, static_cast<std::size_t>(cols));
  } else {
    for (std::int64_t j = 0; j < cols; ++j) mask[j * stride] = chosen[j] != 0;
  }
  for (std::int64_t j = 0; j < cols; ++j) both[j] &= chosen[j];
  result.kept_overlap = table.count_marks(both, cols);
  result.kept_safety_only = kept - result.kept_overlap;
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

  const Buffer<double> wide(2 * cols);
  const double* eps = read_scores(safety, wide.data());
  const double* zeta = read_scores(task, wide.data() + cols);
  check(eps != nullptr, "safety", "expected finite, non-negative scores");
  check(zeta != nullptr, "task", "expected finite, non-negative scores");
  const SelectionScratch scratch(cols);
  return select_columns(static_cast<bool*>(mask.data), mask.stride[0], eps, zeta, cols, options, scratch);
}

}  // namespace hpa
