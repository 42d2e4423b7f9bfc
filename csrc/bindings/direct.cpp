// Direct calls: the kernels for the arguments that nearly every call has, plain CPU tensors of torch.
//
// hpa_ext/ops.py asks here first.  An entry either does all of the work, or it has changed nothing and answers None ("it
// declines"); then ops.py goes on to its checks, which say what is wrong or serve the unusual call.  So an entry has no
// messages, and it needs to recognise only calls that are surely right: whatever it is not sure of, it declines.
//
// Where the time goes, accumulate_importance_ of two tensors of 1,000 float32, microseconds (Zen 3, 2 cores; torch's
// addcmul_ takes 1.6 to 1.8 in the same runs; the parts of a direct call are in part estimates):
//
//     checked path, 24   Python's checks of arguments 11, overlap 4, choice of a backend 3, os.environ 2,
//                        pybind11 with DLPack 2, detach() and the version counter 1
//     direct call, 1.2   Python's frame 0.1, each tensor 0.1 through DLPack, version counter 0.15, modes and environment
//                        0.1, the kernel and its lists 0.3
//
// What made the difference: no Python object besides the arguments, tensors read through the DLPack C exchange API
// without a capsule, getenv() instead of os.environ, outputs handed to torch through DLPack (half the price of
// torch.empty; like all such tensors they cannot be resized), and short work done on the caller's thread with the GIL
// held.  Lists cost 0.4 a tensor, against 8.4 on the checked path.
#include "direct.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <deque>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "choices.h"
#include "dlpack_arg.h"
#include "hpa/kernels.h"

namespace hpa::bindings {
namespace {

// Elements, or multiply-adds where they wait for each other, up to which a call keeps to one thread and to the GIL: some
// ten microseconds.  No kernel takes a second thread for so little.
constexpr std::int64_t kShort = 32 * 1024;
constexpr std::int64_t kVector = 4;  // multiply-adds of a product of matrices that take the time of one

// What the entries need from torch and from hpa_ext, handed over once by connect(); references are kept for ever.
struct Connection {
  const DLPackExchangeAPI* api = nullptr;
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyObject *is_neg = nullptr, *increment_version = nullptr, *dispatch_modes = nullptr;
  PyObject* num_threads = nullptr;
} torch;

// ---- Is this a call for us? ----

bool is_set(const char* variable) {
  const char* value = std::getenv(variable);
  return value != nullptr && *value != '\0';
}

bool is_falsy(PyObject* callable, PyObject* const* arguments, std::size_t count) {
  PyObject* result = PyObject_Vectorcall(callable, arguments, count, nullptr);
  const int truth = result == nullptr ? -1 : PyObject_IsTrue(result);
  Py_XDECREF(result);
  if (truth < 0) PyErr_Clear();
  return truth == 0;
}

// No backend is named, and no mode of torch (fake tensors, tracing) stands between a call and its operators.
bool is_plain_call() {
  return torch.api != nullptr && !is_set("HPA_BACKEND") && is_falsy(torch.dispatch_modes, nullptr, 0);
}

std::optional<DType> dtype_of(const DLDataType& dtype) {
  if (dtype.lanes != 1) return std::nullopt;
  if (dtype.code == kDLFloat) {
    if (dtype.bits == 32) return DType::f32;
    if (dtype.bits == 64) return DType::f64;
    if (dtype.bits == 16) return DType::f16;
  }
  if (dtype.code == kDLBfloat && dtype.bits == 16) return DType::bf16;
  if (dtype.code == kDLBool && dtype.bits == 8) return DType::boolean;
  return std::nullopt;
}

DType wide(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// The imaginary part of a conjugated complex tensor is negated lazily, and DLPack does not tell.  To ask torch costs more
// than to read the tensor, so what surely is no imaginary part is not asked about: such a part takes steps over real
// parts, so all its strides are even, and starts behind one.  (torch._neg_view, not public, negates anything.)
bool cannot_be_negated(const TensorView& view) {
  if (view.dtype == DType::boolean) return true;
  const auto complex_size = static_cast<std::uintptr_t>(2 * element_size(view.dtype));
  if (reinterpret_cast<std::uintptr_t>(view.data) % complex_size != 0) return false;
  for (int d = 0; d < view.dims; ++d) {
    if (view.shape[d] != 1 && view.stride[d] % 2 != 0) return true;
  }
  return false;
}

// Reads a torch.Tensor or torch.nn.Parameter, no subclass, that lies on the CPU and has elements.
bool read(PyObject* object, TensorView& view) {
  if (Py_TYPE(object) != torch.tensor && Py_TYPE(object) != torch.parameter) return false;
  DLTensor tensor;
  if (torch.api->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
    PyErr_Clear();  // sparse, quantised, on the meta device, wrapped by a function transform, ...
    return false;
  }
  const std::optional<DType> dtype = dtype_of(tensor.dtype);
  if (!dtype || tensor.device.device_type != kDLCPU || tensor.ndim < 1 || tensor.ndim >= kMaxDims) return false;
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.dtype = *dtype;
  view.dims = tensor.ndim;
  std::copy(tensor.shape, tensor.shape + tensor.ndim, view.shape);
  std::copy(tensor.strides, tensor.strides + tensor.ndim, view.stride);
  // Memory that is not there belongs to tensors that only stand for others (functionalisation, zeros without storage).
  if (tensor.data == nullptr || view.numel() == 0) return false;
  return cannot_be_negated(view) || is_falsy(torch.is_neg, &object, 1);
}

bool is_float(const TensorView& view) { return view.dtype != DType::boolean; }
bool read_float(PyObject* object, TensorView& view) { return read(object, view) && is_float(view); }

bool is_list(PyObject* object) { return PyList_CheckExact(object) || PyTuple_CheckExact(object); }

// Reads one tensor, or a list or tuple of them.
bool read_tensors(PyObject* object, std::vector<TensorView>& views) {
  if (!is_list(object)) return read(object, views.emplace_back());
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(object);
  views.reserve(static_cast<std::size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!read(PySequence_Fast_GET_ITEM(object, i), views.emplace_back())) return false;
  }
  return count > 0;
}

bool read_floats(PyObject* object, std::vector<TensorView>& views) {
  return read_tensors(object, views) && std::all_of(views.begin(), views.end(), is_float);
}

bool read(PyObject* object, double& number) {
  if (PyFloat_CheckExact(object)) {
    number = PyFloat_AS_DOUBLE(object);
  } else if (PyLong_CheckExact(object)) {
    number = PyLong_AsDouble(object);
    if (number == -1.0 && PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      return false;
    }
  } else {
    return false;
  }
  return std::isfinite(number);
}

bool read(PyObject* object, std::int64_t& count) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  count = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

template <class Value, std::size_t Count>
bool read(PyObject* object, Value& value, const Choice<Value> (&choices)[Count]) {
  if (!PyUnicode_CheckExact(object)) return false;
  for (const auto& [word, meaning] : choices) {
    if (PyUnicode_CompareWithASCIIString(object, word) != 0) continue;
    value = meaning;
    return true;
  }
  return false;
}

bool is_contiguous(const TensorView& view) {
  std::int64_t compact = 1;
  for (int d = view.dims - 1; d >= 0; --d) {
    if (view.shape[d] != 1 && view.stride[d] != compact) return false;
    compact *= view.shape[d];
  }
  return true;
}

// Each element surely has memory of its own: contiguous, or a matrix with room between its rows.
bool is_writable(const TensorView& view) {
  return is_contiguous(view) ||
         (view.dims == 2 && (view.stride[1] == 1 || view.shape[1] == 1) && view.stride[0] >= view.shape[1]);
}

// Reads [..., n] as a matrix [rows, n]; false where that takes more than one stride.
bool flatten_rows(TensorView& view) {
  if (view.dims == 2) return true;
  if (view.dims > 2 && !is_contiguous(view)) return false;
  const std::int64_t n = view.shape[view.dims - 1], step = view.stride[view.dims - 1];
  view.shape[0] = view.numel() / n;
  view.stride[0] = n;
  view.shape[1] = n;
  view.stride[1] = step;
  view.dims = 2;
  return true;
}

// The bytes that tensors can touch; strides of torch are never negative.
class Spans {
 public:
  explicit Spans(std::size_t count) { spans_.reserve(count); }

  void add(const TensorView& view, bool is_written) {
    std::int64_t last = 0;
    for (int d = 0; d < view.dims; ++d) last += (view.shape[d] - 1) * view.stride[d];
    const auto start = reinterpret_cast<std::uintptr_t>(view.data);
    spans_.push_back({start, start + static_cast<std::uintptr_t>((last + 1) * element_size(view.dtype)), is_written});
  }

  // Nothing that is written can meet anything else.
  bool are_apart() {
    std::sort(spans_.begin(), spans_.end(), [](const Span& a, const Span& b) { return a.start < b.start; });
    std::uintptr_t end_of_all = 0, end_of_written = 0;
    for (const Span& span : spans_) {
      if (span.start < (span.is_written ? end_of_all : end_of_written)) return false;
      end_of_all = std::max(end_of_all, span.stop);
      if (span.is_written) end_of_written = std::max(end_of_written, span.stop);
    }
    return true;
  }

 private:
  struct Span {
    std::uintptr_t start, stop;
    bool is_written;
  };
  std::vector<Span> spans_;
};

bool are_apart(const TensorView& written, std::initializer_list<const TensorView*> read) {
  Spans spans(1 + read.size());
  spans.add(written, true);
  for (const TensorView* view : read) spans.add(*view, false);
  return spans.are_apart();
}

bool are_apart(const std::vector<TensorView>& written, std::initializer_list<const std::vector<TensorView>*> read) {
  Spans spans(written.size() * (1 + read.size()));  // as a rule each list is as long
  for (const TensorView& view : written) spans.add(view, true);
  for (const std::vector<TensorView>* views : read) {
    for (const TensorView& view : *views) spans.add(view, false);
  }
  return spans.are_apart();
}

std::int64_t elements(const std::vector<TensorView>& views) {
  std::int64_t count = 0;
  for (const TensorView& view : views) count += view.numel();
  return count;
}

// ---- Doing it ----

bool is_positive_number(const char* text) {
  return *text != '\0' &&
         std::all_of(text, text + std::char_traits<char>::length(text), [](char c) { return '0' <= c && c <= '9'; }) &&
         std::any_of(text, text + std::char_traits<char>::length(text), [](char c) { return c != '0'; });
}

// Runs kernel(threads).  Short work stays on this thread, and keeps the GIL: to let it go and take it back costs as much
// as the work, and with other threads waiting for it a thousand times as much.  False: no number of threads to be had.
template <class Kernel>
bool run(std::int64_t work, const Kernel& kernel) {
  const char* forced = std::getenv("HPA_NUM_THREADS");
  if (work <= kShort && (forced == nullptr || is_positive_number(forced))) {
    kernel(1);
    return true;
  }
  PyObject* answer = PyObject_CallNoArgs(torch.num_threads);
  const long threads = answer == nullptr ? -1 : PyLong_AsLong(answer);
  Py_XDECREF(answer);
  if (threads < 1 || threads > std::numeric_limits<int>::max()) {
    PyErr_Clear();
    return false;
  }
  const py::gil_scoped_release unlocked;
  kernel(static_cast<int>(threads));
  return true;
}

// Memory for a result, which becomes a tensor of torch: [size], or 0-dim.
class Output {
 public:
  Output(DType dtype, std::optional<std::int64_t> size)
      : block_(Block::make(static_cast<std::size_t>(size.value_or(1) * element_size(dtype)))) {
    const auto code = dtype == DType::boolean ? kDLBool : dtype == DType::bf16 ? kDLBfloat : kDLFloat;
    block_->shape = size.value_or(1);
    block_->stride = 1;
    block_->managed = {};
    block_->managed.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
    block_->managed.manager_ctx = block_;
    block_->managed.deleter = [](DLManagedTensorVersioned* self) {
      Block::free(static_cast<Block*>(self->manager_ctx));
    };
    DLTensor& tensor = block_->managed.dl_tensor;
    tensor.data = block_ + 1;
    tensor.device = {kDLCPU, 0};
    tensor.ndim = size ? 1 : 0;
    tensor.dtype = {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(8 * element_size(dtype)), 1};
    tensor.shape = &block_->shape;
    tensor.strides = &block_->stride;
    view_.data = tensor.data;
    view_.dtype = dtype;
    view_.dims = tensor.ndim;
    view_.shape[0] = block_->shape;
    view_.stride[0] = 1;
  }
  ~Output() {
    if (block_ != nullptr) Block::free(block_);
  }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;

  const TensorView& view() const { return view_; }

  // A new reference, which owns the memory; nullptr with a Python exception.
  PyObject* release() {
    PyObject* tensor = nullptr;
    DLManagedTensorVersioned* managed = &std::exchange(block_, nullptr)->managed;
    if (torch.api->managed_tensor_to_py_object_no_sync(managed, reinterpret_cast<void**>(&tensor)) != 0) return nullptr;
    return tensor;
  }

 private:
  // On a line of the cache, which is cheaper by hand than asked of the allocator (buffer.h).
  struct alignas(64) Block {
    DLManagedTensorVersioned managed;
    std::int64_t shape, stride;
    void* memory;

    static Block* make(std::size_t size) {
      std::size_t space = sizeof(Block) + size + alignof(Block);
      void* const memory = ::operator new(space);
      void* place = memory;
      auto* block = static_cast<Block*>(std::align(alignof(Block), sizeof(Block), place, space));
      block->memory = memory;
      return block;
    }
    static void free(Block* block) { ::operator delete(block->memory); }
  };

  Block* block_;
  TensorView view_;
};

TensorView vector_of(double* data, std::int64_t size) {
  TensorView view;
  view.data = data;
  view.dtype = DType::f64;
  view.dims = 1;
  view.shape[0] = size;
  view.stride[0] = 1;
  return view;
}

PyObject* scalar(double value) {
  Output output(DType::f64, std::nullopt);
  *static_cast<double*>(output.view().data) = value;
  return output.release();
}

// Takes over new references; nullptr with a Python exception where one of them is missing.
template <class... Items>
PyObject* tuple_of(Items... items) {
  PyObject* const all[] = {items...};
  PyObject* tuple = std::all_of(std::begin(all), std::end(all), [](PyObject* item) { return item != nullptr; })
                        ? PyTuple_New(sizeof...(items))
                        : nullptr;
  Py_ssize_t place = 0;
  for (PyObject* item : all) {
    if (tuple != nullptr) {
      PyTuple_SET_ITEM(tuple, place++, item);
    } else {
      Py_XDECREF(item);
    }
  }
  return tuple;
}

// ---- The entries ----
//
// Each takes the positional arguments of its function in ops.py and returns what that returns, True for the tensor that
// was changed in place.  nullptr without a Python exception: declined.  Shapes and dtypes that do not fit each other are
// left to the kernels, whose guards throw before anything is written (kernels.h); here is what kernels do not check.

using Arguments = PyObject* const*;

// True, once autograd knows that memory it may have saved has changed: of a tensor, or of a list of them.
PyObject* written(PyObject* changed) {
  PyObject* tensors = is_list(changed) ? Py_NewRef(changed) : PyTuple_Pack(1, changed);
  if (tensors == nullptr) return nullptr;
  PyObject* result = PyObject_Vectorcall(torch.increment_version, &tensors, 1, nullptr);
  Py_DECREF(tensors);
  if (result == nullptr) return nullptr;
  Py_DECREF(result);
  return Py_NewRef(Py_True);
}

// gram, x, scale
PyObject* direct_accumulate_gram(Arguments arguments) {
  TensorView gram, x;
  double scale = 0;
  if (!read_float(arguments[0], gram) || !read_float(arguments[1], x) || !read(arguments[2], scale)) return nullptr;
  if (!flatten_rows(x) || !is_writable(gram) || !are_apart(gram, {&x})) return nullptr;
  const auto kernel = [&](int threads) { accumulate_gram(gram, x, scale, threads); };
  return run(x.numel() * x.shape[1] / kVector, kernel) ? written(arguments[0]) : nullptr;
}

// gram, damping, mode, activations, scale; the first attempt alone, and small: a failed attempt is made twice.
PyObject* direct_inverse_diagonal(Arguments arguments) {
  constexpr std::int64_t kMostColumns = 256;
  const bool from_gram = arguments[0] != Py_None;
  TensorView given;
  double damping = 0, scale = 0;
  DiagonalMode mode = DiagonalMode::exact;
  if (!read_float(arguments[from_gram ? 0 : 3], given) || !read(arguments[1], damping) ||
      !read(arguments[2], mode, kDiagonalModes) || !read(arguments[4], scale)) {
    return nullptr;
  }
  if ((from_gram && arguments[3] != Py_None) || !(damping > 0) || !(scale > 0) || given.dims != 2 ||
      given.shape[1] > kMostColumns || (from_gram && element_size(given.dtype) < 4)) {
    return nullptr;
  }
  Output diagonal(wide(given.dtype), given.shape[1]);
  const std::optional<TensorView> view(given);
  InverseDiagonalResult result;
  const auto kernel = [&](int threads) {
    result = inverse_diagonal(diagonal.view(), from_gram ? view : std::nullopt, from_gram ? std::nullopt : view, scale,
                              damping, mode, threads);
  };
  if (!run(given.numel() * given.shape[1], kernel)) return nullptr;
  return result.status == FactorStatus::ok && result.lambda > 0 ? diagonal.release() : nullptr;
}

constexpr Choice<bool> kImportanceKinds[] = {{"fisher", false}, {"taylor", true}};

// importance, grads, weights, kind
PyObject* direct_accumulate_importance(Arguments arguments) {
  std::vector<TensorView> importance, grads, weights;
  bool taylor = false;
  if (!read_floats(arguments[0], importance) || !read_floats(arguments[1], grads) ||
      !read(arguments[3], taylor, kImportanceKinds)) {
    return nullptr;
  }
  if (taylor ? !read_floats(arguments[2], weights) : arguments[2] != Py_None) return nullptr;
  if (is_list(arguments[1]) != is_list(arguments[0]) || (taylor && is_list(arguments[2]) != is_list(arguments[0]))) {
    return nullptr;
  }
  if (!std::all_of(importance.begin(), importance.end(), is_writable) || !are_apart(importance, {&grads, &weights})) {
    return nullptr;
  }
  const auto kernel = [&](int threads) { accumulate_importance(importance, grads, weights, threads); };
  return run(elements(importance), kernel) ? written(arguments[0]) : nullptr;
}

PyObject* statistics_of(Output& column_change, const double sums[3]) {
  return tuple_of(column_change.release(), scalar(sums[0]), scalar(sums[1]), scalar(sums[2]));
}

// A list of `count` items, entry(i) each, which are taken over; nullptr with a Python exception where one is missing.
template <class Entry>
PyObject* list_of(std::size_t count, const Entry& entry) {
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(count));
  for (std::size_t i = 0; list != nullptr && i < count; ++i) {
    PyObject* item = entry(i);
    if (item == nullptr) {
      Py_CLEAR(list);
    } else {
      PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), item);
    }
  }
  return list;
}

// before, after: one layer, or a list of them and a list for an answer
PyObject* direct_change_statistics(Arguments arguments) {
  std::vector<TensorView> before, after;
  if (is_list(arguments[0]) != is_list(arguments[1]) || !read_floats(arguments[0], before) ||
      !read_floats(arguments[1], after) || before.size() != after.size()) {
    return nullptr;
  }
  std::deque<Output> columns;
  std::vector<double> sums(3 * before.size());
  std::vector<ChangeLayer> layers;
  for (std::size_t i = 0; i < before.size(); ++i) {
    if (before[i].dims != 2) return nullptr;
    const Output& column_change = columns.emplace_back(wide(before[i].dtype), before[i].shape[1]);
    layers.push_back({column_change.view(), vector_of(sums.data() + 3 * i, 3), before[i], after[i]});
  }
  if (!run(elements(before), [&](int threads) { change_statistics(layers, threads); })) return nullptr;
  const auto entry = [&](std::size_t i) { return statistics_of(columns[i], sums.data() + 3 * i); };
  return is_list(arguments[0]) ? list_of(layers.size(), entry) : entry(0);
}

// alpha, mode, alpha_mode, alpha_sign, overflow, phi_norm
bool read(Arguments arguments, SelectionOptions& options) {
  std::int64_t sign = 0;
  PyObject* alpha = arguments[0];
  if (!PyTuple_CheckExact(alpha) || PyTuple_GET_SIZE(alpha) != 2 || !read(PyTuple_GET_ITEM(alpha, 0), options.alpha0) ||
      !read(PyTuple_GET_ITEM(alpha, 1), options.alpha1) || !read(arguments[1], options.mode, kSelectionModes) ||
      !read(arguments[2], options.alpha_mode, kAlphaModes) || !read(arguments[3], sign) ||
      !read(arguments[4], options.overflow, kOverflows) || !read(arguments[5], options.phi_norm, kPhiNorms)) {
    return false;
  }
  options.alpha_sign = static_cast<int>(sign);
  return sign == 1 || sign == -1;
}

// safety, task, keep, focus, and options
PyObject* direct_balanced_mask(Arguments arguments) {
  TensorView safety, task;
  SelectionOptions options;
  if (!read_float(arguments[0], safety) || !read_float(arguments[1], task) || safety.dims != 1 ||
      !read(arguments[2], options.keep) || !read(arguments[3], options.focus) || !read(arguments + 4, options)) {
    return nullptr;
  }
  Output mask(DType::boolean, safety.shape[0]);
  Selection result;
  if (!run(safety.numel(), [&](int) { result = balanced_mask(mask.view(), safety, task, options); })) return nullptr;
  return tuple_of(mask.release(), PyFloat_FromDouble(result.alpha), PyFloat_FromDouble(result.log_ratio),
                  PyLong_FromLongLong(result.overlap),
                  PyLong_FromLongLong(result.kept_safety_only + result.kept_overlap),
                  PyLong_FromLongLong(result.kept_safety_only), PyLong_FromLongLong(result.kept_overlap));
}

// One number, or a list of them, for `size` layers.
template <class Number>
bool read_numbers(PyObject* object, std::size_t size, std::vector<Number>& numbers) {
  numbers.resize(size);
  if (!is_list(object)) {
    if (!read(object, numbers[0])) return false;
    std::fill(numbers.begin(), numbers.end(), numbers[0]);
    return true;
  }
  if (static_cast<std::size_t>(PySequence_Fast_GET_SIZE(object)) != size) return false;
  for (std::size_t i = 0; i < size; ++i) {
    if (!read(PySequence_Fast_GET_ITEM(object, static_cast<Py_ssize_t>(i)), numbers[i])) return false;
  }
  return true;
}

// after, before, mask, projection
PyObject* direct_merge(Arguments arguments) {
  std::vector<TensorView> after, before, mask;
  std::vector<double> projection;
  const bool several = is_list(arguments[0]);
  if (is_list(arguments[1]) != several || is_list(arguments[2]) != several || (is_list(arguments[3]) && !several) ||
      !read_floats(arguments[0], after) || !read_floats(arguments[1], before) || !read_tensors(arguments[2], mask) ||
      before.size() != after.size() || mask.size() != after.size() ||
      !read_numbers(arguments[3], after.size(), projection) || !std::all_of(after.begin(), after.end(), is_writable) ||
      !are_apart(after, {&before, &mask})) {
    return nullptr;
  }
  std::vector<MergeLayer> layers;
  for (std::size_t i = 0; i < after.size(); ++i) layers.push_back({after[i], before[i], mask[i], projection[i]});
  return run(elements(after), [&](int threads) { merge(layers, threads); }) ? written(arguments[0]) : nullptr;
}

// What Edit in ops.py is made of: its fields but the last, and those of the last.
PyObject* edit_of(const EditLayer& layer, Output& mask, Output& column_change) {
  const Selection& chosen = layer.selection;
  return tuple_of(
      tuple_of(mask.release(), PyFloat_FromDouble(chosen.alpha), PyFloat_FromDouble(chosen.log_ratio),
               PyLong_FromLongLong(chosen.overlap), PyLong_FromLongLong(chosen.kept_safety_only + chosen.kept_overlap),
               PyLong_FromLongLong(chosen.kept_safety_only), PyLong_FromLongLong(chosen.kept_overlap),
               PyFloat_FromDouble(layer.projection)),
      statistics_of(column_change, static_cast<const double*>(layer.scalars.data)));
}

constexpr Choice<bool> kAdjustments[] = {{"fro", true}, {"off", false}};

// after, before, safety_diagonal, task_diagonal, keep, focus, projection, and options.  The answer is a list with an
// entry for each layer that was edited: where it is shorter, ops.py goes on with the rest.
PyObject* direct_edit(Arguments arguments) {
  std::vector<TensorView> after, before, safety, task;
  std::vector<std::int64_t> keep, focus;
  SelectionOptions options;
  bool adjusts = false;
  if (!read_floats(arguments[0], after) || !read_floats(arguments[1], before) || !read_floats(arguments[2], safety) ||
      !read_floats(arguments[3], task) || !read(arguments[6], adjusts, kAdjustments) || !read(arguments + 7, options)) {
    return nullptr;
  }
  const bool several = is_list(arguments[0]);
  const std::size_t count = after.size();
  for (int i = 1; i < 4; ++i) {
    if (is_list(arguments[i]) != several) return nullptr;
  }
  if (!several && (is_list(arguments[4]) || is_list(arguments[5]))) return nullptr;
  if (before.size() != count || safety.size() != count || task.size() != count ||
      !read_numbers(arguments[4], count, keep) || !read_numbers(arguments[5], count, focus) ||
      !std::all_of(after.begin(), after.end(), is_writable) || !are_apart(after, {&before, &safety, &task})) {
    return nullptr;
  }
  std::vector<EditLayer> layers(count);
  std::deque<Output> masks, column_changes;
  std::vector<double> scalars(3 * count);
  for (std::size_t i = 0; i < count; ++i) {
    if (after[i].dims != 2) return nullptr;
    const std::int64_t cols = after[i].shape[1];
    const TensorView sums = vector_of(scalars.data() + 3 * i, 3);
    layers[i] = {after[i],
                 before[i],
                 safety[i],
                 task[i],
                 column_changes.emplace_back(wide(after[i].dtype), cols).view(),
                 sums,
                 masks.emplace_back(DType::boolean, cols).view(),
                 keep[i],
                 focus[i]};
  }
  std::size_t done = 0;
  if (!run(elements(after), [&](int threads) { done = edit(layers, options, adjusts, threads); }) || done == 0) {
    return nullptr;
  }
  PyObject* changed = PyList_New(0);
  bool good = changed != nullptr;
  for (std::size_t i = 0; good && i < done; ++i) {
    PyObject* weight = several ? PySequence_Fast_GET_ITEM(arguments[0], static_cast<Py_ssize_t>(i)) : arguments[0];
    good = !layers[i].is_changed() || PyList_Append(changed, weight) == 0;
  }
  PyObject* marked = good ? written(changed) : nullptr;
  Py_XDECREF(changed);
  if (marked == nullptr) return nullptr;
  Py_DECREF(marked);
  return list_of(done, [&](std::size_t i) { return edit_of(layers[i], masks[i], column_changes[i]); });
}

// One vector's slice as the matrix [1, *shape] that the kernel reads, its basis [rank, numel] as [rank, *shape].
bool match_slices(TensorView& grad, TensorView& basis) {
  if (basis.dims == 2 && grad.dims > 1) {
    if (basis.shape[1] != grad.numel()) return false;
    std::int64_t step = basis.stride[1];
    basis.dims = grad.dims + 1;
    for (int d = grad.dims; d > 0; --d) {
      basis.shape[d] = grad.shape[d - 1];
      basis.stride[d] = step;
      step *= basis.shape[d];
    }
  }
  std::copy_backward(grad.shape, grad.shape + grad.dims, grad.shape + grad.dims + 1);
  std::copy_backward(grad.stride, grad.stride + grad.dims, grad.stride + grad.dims + 1);
  grad.shape[0] = 1;
  grad.stride[0] = 0;
  grad.dims += 1;
  return true;
}

// grads, basis, passes
PyObject* direct_project(Arguments arguments) {
  std::vector<TensorView> grads, basis;
  std::int64_t passes = 0;
  if (!read_floats(arguments[0], grads) || !read_floats(arguments[1], basis) || !read(arguments[2], passes)) {
    return nullptr;
  }
  if (passes < 1 || passes > std::numeric_limits<int>::max() || is_list(arguments[1]) != is_list(arguments[0]) ||
      grads.size() != basis.size() || !std::all_of(grads.begin(), grads.end(), is_writable) ||
      !are_apart(grads, {&basis})) {
    return nullptr;
  }
  if (is_list(arguments[0])) {
    for (std::size_t i = 0; i < grads.size(); ++i) {
      if (!match_slices(grads[i], basis[i])) return nullptr;
    }
  } else if (!flatten_rows(grads[0])) {
    return nullptr;
  }
  const auto kernel = [&](int threads) { project(grads, basis, static_cast<int>(passes), threads); };
  return run(elements(grads) * basis[0].shape[0], kernel) ? written(arguments[0]) : nullptr;
}

// vectors, basis, rtol
PyObject* direct_orthonormalize(Arguments arguments) {
  TensorView vectors;
  std::optional<TensorView> basis;
  double rtol = 0;
  if (!read_float(arguments[0], vectors) || vectors.dims != 2 || !is_writable(vectors)) return nullptr;
  if (arguments[1] != Py_None) {
    basis.emplace();
    if (!read_float(arguments[1], *basis) || basis->shape[0] >= vectors.shape[1] || !are_apart(vectors, {&*basis})) {
      return nullptr;
    }
  }
  if (arguments[2] == Py_None) {
    rtol = element_size(vectors.dtype) == 2 ? 1e-2 : 1e-4;
  } else if (!read(arguments[2], rtol) || rtol < 0 || rtol >= 1) {
    return nullptr;
  }
  OrthonormalizeResult result;
  const auto kernel = [&](int threads) { result = orthonormalize(vectors, basis, rtol, threads); };
  const std::int64_t rank = vectors.shape[0] + (basis ? basis->shape[0] : 0);
  if (!run(2 * vectors.numel() * rank, kernel) || result.bad_row >= 0) return nullptr;
  PyObject* marked = written(arguments[0]);
  if (marked == nullptr) return nullptr;
  Py_DECREF(marked);
  return PyLong_FromLongLong(result.kept);
}

template <Py_ssize_t Count, PyObject* (*Function)(Arguments)>
PyObject* entry(PyObject*, Arguments arguments, Py_ssize_t count) {
  if (count != Count) return PyErr_Format(PyExc_TypeError, "expected %zd positional arguments, got %zd", Count, count);
  PyObject* result = nullptr;
  try {
    if (is_plain_call()) result = Function(arguments);
  } catch (const std::exception&) {
    // Nothing has been written: the checked path will meet the same and report it.
  }
  if (result != nullptr || PyErr_Occurred() != nullptr) return result;
  Py_RETURN_NONE;
}

template <Py_ssize_t Count, PyObject* (*Function)(Arguments)>
PyMethodDef method(const char* name) {
  PyObject* (*const function)(PyObject*, Arguments, Py_ssize_t) = &entry<Count, Function>;
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    method<3, direct_accumulate_gram>("accumulate_gram_"),
    method<5, direct_inverse_diagonal>("inverse_diagonal"),
    method<4, direct_accumulate_importance>("accumulate_importance_"),
    method<2, direct_change_statistics>("change_statistics"),
    method<10, direct_balanced_mask>("balanced_mask"),
    method<4, direct_merge>("merge_"),
    method<13, direct_edit>("edit_"),
    method<3, direct_project>("project_"),
    method<3, direct_orthonormalize>("orthonormalize_"),
    {nullptr, nullptr, 0, nullptr},
};

bool connect(const py::type& tensor, const py::type& parameter, const py::object& is_neg,
             const py::object& increment_version, const py::object& dispatch_modes, const py::object& num_threads) {
  const auto keep = [](const py::object& object) { return object.inc_ref().ptr(); };
  torch.tensor = reinterpret_cast<PyTypeObject*>(keep(tensor));
  torch.parameter = reinterpret_cast<PyTypeObject*>(keep(parameter));
  torch.is_neg = keep(is_neg);
  torch.increment_version = keep(increment_version);
  torch.dispatch_modes = keep(dispatch_modes);
  torch.num_threads = keep(num_threads);
  torch.api = exchange_api(torch.tensor);
  return torch.api != nullptr;
}

}  // namespace

void add_direct_calls(py::module_& module) {
  py::module_ direct = module.def_submodule("direct", "Calls on plain CPU tensors of torch, used by hpa_ext.ops.");
  if (PyModule_AddFunctions(direct.ptr(), methods) != 0) throw py::error_already_set();
  direct.def("connect", &connect, py::kw_only(), py::arg("tensor"), py::arg("parameter"), py::arg("is_neg"),
             py::arg("increment_version"), py::arg("dispatch_modes"), py::arg("num_threads"),
             "Hands over what the calls need from torch; False where this torch lacks it.");
}

}  // namespace hpa::bindings
