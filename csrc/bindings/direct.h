// Direct calls: see direct.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace hpa::bindings {

// Adds the submodule `direct` to the extension.
void add_direct_calls(pybind11::module_& module);

}  // namespace hpa::bindings
