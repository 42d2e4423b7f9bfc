// The eight kernels on a GPU: hpa/kernels.h says what each computes.  Everything here queues work on a stream and
// returns; nothing waits for the device, allocates from the driver or depends on an earlier call, so that a call can be
// captured in a CUDA graph.
//
// All throw std::invalid_argument for arguments that do not fit and std::runtime_error where CUDA refuses.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "hpa/kernels.h"
#include "hpa/tensor_view.h"

namespace hpa::cuda {

// Where a call runs, and where it takes scratch memory from.
class Context {
 public:
  Context(int device, void* stream) : device(device), stream(stream) {}
  virtual ~Context() = default;

  // Device memory, 256-byte aligned, that is not reused before the work of this call on the stream is done.
  virtual void* allocate(std::int64_t bytes) = 0;

  const int device;
  void* const stream;  // cudaStream_t
};

void accumulate_gram(Context& context, const TensorView& gram, const TensorView& x, double scale);

// gram as in hpa/kernels.h.  result: float64 [2] on the device: lambda, and a FactorStatus.
void inverse_diagonal(Context& context, const TensorView& out, const TensorView& result, const TensorView& gram,
                      double damping, DiagonalMode mode);

void accumulate_importance(Context& context, const std::vector<TensorView>& importance,
                           const std::vector<TensorView>& grads, const std::vector<TensorView>& weights);

void change_statistics(Context& context, const TensorView& column_change, const TensorView& scalars,
                       const TensorView& before, const TensorView& after);

// numbers: float64 [5] on the device: alpha, log_ratio, overlap, kept_safety_only, kept_overlap.
void balanced_mask(Context& context, const TensorView& mask, const TensorView& numbers, const TensorView& safety,
                   const TensorView& task, const SelectionOptions& options);

void merge(Context& context, const TensorView& after, const TensorView& before, const TensorView& mask,
           double projection);

void project(Context& context, const std::vector<TensorView>& grads, const std::vector<TensorView>& basis, int passes);

// counts: 16 bytes on the device, passed as float64 [2], for two int64: rows kept, and the first row with NaN or Inf
// (-1: none; else nothing was written).
void orthonormalize(Context& context, const TensorView& vectors, const TensorView& counts,
                    const std::optional<TensorView>& basis, double rtol);

// What keeps kernels from running here, empty if nothing does: no driver, an old driver, no device.
std::string unavailable();

}  // namespace hpa::cuda
