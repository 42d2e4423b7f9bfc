// The projection as other kernels use it.
#pragma once

#include "kernels.h"

namespace hpa::cuda {

// `*bad_row` from here on means that no row is bad; also what a memory filled with bytes 0x7f reads as.
inline constexpr long long kNoRow = 0x7f7f7f7f7f7f7f7f;

// Like project() with one pass, on the current device; does nothing where `*bad_row` on the device is a row.
void project_once(Context& context, const std::vector<TensorView>& grads, const std::vector<TensorView>& basis,
                  const long long* bad_row);

}  // namespace hpa::cuda
