// d = after - before,  eps[j] = mean_i d[i, j]^2 / safety_diagonal[j],  zeta[j] = mean_i d[i, j]^2 / task_diagonal[j]
// mask = balanced_mask(eps, zeta),  c = <d, before> / |before|^2
// after[:, j] = mask[j] ? before[:, j] : after[:, j] - c * before[:, j]         before, after [rows, cols], for each layer
//
// Arithmetic   That of change_statistics, balanced_mask and merge, whose functions do the work, bit by bit; scores are
//              quotients in float64.
// Bytes moved  Both weights are read once from memory, `after` is written once, where a run fits the last-level cache:
//              the merge finds there what the statistics have read.  A larger layer is read twice but for its last rows.
// Bound        memory; the selection of a layer is arithmetic of one thread, and threads share the layers of a run.
// Design       Layers are taken in runs of kRunBytes.  A run with a number that is not finite, or without memory, is left
//              as it was, and the call ends there: how many layers were done is the answer.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "buffer.h"
#include "hpa/check.h"
#include "hpa/kernels.h"
#include "panels.h"
#include "parallel.h"
#include "rows.h"
#include "selection.h"

namespace hpa {
namespace {

constexpr std::int64_t kRunBytes = 16 << 20;    // old and new weights of a run
constexpr std::int64_t kChunk = 512;            // entries of a diagonal in scratch
constexpr std::int64_t kSelectionGrain = 1024;  // columns worth a thread

bool is_finite(double number) { return std::fabs(number) <= std::numeric_limits<double>::max(); }

// Calls body(first, values, count) for each chunk of a vector, in double.
template <class Body>
void for_each_chunk(const TensorView& vector, const Body& body) {
  const RowsView view(vector, 0);
  double scratch[kChunk];
  for (std::int64_t first = 0; first < view.length(); first += kChunk) {
    const std::int64_t count = std::min(kChunk, view.length() - first);
    body(first, view.read(isa::active().f64, 0, first, count, scratch), count);
  }
}

void check_diagonal(const char* name, const TensorView& diagonal, std::int64_t cols) {
  check_float(name, diagonal);
  check_shape(name, diagonal, {cols});
  bool good = true;
  for_each_chunk(diagonal, [&](std::int64_t, const double* values, std::int64_t count) {
    for (std::int64_t j = 0; j < count; ++j) good &= values[j] > 0 && is_finite(values[j]);
  });
  check(good, name, "expected positive, finite numbers");
}

void check_layer(const EditLayer& layer) {
  const MatrixView after = as_matrix("after", layer.after), before = as_matrix("before", layer.before);
  check_shape("before", layer.before, {after.rows, after.cols});
  check(before.dtype == after.dtype, "before", "expected the dtype of after");
  check_diagonal("safety_diagonal", layer.safety_diagonal, after.cols);
  check_diagonal("task_diagonal", layer.task_diagonal, after.cols);
  check_shape("mask", layer.mask, {after.cols});
  check(layer.mask.dtype == DType::boolean, "mask", "expected bool");
  check(0 <= layer.keep && layer.keep <= layer.focus && layer.focus <= after.cols, "focus",
        "expected 0 <= keep <= focus <= cols");
}

struct Scratch {
  explicit Scratch(std::int64_t cols) : change(cols), eps(cols), zeta(cols), selection(cols) {}

  Buffer<double> change, eps, zeta;
  SelectionScratch selection;
};

// scores = change / diagonal; false where one of them is beyond double.
bool divide(const double* change, const TensorView& diagonal, double* scores) {
  bool good = true;
  for_each_chunk(diagonal, [&](std::int64_t first, const double* values, std::int64_t count) {
    for (std::int64_t j = 0; j < count; ++j) {
      scores[first + j] = change[first + j] / values[j];
      good &= is_finite(scores[first + j]);
    }
  });
  return good;
}

// Selection and coefficient from the statistics of a layer; false where a number is not finite.
bool decide(EditLayer& layer, SelectionOptions options, bool adjusts, const Scratch& scratch) {
  const std::int64_t cols = layer.mask.shape[0];
  const auto* scalars = static_cast<const double*>(layer.scalars.data);
  double *change = scratch.change.data(), largest = 0;
  bool good = is_finite(scalars[0]) && is_finite(scalars[1]);
  for_each_chunk(layer.column_change, [&](std::int64_t first, const double* values, std::int64_t count) {
    for (std::int64_t j = 0; j < count; ++j) {
      change[first + j] = values[j];
      largest = std::max(largest, values[j]);
      good &= is_finite(values[j]);
    }
  });
  if (!good || !divide(change, layer.safety_diagonal, scratch.eps.data()) ||
      !divide(change, layer.task_diagonal, scratch.zeta.data())) {
    return false;
  }
  options.keep = largest > 0 ? layer.keep : 0;
  options.focus = largest > 0 ? layer.focus : 0;
  layer.selection = select_columns(static_cast<bool*>(layer.mask.data), layer.mask.stride[0], scratch.eps.data(),
                                   scratch.zeta.data(), cols, options, scratch.selection);
  layer.projection = adjusts && largest > 0 && scalars[1] > 0 ? scalars[0] / scalars[1] : 0;
  return true;
}

bool edit_run(std::span<EditLayer> run, const SelectionOptions& options, bool adjusts, int threads) {
  std::vector<ChangeLayer> changes;
  std::int64_t cols = 0, widest = 0;
  for (const EditLayer& layer : run) {
    changes.push_back({layer.column_change, layer.scalars, layer.before, layer.after});
    cols += layer.mask.shape[0];
    widest = std::max(widest, layer.mask.shape[0]);
  }
  change_statistics(changes, threads);

  const auto count = static_cast<std::int64_t>(run.size());
  const int selecting = count == 1 ? 1 : useful_threads(cols, kSelectionGrain, threads);
  std::vector<Scratch> scratch;
  for (int thread = 0; thread < selecting; ++thread) scratch.emplace_back(widest);
  std::vector<char> is_good(run.size());
  parallel_for(count, selecting, [&](std::int64_t i, int thread) {
    const auto at = static_cast<std::size_t>(i);
    is_good[at] = decide(run[at], options, adjusts, scratch[static_cast<std::size_t>(thread)]);
  });
  if (!std::all_of(is_good.begin(), is_good.end(), [](char good) { return good != 0; })) return false;

  std::vector<MergeLayer> merges;
  for (const EditLayer& layer : run) {
    if (layer.is_changed()) merges.push_back({layer.after, layer.before, layer.mask, layer.projection});
  }
  if (!merges.empty()) merge(merges, threads);
  return true;
}

}  // namespace

std::size_t edit(std::span<EditLayer> layers, const SelectionOptions& options, bool adjusts, int threads) {
  for (const EditLayer& layer : layers) check_layer(layer);
  std::size_t done = 0;
  while (done < layers.size()) {
    std::size_t count = 0;
    std::int64_t total = 0;
    while (done + count < layers.size()) {
      const TensorView& after = layers[done + count].after;
      total += 2 * after.numel() * element_size(after.dtype);
      if (count > 0 && total > kRunBytes) break;
      ++count;
    }
    try {
      if (!edit_run(layers.subspan(done, count), options, adjusts, threads)) break;
    } catch (const std::bad_alloc&) {
      if (done == 0) throw;
      break;
    }
    done += count;
  }
  return done;
}

}  // namespace hpa
