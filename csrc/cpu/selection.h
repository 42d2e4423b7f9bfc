// The choice of columns behind balanced_mask, on scores that lie in memory of this library: edit.cpp makes them itself.
#pragma once

#include <cstdint>

#include "buffer.h"
#include "hpa/kernels.h"

namespace hpa {

// Working memory of select_columns for up to `cols` columns; used again, by one thread at a time.
struct SelectionScratch {
  explicit SelectionScratch(std::int64_t cols);

  Buffer<double> numbers;
  double *phi, *kept, *first, *second;
  Buffer<std::uint8_t> marks;
  std::uint8_t *safety_focus, *task_focus, *both, *chosen, *also_chosen;
};

// mask[j * stride] for all columns.  Scores are finite and not negative, and 0 <= keep <= focus <= cols.  Throws nothing.
Selection select_columns(bool* mask, std::int64_t stride, const double* safety, const double* task, std::int64_t cols,
                         const SelectionOptions& options, const SelectionScratch& scratch);

}  // namespace hpa
