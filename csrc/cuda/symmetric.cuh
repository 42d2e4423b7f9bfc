// The symmetric product as other kernels use it.
#pragma once

#include "kernels.h"

namespace hpa::cuda {

// c[i, j] += scale * sum_t x[t, i] x[t, j]  for i >= first_row, first_col <= j <= i, in the dtype of c (float32,
// float64), on the current device.  Does nothing where `status` is given and *status on the device is not 0.
void add_symmetric(Context& context, const MatrixView& c, const MatrixView& x, double scale, std::int64_t first_row,
                   std::int64_t first_col, const int* status);

}  // namespace hpa::cuda
