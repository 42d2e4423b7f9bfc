// S, T = the `focus` best columns by safety and by task;  O = S & T,  N = S - T
// m     = mean of log(safety / task) over columns where both are positive          (0 where there is none)
// alpha = alpha0 + (alpha1 - alpha0) (1 + tanh(sign m)) / 2,   phi = safety - alpha * task
// mask  = columns of N, best safety first, then columns of O, best phi first, until there are `keep`
//                                                                           safety, task [cols], mask bool [cols]
//
// Arithmetic   float64; sums are carried in two doubles (about 106 bits), so that their rounding does not depend on the
//              order; phi is a product and a difference, each rounded.  The sum of logs is the log of a product, as in
//              csrc/cpu/balanced_mask.cpp: significands of 128 bits, rounded to 64 at the end.  Every ranking is
//              by (-score, index), a total order.  alpha and m can differ from other backends in the last digits: log and
//              tanh are CUDA's own.
// Bytes moved  a selection reads its scores once for each digit that it follows (mostly 1 to 4 where scores differ, all
//              8 where the last place is among equals), and those of its candidates once more to choose.  Each score is
//              in one or two selections, and read once for m and the means: some 5 to 10 times, at most 19, from the
//              second-level cache (88 KB at 11008 columns).  A byte a column of scratch.
// Bound        latency: one block, because each of the steps below needs all of the one before.
// Design       Selection by radix: scores become integers of the same order, eight bits at a time from the top are
//              counted, and the digit that holds the last place is followed; ends early where a whole digit is wanted.
//              Columns above the threshold are chosen, and of those equal to it the first ones by index: a prefix sum
//              over the columns in their order.  Integer counts alone meet in atomic operations: the same bits on every
//              run.
// Resident     blocks of 512 threads: selection_kernel 1.  The 64 registers of 1024 threads are not enough for sm_100.
#include <numbers>

#include "elements.cuh"
#include "hpa/check.h"
#include "launch.cuh"

namespace hpa::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kDigits = 256;

// What is known of a column.
constexpr std::uint8_t kSafetyFocus = 1, kTaskFocus = 2, kChosen = 4;

struct Scores {
  const void* data;
  DType dtype;
  std::int64_t stride;
};

struct Numbers {
  double alpha, log_ratio, overlap, kept_safety_only, kept_overlap;
};

// A sum carried in two doubles (Knuth's exact addition).
struct Sum {
  double high = 0, low = 0;
  __device__ void add(double value) {
    const double sum = __dadd_rn(high, value);
    const double part = __dadd_rn(sum, -high);
    low = __dadd_rn(low, __dadd_rn(__dadd_rn(high, -__dadd_rn(sum, -part)), __dadd_rn(value, -part)));
    high = sum;
  }
  __device__ void add(const Sum& other) {
    add(other.high);
    low = __dadd_rn(low, other.low);
  }
  __device__ double value() const { return high + low; }
};

// A product of positive numbers, (high 2^64 + low) 2^(exponent - 127) with the highest bit set.  What a multiplication
// cuts off is below the last of 128 bits.
struct Product {
  std::uint64_t high, low;
  std::int64_t exponent;
  static __device__ Product one() { return {std::uint64_t{1} << 63, 0, 0}; }
  __device__ void multiply(const Product& other) {
    __extension__ using Wide = unsigned __int128;
    Wide product = static_cast<Wide>(high) * other.high;
    product += (static_cast<Wide>(high) * other.low) >> 64;
    product += (static_cast<Wide>(low) * other.high) >> 64;
    exponent += other.exponent + 1;
    if (static_cast<std::uint64_t>(product >> 127) == 0) {
      product <<= 1;
      --exponent;
    }
    high = static_cast<std::uint64_t>(product >> 64);
    low = static_cast<std::uint64_t>(product);
  }
  __device__ void multiply(double factor) {
    Product other = one();
    if (factor < 0x1p-1022) {  // subnormal
      factor *= 0x1p64;
      other.exponent = -64;
    }
    const auto bits = static_cast<std::uint64_t>(__double_as_longlong(factor));
    other.high = bits << 11 | std::uint64_t{1} << 63;
    other.exponent += static_cast<std::int64_t>(bits >> 52) - 1023;
    multiply(other);
  }
  // Rounded to 64 bits, then to double: [1, 2].
  __device__ double significand() const {
    const std::uint64_t rounded = high + (low >> 63);
    return rounded == 0 ? 2.0 : static_cast<double>(rounded) * 0x1p-63;
  }
};

// Integers in the order of the scores; both zeros are one.
__device__ __forceinline__ std::uint64_t sortable(double score) {
  const auto bits = static_cast<std::uint64_t>(__double_as_longlong(score + 0.0));
  return (bits >> 63) != 0 ? ~bits : bits | std::uint64_t{1} << 63;
}

__device__ __forceinline__ double score_at(const Scores& scores, std::int64_t j) {
  return load_element<double>(scores.data, scores.dtype, j * scores.stride);
}

// Memory that the steps share, one after another.
struct Shared {
  unsigned counts[kDigits];
  unsigned warp_counts[kWarps];
  double warp_high[kWarps], warp_low[kWarps];
  Product warp_products[kWarps];
  std::uint64_t prefix;
  unsigned wanted, digit_count;
};

__device__ __forceinline__ unsigned block_count(unsigned value, Shared& shared) {
  const unsigned sum = warp_sum(value);
  __syncthreads();
  if (lane_index() == 0) shared.warp_counts[warp_index()] = sum;
  __syncthreads();
  unsigned total = 0;
  for (int w = 0; w < kWarps; ++w) total += shared.warp_counts[w];
  return total;
}

__device__ __forceinline__ double block_sum(Sum sum, Shared& shared) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    Sum other;
    other.high = __shfl_xor_sync(kAllLanes, sum.high, distance);
    other.low = __shfl_xor_sync(kAllLanes, sum.low, distance);
    sum.add(other);
  }
  __syncthreads();
  if (lane_index() == 0) {
    shared.warp_high[warp_index()] = sum.high;
    shared.warp_low[warp_index()] = sum.low;
  }
  __syncthreads();
  Sum total;
  for (int w = 0; w < kWarps; ++w) {
    Sum part;
    part.high = shared.warp_high[w];
    part.low = shared.warp_low[w];
    total.add(part);
  }
  return total.value();
}

// A function of its own: inlined twice it takes more registers than sm_100 has for 512 threads.
__device__ __attribute__((noinline)) Product block_product(Product product, Shared& shared) {
#pragma unroll 1
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    Product other;
    other.high = __shfl_xor_sync(kAllLanes, product.high, distance);
    other.low = __shfl_xor_sync(kAllLanes, product.low, distance);
    other.exponent = __shfl_xor_sync(kAllLanes, product.exponent, distance);
    product.multiply(other);
  }
  __syncthreads();
  if (lane_index() == 0) shared.warp_products[warp_index()] = product;
  __syncthreads();
  Product total = Product::one();
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w) total.multiply(shared.warp_products[w]);
  return total;
}

// Sets `flag` in the first `count` columns by (-key, index), of those for which among(j); key(j) is a sortable integer.
template <class Key, class Among>
__device__ void choose_best(std::int64_t cols, unsigned count, const Key& key, const Among& among, std::uint8_t* flags,
                            std::uint8_t flag, Shared& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  if (count == 0) return;  // the same for all threads
  unsigned candidates = 0;
  for (std::int64_t j = thread; j < cols; j += kThreads) candidates += among(j) ? 1 : 0;
  candidates = block_count(candidates, shared);
  if (candidates <= count) {
    for (std::int64_t j = thread; j < cols; j += kThreads) {
      if (among(j)) flags[j] |= flag;
    }
    __syncthreads();
    return;
  }

  // The digits of the last place, from the top; `mask` covers those that are known.
  std::uint64_t prefix = 0, mask = 0;
  unsigned wanted = count;  // places left among the columns that share the prefix
  bool whole = false;       // all of them are wanted
  for (int shift = 56; shift >= 0 && !whole; shift -= 8) {
    __syncthreads();
    if (thread < kDigits) shared.counts[thread] = 0;
    __syncthreads();
    for (std::int64_t j = thread; j < cols; j += kThreads) {
      const std::uint64_t k = key(j);
      if (among(j) && (k & mask) == prefix) atomicAdd(&shared.counts[k >> shift & 255], 1u);
    }
    __syncthreads();
    if (warp_index() == 0) {
      // Lane l looks at eight digits, the highest first: above = columns with a higher digit.
      const int lane = lane_index();
      unsigned mine = 0;
      for (int i = 0; i < 8; ++i) mine += shared.counts[255 - (lane * 8 + i)];
      unsigned above = mine;
#pragma unroll
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const unsigned other = __shfl_up_sync(kAllLanes, above, distance);
        if (lane >= distance) above += other;
      }
      above -= mine;
      for (int i = 0; i < 8; ++i) {
        const int digit = 255 - (lane * 8 + i);
        const unsigned here = shared.counts[digit];
        if (above < wanted && wanted <= above + here) {
          shared.prefix = prefix | static_cast<std::uint64_t>(digit) << shift;
          shared.wanted = wanted - above;
          shared.digit_count = here;
        }
        above += here;
      }
    }
    __syncthreads();
    prefix = shared.prefix;
    wanted = shared.wanted;
    whole = shared.digit_count == wanted;
    mask |= std::uint64_t{255} << shift;
  }

  // In the order of columns: all above the threshold, and the first `wanted` of those that share the prefix.
  unsigned seen = 0;
  for (std::int64_t start = 0; start < cols; start += kThreads) {
    const std::int64_t j = start + thread;
    const bool candidate = j < cols && among(j);
    const std::uint64_t k = candidate ? key(j) & mask : 0;
    const bool tied = candidate && k == prefix;
    const unsigned votes = __ballot_sync(kAllLanes, tied ? 1 : 0);
    __syncthreads();
    if (lane_index() == 0) shared.warp_counts[warp_index()] = static_cast<unsigned>(__popc(votes));
    __syncthreads();
    unsigned place = seen + static_cast<unsigned>(__popc(votes & ((1u << lane_index()) - 1)));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp_index()) place += shared.warp_counts[w];
      seen += shared.warp_counts[w];
    }
    if (candidate && (k > prefix || (tied && place < wanted))) flags[j] |= flag;
  }
  __syncthreads();
}

__device__ __forceinline__ double choose_alpha(const SelectionOptions& options, double log_ratio) {
  const double low = options.alpha0, span = options.alpha1 - options.alpha0;
  const double t = tanh(options.alpha_sign * log_ratio);
  switch (options.alpha_mode) {
    case SelectionOptions::AlphaMode::affine: return __dadd_rn(low, __dmul_rn(span, 1.0 + t) / 2.0);
    case SelectionOptions::AlphaMode::relu: return __dadd_rn(low, __dmul_rn(span, t > 0 ? t : 0.0));
    case SelectionOptions::AlphaMode::abs: return __dadd_rn(low, __dmul_rn(span, t < 0 ? -t : t));
    default: return low;
  }
}

__global__ void __launch_bounds__(kThreads)
    selection_kernel(const Scores safety, const Scores task, std::int64_t cols, const SelectionOptions options,
                     std::uint8_t* flags, bool* mask, std::int64_t mask_stride, Numbers* numbers) {
  HPA_SHARED(Shared, memory, 1);
  Shared& shared = memory[0];
  const int thread = static_cast<int>(threadIdx.x);
  for (std::int64_t j = thread; j < cols; j += kThreads) flags[j] = 0;
  __syncthreads();

  const auto by_safety = [&](std::int64_t j) { return sortable(score_at(safety, j)); };
  const auto by_task = [&](std::int64_t j) { return sortable(score_at(task, j)); };
  const auto any = [](std::int64_t) { return true; };
  const auto in_overlap = [&](std::int64_t j) { return (flags[j] & 3) == (kSafetyFocus | kTaskFocus); };
  const auto safety_only = [&](std::int64_t j) { return (flags[j] & 3) == kSafetyFocus; };
  const auto focus = static_cast<unsigned>(options.focus), keep = static_cast<unsigned>(options.keep);
  choose_best(cols, focus, by_safety, any, flags, kSafetyFocus, shared);
  choose_best(cols, focus, by_task, any, flags, kTaskFocus, shared);

  Sum safety_sum, task_sum;
  Product safeties = Product::one(), tasks = Product::one();
  unsigned positive = 0, overlap = 0;
  for (std::int64_t j = thread; j < cols; j += kThreads) {
    const double eps = score_at(safety, j), zeta = score_at(task, j);
    safety_sum.add(eps);
    task_sum.add(zeta);
    if (eps > 0 && zeta > 0) {
      safeties.multiply(eps);
      tasks.multiply(zeta);
      ++positive;
    }
    overlap += in_overlap(j) ? 1 : 0;
  }
  safeties = block_product(safeties, shared);
  tasks = block_product(tasks, shared);
  const double safety_mean = block_sum(safety_sum, shared) / static_cast<double>(cols);
  const double task_mean = block_sum(task_sum, shared) / static_cast<double>(cols);
  positive = block_count(positive, shared);
  overlap = block_count(overlap, shared);
  const double log_ratio_sum =
      __dadd_rn(__dadd_rn(log(safeties.significand()), -log(tasks.significand())),
                __dmul_rn(static_cast<double>(safeties.exponent - tasks.exponent), std::numbers::ln2));
  const double log_ratio = positive == 0 ? 0.0 : log_ratio_sum / positive;
  const double alpha = choose_alpha(options, log_ratio);
  const bool over_mean = options.phi_norm == SelectionOptions::PhiNorm::mean;
  const double safety_unit = over_mean && safety_mean > 0 ? safety_mean : 1.0;
  const double task_unit = over_mean && task_mean > 0 ? task_mean : 1.0;
  const auto by_phi = [&](std::int64_t j) {
    return sortable(__dadd_rn(score_at(safety, j) / safety_unit, -__dmul_rn(alpha, score_at(task, j) / task_unit)));
  };

  if (options.mode == SelectionOptions::Mode::eps) {
    choose_best(cols, keep, by_safety, any, flags, kChosen, shared);
  } else if (options.mode == SelectionOptions::Mode::phi) {
    choose_best(cols, keep, by_phi, in_overlap, flags, kChosen, shared);
  } else {
    const unsigned only = focus - overlap;
    const unsigned budget = options.overflow == SelectionOptions::Overflow::keep ? only : min(keep, only);
    choose_best(cols, budget, by_safety, safety_only, flags, kChosen, shared);
    choose_best(cols, keep > budget ? keep - budget : 0u, by_phi, in_overlap, flags, kChosen, shared);
  }

  unsigned kept = 0, kept_overlap = 0;
  for (std::int64_t j = thread; j < cols; j += kThreads) {
    const bool chosen = (flags[j] & kChosen) != 0;
    mask[j * mask_stride] = chosen;
    kept += chosen ? 1 : 0;
    kept_overlap += chosen && in_overlap(j) ? 1 : 0;
  }
  kept = block_count(kept, shared);
  kept_overlap = block_count(kept_overlap, shared);
  if (thread == 0) {
    *numbers = {alpha, log_ratio, static_cast<double>(overlap), static_cast<double>(kept - kept_overlap),
                static_cast<double>(kept_overlap)};
  }
}

}  // namespace

void balanced_mask(Context& context, const TensorView& mask, const TensorView& numbers, const TensorView& safety,
                   const TensorView& task, const SelectionOptions& options) {
  check_float("safety", safety);
  check_float("task", task);
  check(safety.dims == 1, "safety", "expected 1 dimension");
  const std::int64_t cols = safety.shape[0];
  check_shape("task", task, {cols});
  check_shape("mask", mask, {cols});
  check(mask.dtype == DType::boolean, "mask", "expected bool");
  check(0 <= options.keep && options.keep <= options.focus && options.focus <= cols, "focus",
        "expected 0 <= keep <= focus <= cols");
  check(cols < std::int64_t{1} << 31, "safety", "expected fewer than 2^31 columns");
  check_shape("numbers", numbers, {5});
  check(numbers.dtype == DType::f64 && numbers.stride[0] == 1, "numbers", "expected contiguous float64");

  const DeviceGuard guard(context);
  launch(context, 1, kThreads, selection_kernel, Scores{safety.data, safety.dtype, safety.stride[0]},
         Scores{task.data, task.dtype, task.stride[0]}, cols, options, allocate<std::uint8_t>(context, cols),
         static_cast<bool*>(mask.data), mask.stride[0], static_cast<Numbers*>(numbers.data));
}

}  // namespace hpa::cuda
