// hpa_ext._cpu: reads arguments, releases the GIL, calls the kernel.  Checks that a user sees are in hpa_ext/ops.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "choices.h"
#include "direct.h"
#include "dlpack_arg.h"
#include "hpa/kernels.h"
#include "isa/isa.h"
#include "parallel.h"

namespace hpa::bindings {
namespace {

// Raised together with hpa_ext.backend.INTERFACE whenever a signature below changes.
constexpr int kInterface = 3;

void check_lengths(std::size_t count, std::initializer_list<const TensorList*> lists) {
  for (const TensorList* list : lists) {
    if (list->views().size() != count) throw py::value_error("expected lists of one length");
  }
}

void accumulate_gram_(const py::object& gram, const py::object& x, double scale, int threads) {
  const TensorArgument gram_argument("gram", gram), x_argument("x", x);
  const py::gil_scoped_release unlocked;
  accumulate_gram(gram_argument.view(), x_argument.view(), scale, threads);
}

std::tuple<std::string, double, std::string> inverse_diagonal_(const py::object& out, const py::object& gram,
                                                               const py::object& activations, double scale,
                                                               double damping, const std::string& mode, int threads) {
  const TensorArgument out_argument("out", out);
  const OptionalTensor gram_argument("gram", gram), activation_argument("activations", activations);
  const DiagonalMode diagonal_mode = choose("mode", mode, kDiagonalModes);
  InverseDiagonalResult result;
  {
    const py::gil_scoped_release unlocked;
    result = inverse_diagonal(out_argument.view(), gram_argument.view(), activation_argument.view(), scale, damping,
                              diagonal_mode, threads);
  }
  const char* status = result.status == FactorStatus::ok                      ? "ok"
                       : result.status == FactorStatus::not_positive_definite ? "not_positive_definite"
                                                                              : "non_finite";
  return {status, result.lambda, result.low_rank ? "low_rank" : "dense"};
}

void accumulate_importance_(const py::sequence& importance, const py::sequence& grads, const py::sequence& weights,
                            int threads) {
  const TensorList totals("importance", importance), gradients("grads", grads), factors("weights", weights);
  const py::gil_scoped_release unlocked;
  accumulate_importance(totals.views(), gradients.views(), factors.views(), threads);
}

void change_statistics_(const py::object& column_change, const py::object& scalars, const py::object& before,
                        const py::object& after, int threads) {
  const TensorArgument columns("column_change", column_change), totals("scalars", scalars);
  const TensorArgument old_weights("before", before), new_weights("after", after);
  const py::gil_scoped_release unlocked;
  change_statistics(columns.view(), totals.view(), old_weights.view(), new_weights.view(), threads);
}

void change_statistics_list(const py::sequence& column_change, const py::sequence& scalars, const py::sequence& before,
                            const py::sequence& after, int threads) {
  const TensorList columns("column_change", column_change), totals("scalars", scalars);
  const TensorList old_weights("before", before), new_weights("after", after);
  const std::size_t count = old_weights.views().size();
  check_lengths(count, {&columns, &totals, &new_weights});
  std::vector<ChangeLayer> layers;
  for (std::size_t i = 0; i < count; ++i) {
    layers.push_back({columns.views()[i], totals.views()[i], old_weights.views()[i], new_weights.views()[i]});
  }
  const py::gil_scoped_release unlocked;
  change_statistics(layers, threads);
}

std::tuple<double, double, std::int64_t, std::int64_t, std::int64_t> balanced_mask_(
    const py::object& mask, const py::object& safety, const py::object& task, std::int64_t keep, std::int64_t focus,
    double alpha0, double alpha1, const std::string& mode, const std::string& alpha_mode, int alpha_sign,
    const std::string& overflow, const std::string& phi_norm) {
  const TensorArgument mask_argument("mask", mask), safety_argument("safety", safety), task_argument("task", task);
  const SelectionOptions options =
      selection_options(keep, focus, alpha0, alpha1, mode, alpha_mode, alpha_sign, overflow, phi_norm);
  Selection result;
  {
    const py::gil_scoped_release unlocked;
    result = balanced_mask(mask_argument.view(), safety_argument.view(), task_argument.view(), options);
  }
  return {result.alpha, result.log_ratio, result.overlap, result.kept_safety_only, result.kept_overlap};
}

void merge_(const py::object& after, const py::object& before, const py::object& mask, double projection, int threads) {
  const TensorArgument new_weights("after", after), old_weights("before", before), kept("mask", mask);
  const py::gil_scoped_release unlocked;
  merge(new_weights.view(), old_weights.view(), kept.view(), projection, threads);
}

void merge_list_(const py::sequence& after, const py::sequence& before, const py::sequence& mask,
                 const std::vector<double>& projection, int threads) {
  const TensorList new_weights("after", after), old_weights("before", before), kept("mask", mask);
  check_lengths(projection.size(), {&new_weights, &old_weights, &kept});
  std::vector<MergeLayer> layers;
  for (std::size_t i = 0; i < projection.size(); ++i) {
    layers.push_back({new_weights.views()[i], old_weights.views()[i], kept.views()[i], projection[i]});
  }
  const py::gil_scoped_release unlocked;
  merge(layers, threads);
}

void project_(const py::sequence& grads, const py::sequence& basis, int passes, int threads) {
  const TensorList vectors("grads", grads), known("basis", basis);
  const py::gil_scoped_release unlocked;
  project(vectors.views(), known.views(), passes, threads);
}

std::tuple<std::int64_t, std::int64_t> orthonormalize_(const py::object& vectors, const py::object& basis, double rtol,
                                                       int threads) {
  const TensorArgument rows("vectors", vectors);
  const OptionalTensor known("basis", basis);
  OrthonormalizeResult result;
  {
    const py::gil_scoped_release unlocked;
    result = orthonormalize(rows.view(), known.view(), rtol, threads);
  }
  return {result.kept, result.bad_row};
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = HPA_BUILD_COMPILER;
  info["build_type"] = HPA_BUILD_TYPE;
  info["flags"] = HPA_BUILD_FLAGS;
  info["openmp"] = HPA_BUILD_OPENMP;
  info["cuda"] = HPA_BUILD_CUDA;
  return info;
}

}  // namespace
}  // namespace hpa::bindings

PYBIND11_MODULE(_cpu, module) {
  using namespace hpa::bindings;
  module.doc() = "Compiled kernels of hpa_ext for the CPU; use them through the functions of hpa_ext.";
  module.attr("__version__") = HPA_VERSION;
  module.attr("INTERFACE") = kInterface;
  module.def("build_info", &build_info, "What the module was built with.");
  module.def("max_threads", &hpa::parallel::max_threads, "Threads that this process may run on (1 without OpenMP).");
  module.def("thread_runtime", &hpa::parallel::runtime, "OpenMP runtime in use: process, a file name, or none.");
  module.def("isa", [] { return hpa::isa::active().name; }, "Instruction set in use.");
  module.def("available_isas", &hpa::isa::available, "Instruction sets that this machine can run, slowest first.");
  module.def("select_isa", &hpa::isa::select, "Switches the instruction set for the whole process.");
  module.def("is_read_only", &is_read_only, "Whether an array's DLPack export is marked read-only.");

  module.def("accumulate_gram_", &accumulate_gram_);
  module.def("inverse_diagonal", &inverse_diagonal_);
  module.def("accumulate_importance_", &accumulate_importance_);
  module.def("change_statistics", &change_statistics_);
  module.def("change_statistics_list", &change_statistics_list);
  module.def("balanced_mask", &balanced_mask_);
  module.def("merge_", &merge_);
  module.def("merge_list_", &merge_list_);
  module.def("project_", &project_);
  module.def("orthonormalize_", &orthonormalize_);

  add_direct_calls(module);
}
