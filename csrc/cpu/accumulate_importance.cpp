// importance += g^2  ("fisher"),   importance += |w g|  ("taylor")           lists of equal shapes, any strides
//
// Arithmetic   float32, or float64 where any argument is; rounded once to the storage dtype.
// Bytes moved  the minimum: each input once, importance read and written once.
// Design       A table of chunks over the whole list is one parallel loop, so a thousand small tensors cost one call.
//              Inputs of other dtypes or strides pass through scratch blocks in the first-level cache; elements are
//              independent, so nothing depends on the number of threads.
#include <vector>

#include "buffer.h"
#include "hpa/check.h"
#include "hpa/kernels.h"
#include "parallel.h"
#include "rows.h"

namespace hpa {
namespace {

constexpr std::int64_t kBlock = 1024;       // elements in scratch: 12 KB of float
constexpr std::int64_t kChunk = 32 * 1024;  // elements in a task
constexpr std::int64_t kGrain = 64 * 1024;  // elements worth a thread

struct Chunk {
  std::size_t tensor;
  std::int64_t start;
};

template <class T>
void accumulate(const std::vector<RowsView>& importance, const std::vector<RowsView>& grads,
                const std::vector<RowsView>& weights, int threads) {
  const isa::Kernels<T>& kernels = isa::active().kernels<T>();
  std::vector<Chunk> chunks;
  std::int64_t elements = 0;
  for (std::size_t i = 0; i < importance.size(); ++i) {
    for (std::int64_t start = 0; start < importance[i].length(); start += kChunk) chunks.push_back({i, start});
    elements += importance[i].length();
  }
  threads = useful_threads(elements, kGrain, threads);
  Buffer<T> scratch(threads * 3 * kBlock);
  parallel_for(static_cast<std::int64_t>(chunks.size()), threads, [&](std::int64_t task, int thread) {
    const auto [i, start] = chunks[static_cast<std::size_t>(task)];
    T* total_scratch = scratch.data() + thread * 3 * kBlock;
    T *grad_scratch = total_scratch + kBlock, *weight_scratch = grad_scratch + kBlock;
    const std::int64_t stop = std::min(start + kChunk, importance[i].length());
    for (std::int64_t at = start; at < stop; at += kBlock) {
      const std::int64_t count = std::min(kBlock, stop - at);
      T* total = importance[i].read(kernels, 0, at, count, total_scratch);
      const T* grad = grads[i].read(kernels, 0, at, count, grad_scratch);
      if (weights.empty()) {
        kernels.add_squares(grad, count, total);
      } else {
        kernels.add_abs_products(grad, weights[i].read(kernels, 0, at, count, weight_scratch), count, total);
      }
      importance[i].write(kernels, 0, at, count, total);
    }
  });
}

bool same_shape(const TensorView& a, const TensorView& b) {
  return a.dims == b.dims && std::equal(a.shape, a.shape + a.dims, b.shape);
}

}  // namespace

void accumulate_importance(const std::vector<TensorView>& importance, const std::vector<TensorView>& grads,
                           const std::vector<TensorView>& weights, int threads) {
  check(grads.size() == importance.size(), "grads", "expected as many tensors as importance");
  check(weights.empty() || weights.size() == importance.size(), "weights", "expected as many tensors as importance");
  bool wide = false;
  const auto flatten = [&](const char* name, const std::vector<TensorView>& tensors) {
    std::vector<RowsView> flat;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      check_float(name, tensors[i]);
      check(same_shape(tensors[i], importance[i]), name, "expected the shapes of importance");
      wide = wide || tensors[i].dtype == DType::f64;
      flat.emplace_back(tensors[i], 0);
    }
    return flat;
  };
  const auto totals = flatten("importance", importance);
  const auto gradients = flatten("grads", grads);
  const auto factors = flatten("weights", weights);
  if (wide) {
    accumulate<double>(totals, gradients, factors, threads);
  } else {
    accumulate<float>(totals, gradients, factors, threads);
  }
}

}  // namespace hpa
