// hpa_ext._cuda: reads arguments and queues the kernel on the stream that the caller names.  Checks that a user sees are
// in hpa_ext/ops.py.  The GIL is kept: a call only queues work, which takes some microseconds.
//
// Built with HPA_CUDA_MODULE, the module's name, and HPA_CUDA_DEVICE_TYPE, the kind of memory that it takes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "choices.h"
#include "dlpack_arg.h"
#include "kernels.h"

namespace hpa::bindings {
namespace {

// Raised together with hpa_ext.backend.CUDA_INTERFACE whenever a signature below changes.
constexpr int kInterface = 1;

bool is_tensor_of_the_call(const DLDevice& device) { return device.device_type == HPA_CUDA_DEVICE_TYPE; }

class Argument : public TensorArgument {
 public:
  Argument(const char* name, py::handle object) : TensorArgument(name, object, is_tensor_of_the_call) {}
};

class Arguments : public TensorList {
 public:
  Arguments(const char* name, const py::sequence& objects) : TensorList(name, objects, is_tensor_of_the_call) {}
};

// Takes scratch memory from the caller's allocator (torch's caching one, which knows the stream).
class CallContext : public cuda::Context {
 public:
  // where: (device index, stream as an integer, function from a number of float64 elements to a tensor).
  explicit CallContext(const py::tuple& where)
      : Context(where[0].cast<int>(), reinterpret_cast<void*>(where[1].cast<std::uintptr_t>())), empty_(where[2]) {}

  void* allocate(std::int64_t bytes) override {
    const py::object tensor = empty_((bytes + 7) / 8);
    kept_.emplace_back("scratch", tensor);
    return kept_.back().view().data;
  }

 private:
  py::object empty_;
  std::vector<Argument> kept_;
};

void accumulate_gram_(const py::tuple& where, const py::object& gram, const py::object& x, double scale) {
  CallContext context(where);
  const Argument gram_argument("gram", gram), x_argument("x", x);
  cuda::accumulate_gram(context, gram_argument.view(), x_argument.view(), scale);
}

void inverse_diagonal_(const py::tuple& where, const py::object& out, const py::object& result, const py::object& gram,
                       double damping, const std::string& mode) {
  CallContext context(where);
  const Argument diagonal("out", out), results("result", result), matrix("gram", gram);
  cuda::inverse_diagonal(context, diagonal.view(), results.view(), matrix.view(), damping,
                         choose("mode", mode, kDiagonalModes));
}

void accumulate_importance_(const py::tuple& where, const py::sequence& importance, const py::sequence& grads,
                            const py::sequence& weights) {
  CallContext context(where);
  const Arguments totals("importance", importance), gradients("grads", grads), factors("weights", weights);
  cuda::accumulate_importance(context, totals.views(), gradients.views(), factors.views());
}

void change_statistics_(const py::tuple& where, const py::object& column_change, const py::object& scalars,
                        const py::object& before, const py::object& after) {
  CallContext context(where);
  const Argument columns("column_change", column_change), totals("scalars", scalars);
  const Argument old_weights("before", before), new_weights("after", after);
  cuda::change_statistics(context, columns.view(), totals.view(), old_weights.view(), new_weights.view());
}

void merge_(const py::tuple& where, const py::object& after, const py::object& before, const py::object& mask,
            double projection) {
  CallContext context(where);
  const Argument new_weights("after", after), old_weights("before", before), kept("mask", mask);
  cuda::merge(context, new_weights.view(), old_weights.view(), kept.view(), projection);
}

void balanced_mask_(const py::tuple& where, const py::object& mask, const py::object& numbers, const py::object& safety,
                    const py::object& task, std::int64_t keep, std::int64_t focus, double alpha0, double alpha1,
                    const std::string& mode, const std::string& alpha_mode, int alpha_sign, const std::string& overflow,
                    const std::string& phi_norm) {
  CallContext context(where);
  const Argument chosen("mask", mask), results("numbers", numbers), safety_scores("safety", safety);
  const Argument task_scores("task", task);
  const SelectionOptions options =
      selection_options(keep, focus, alpha0, alpha1, mode, alpha_mode, alpha_sign, overflow, phi_norm);
  cuda::balanced_mask(context, chosen.view(), results.view(), safety_scores.view(), task_scores.view(), options);
}

void project_(const py::tuple& where, const py::sequence& grads, const py::sequence& basis, int passes) {
  CallContext context(where);
  const Arguments vectors("grads", grads), known("basis", basis);
  cuda::project(context, vectors.views(), known.views(), passes);
}

void orthonormalize_(const py::tuple& where, const py::object& vectors, const py::object& counts,
                     const py::object& basis, double rtol) {
  CallContext context(where);
  const Argument rows("vectors", vectors), results("counts", counts);
  const OptionalTensor known("basis", basis, is_tensor_of_the_call);
  cuda::orthonormalize(context, rows.view(), results.view(), known.view(), rtol);
}

}  // namespace
}  // namespace hpa::bindings

PYBIND11_MODULE(HPA_CUDA_MODULE, module) {
  using namespace hpa::bindings;
  module.doc() = "Compiled kernels of hpa_ext for CUDA; use them through the functions of hpa_ext.";
  module.attr("__version__") = HPA_VERSION;
  module.attr("INTERFACE") = kInterface;
  module.def("unavailable", &hpa::cuda::unavailable, "What keeps kernels from running here; empty if nothing does.");
  module.def("accumulate_gram_", &accumulate_gram_);
  module.def("accumulate_importance_", &accumulate_importance_);
  module.def("balanced_mask", &balanced_mask_);
  module.def("change_statistics", &change_statistics_);
  module.def("inverse_diagonal", &inverse_diagonal_);
  module.def("merge_", &merge_);
  module.def("project_", &project_);
  module.def("orthonormalize_", &orthonormalize_);
}
