// importance += g^2  ("fisher"),   importance += |w g|  ("taylor")           lists of equal shapes, any strides
//
// Arithmetic   float32, or float64 where any tensor of the list is; rounded once to the storage dtype.
// Bytes moved  the minimum: each input once, importance read and written once.  Four elements a load and store (128 bits
//              for float32) where tensors are contiguous and aligned, else element by element.
// Bound        memory; many small tensors: one launch for 200 of them.
// Design       The list is a table in the kernel's parameters, cut into chunks of 4096 elements; a block finds its chunk
//              by bisection, in which all its threads take the same steps.  Dtypes are looked at while the kernel runs:
//              a branch that all threads take alike costs nothing beside memory, and one kernel serves every mixture.
//              Elements are independent: the same bits on every run.
// Resident     blocks of 256 threads: importance_kernel<float> 3, importance_kernel<double> 2.
#include <algorithm>

#include "elements.cuh"
#include "hpa/check.h"
#include "launch.cuh"
#include "slices.h"

namespace hpa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kFours = 4;                               // groups of four elements of a thread
constexpr std::int64_t kChunk = kThreads * kFours * 4;  // elements of a block
constexpr int kEntries = 200;

// Which tensor of an entry.
enum Role { kImportance, kGrad, kWeight, kRoles };

struct Entry {
  void* data[kRoles];  // weight: null for fisher
  std::int64_t cols, elements;
  std::int64_t row_stride[kRoles], col_stride[kRoles];
  DType dtype[kRoles];
  bool four_at_a_time;  // contiguous, and aligned to four elements
};

struct Table {
  Entry entries[kEntries];
  std::int64_t first_chunk[kEntries + 1];
  int count;
};
static_assert(sizeof(Table) <= 32000, "kernel parameters take 32764 bytes");

// g^2 = |g g|: fisher is taylor with the gradient for a weight.
template <class T>
__device__ __forceinline__ T gain(T grad, T weight) {
  const T product = weight * grad;
  return product < T(0) ? -product : product;
}

template <class T>
__global__ void __launch_bounds__(kThreads) importance_kernel(const __grid_constant__ Table table) {
  int low = 0, high = table.count;  // the chunk lies in an entry of [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_chunk[middle] <= static_cast<std::int64_t>(blockIdx.x) ? low : high) = middle;
  }
  const Entry& entry = table.entries[low];
  const std::int64_t start = (blockIdx.x - table.first_chunk[low]) * kChunk;
  const std::int64_t stop = min(start + kChunk, entry.elements);
  const bool weighted = entry.data[kWeight] != nullptr;

  if (entry.four_at_a_time && stop - start == kChunk) {
    T totals[kFours][4], grads[kFours][4], weights[kFours][4] = {};
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const std::int64_t at = start + (i * kThreads + static_cast<int>(threadIdx.x)) * 4;
      load_four(entry.data[kImportance], entry.dtype[kImportance], at, totals[i]);
      load_four(entry.data[kGrad], entry.dtype[kGrad], at, grads[i]);
      if (weighted) load_four(entry.data[kWeight], entry.dtype[kWeight], at, weights[i]);
    }
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const std::int64_t at = start + (i * kThreads + static_cast<int>(threadIdx.x)) * 4;
#pragma unroll
      for (int e = 0; e < 4; ++e) totals[i][e] += gain(grads[i][e], weighted ? weights[i][e] : grads[i][e]);
      store_four(entry.data[kImportance], entry.dtype[kImportance], at, totals[i]);
    }
    return;
  }
  for (std::int64_t at = start + threadIdx.x; at < stop; at += kThreads) {
    const std::int64_t row = at / entry.cols, col = at % entry.cols;
    const auto index = [&](int role) { return row * entry.row_stride[role] + col * entry.col_stride[role]; };
    const T grad = load_element<T>(entry.data[kGrad], entry.dtype[kGrad], index(kGrad));
    T weight = grad;
    if (weighted) weight = load_element<T>(entry.data[kWeight], entry.dtype[kWeight], index(kWeight));
    const std::int64_t to = index(kImportance);
    const T total = load_element<T>(entry.data[kImportance], entry.dtype[kImportance], to);
    store_element(entry.data[kImportance], entry.dtype[kImportance], to, total + gain(grad, weight));
  }
}

bool same_shape(const TensorView& a, const TensorView& b) {
  return a.dims == b.dims && std::equal(a.shape, a.shape + a.dims, b.shape);
}

void append_entries(const TensorView& importance, const TensorView& grad, const TensorView* weight,
                    std::vector<Entry>& entries) {
  const TensorView* const tensors[kRoles] = {&importance, &grad, weight == nullptr ? &grad : weight};
  for (const Piece<kRoles>& piece : cut_into_pieces<kRoles>(importance, 0, tensors)) {
    Entry entry = {};
    entry.cols = piece.cols;
    entry.elements = piece.rows * piece.cols;
    entry.four_at_a_time = piece.rows == 1;
    for (int role = 0; role < (weight == nullptr ? kWeight : kRoles); ++role) {
      const std::int64_t size = element_size(tensors[role]->dtype);
      entry.data[role] = static_cast<char*>(tensors[role]->data) + piece.offset[role] * size;
      entry.dtype[role] = tensors[role]->dtype;
      entry.row_stride[role] = piece.row_stride[role];
      entry.col_stride[role] = piece.col_stride[role];
      entry.four_at_a_time = entry.four_at_a_time && piece.col_stride[role] == 1 &&
                             aligned(entry.data[role], std::min<std::int64_t>(16, 4 * size));
    }
    entries.push_back(entry);
  }
}

template <class T>
void accumulate(Context& context, const std::vector<Entry>& entries) {
  for (std::size_t first = 0; first < entries.size(); first += kEntries) {
    Table table = {};
    table.count = static_cast<int>(std::min<std::size_t>(kEntries, entries.size() - first));
    for (int i = 0; i < table.count; ++i) {
      table.entries[i] = entries[first + static_cast<std::size_t>(i)];
      table.first_chunk[i + 1] = table.first_chunk[i] + div_up(table.entries[i].elements, kChunk);
    }
    launch(context, table.first_chunk[table.count], kThreads, importance_kernel<T>, table);
  }
}

}  // namespace

void accumulate_importance(Context& context, const std::vector<TensorView>& importance,
                           const std::vector<TensorView>& grads, const std::vector<TensorView>& weights) {
  check(grads.size() == importance.size(), "grads", "expected as many tensors as importance");
  check(weights.empty() || weights.size() == importance.size(), "weights", "expected as many tensors as importance");
  bool wide = false;
  std::vector<Entry> entries;
  for (std::size_t i = 0; i < importance.size(); ++i) {
    const auto accept = [&](const char* name, const TensorView& tensor) {
      check_float(name, tensor);
      check(same_shape(tensor, importance[i]), name, "expected the shapes of importance");
      wide = wide || tensor.dtype == DType::f64;
    };
    accept("importance", importance[i]);
    accept("grads", grads[i]);
    if (!weights.empty()) accept("weights", weights[i]);
    append_entries(importance[i], grads[i], weights.empty() ? nullptr : &weights[i], entries);
  }
  const DeviceGuard guard(context);
  if (wide) {
    accumulate<double>(context, entries);
  } else {
    accumulate<float>(context, entries);
  }
}

}  // namespace hpa::cuda
