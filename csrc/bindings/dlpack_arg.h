// A tensor argument: any Python object that speaks DLPack, read as a hpa::TensorView for the time of one call.
//
// torch (2.10 and later) offers the DLPack C exchange API on its tensor type: a struct of functions that fill a
// DLTensor from the object, without a capsule.  Everything else goes through __dlpack__.  No header and no symbol of
// torch is used, so one build serves every version.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dlpack/dlpack.h"
#include "hpa/tensor_view.h"

namespace hpa::bindings {

namespace py = pybind11;

inline bool is_tensor_on_cpu(const DLDevice& device) {
  return device.device_type == kDLCPU || device.device_type == kDLCUDAHost || device.device_type == kDLROCMHost;
}

inline DType to_dtype(const char* name, const DLDataType& dtype) {
  if (dtype.lanes == 1) {
    if (dtype.code == kDLFloat && dtype.bits == 32) return DType::f32;
    if (dtype.code == kDLFloat && dtype.bits == 64) return DType::f64;
    if (dtype.code == kDLFloat && dtype.bits == 16) return DType::f16;
    if (dtype.code == kDLBfloat && dtype.bits == 16) return DType::bf16;
    if (dtype.code == kDLBool && dtype.bits == 8) return DType::boolean;
  }
  throw py::type_error(std::string(name) + ": expected float32, float64, bfloat16, float16 or bool");
}

// Whether the kernels of a module can read what lies on a device.
using Accepts = bool (*)(const DLDevice& device);

inline TensorView to_view(const char* name, const DLTensor& tensor, Accepts accepts = is_tensor_on_cpu) {
  if (!accepts(tensor.device)) {
    const char* where = accepts == is_tensor_on_cpu ? "the CPU" : "the device of the call";
    throw py::value_error(std::string(name) + ": expected a tensor on " + where);
  }
  if (tensor.ndim > kMaxDims) throw py::value_error(std::string(name) + ": expected at most 16 dimensions");
  TensorView view;
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.dtype = to_dtype(name, tensor.dtype);
  view.dims = tensor.ndim;
  std::int64_t compact = 1;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    view.shape[d] = tensor.shape[d];
    view.stride[d] = tensor.strides == nullptr ? compact : tensor.strides[d];
    compact *= tensor.shape[d];
  }
  return view;
}

// The exchange API of a type of tensors, or nullptr.
inline const DLPackExchangeAPI* exchange_api(PyTypeObject* type) {
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  const auto owner = py::reinterpret_steal<py::object>(capsule);
  void* pointer = PyCapsule_IsValid(capsule, "dlpack_exchange_api") != 0
                      ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
                      : nullptr;
  const auto* api = static_cast<const DLPackExchangeAPI*>(pointer);
  if (api == nullptr || api->header.version.major != DLPACK_MAJOR_VERSION ||
      api->dltensor_from_py_object_no_sync == nullptr) {
    return nullptr;
  }
  return api;
}

// The object's capsule, versioned where the producer knows that form.
inline py::object export_capsule(py::handle object) {
  const py::object method = object.attr("__dlpack__");
  try {
    return method(py::arg("max_version") = py::make_tuple(DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return method();
}

inline const DLManagedTensorVersioned* versioned(py::handle capsule) {
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned") == 0) return nullptr;
  return static_cast<const DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
}

// Keeps what the view points to alive; the capsule stays unconsumed, so dropping it frees the producer's export.
class TensorArgument {
 public:
  TensorArgument(const char* name, py::handle object, Accepts accepts = is_tensor_on_cpu)
      : owner_(py::reinterpret_borrow<py::object>(object)) {
    if (const DLPackExchangeAPI* api = exchange_api(Py_TYPE(object.ptr()))) {
      DLTensor tensor;
      if (api->dltensor_from_py_object_no_sync(object.ptr(), &tensor) != 0) throw py::error_already_set();
      view_ = to_view(name, tensor, accepts);
      return;
    }
    if (!py::hasattr(object, "__dlpack__")) {
      throw py::type_error(std::string(name) + ": expected an object with __dlpack__");
    }
    capsule_ = export_capsule(object);
    if (const auto* managed = versioned(capsule_)) {
      view_ = to_view(name, managed->dl_tensor, accepts);
    } else if (PyCapsule_IsValid(capsule_.ptr(), "dltensor") != 0) {
      const void* managed_tensor = PyCapsule_GetPointer(capsule_.ptr(), "dltensor");
      view_ = to_view(name, static_cast<const DLManagedTensor*>(managed_tensor)->dl_tensor, accepts);
    } else {
      throw py::type_error(std::string(name) + ": __dlpack__ returned something else than a DLPack capsule");
    }
  }

  const TensorView& view() const { return view_; }

 private:
  py::object owner_, capsule_;
  TensorView view_;
};

class TensorList {
 public:
  TensorList(const char* name, const py::sequence& objects, Accepts accepts = is_tensor_on_cpu) {
    arguments_.reserve(objects.size());
    for (const py::handle object : objects) {
      arguments_.emplace_back(name, object, accepts);
      views_.push_back(arguments_.back().view());
    }
  }
  const std::vector<TensorView>& views() const { return views_; }

 private:
  std::vector<TensorArgument> arguments_;
  std::vector<TensorView> views_;
};

class OptionalTensor {
 public:
  OptionalTensor(const char* name, const py::object& object, Accepts accepts = is_tensor_on_cpu) {
    if (!object.is_none()) argument_.emplace(name, object, accepts);
  }
  std::optional<TensorView> view() const { return argument_ ? std::optional(argument_->view()) : std::nullopt; }

 private:
  std::optional<TensorArgument> argument_;
};

// True where the producer says, in a versioned export, that its memory must not be written to.
inline bool is_read_only(py::handle object) {
  const py::object capsule = export_capsule(object);
  const auto* managed = versioned(capsule);
  return managed != nullptr && (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0;
}

}  // namespace hpa::bindings
