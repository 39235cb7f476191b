// Shared by the binding files: tensors in, errors out, and how a family adds its functions to the module.
#pragma once
#include <dlpack.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "common/step.h"
#include "common/tensor_view.h"

namespace stretto {

namespace py = pybind11;

// STRETTO_BIND(norm) { m.def(...); } in csrc/bind/norm.cpp; module.cpp calls them all. No list to edit.
using BindFn = void (*)(py::module_&);
std::vector<BindFn>& bind_functions();
#define STRETTO_BIND(family)                                                                        \
  static void bind_##family(py::module_& m);                                                        \
  static const bool bound_##family = (::stretto::bind_functions().push_back(&bind_##family), true); \
  static void bind_##family([[maybe_unused]] py::module_& m)

// Fills a view from a torch.Tensor or Parameter through DLPack's exchange table. Anything else, subclasses included, is a TypeError.
// While a step is recorded the tensor is kept alive by it.
TensorView view_of(py::handle tensor);

// The same for a look only: false (perhaps with a Python error set) instead of an exception, and nothing is kept alive.
bool borrow_tensor(py::handle tensor, DLTensor& dl);

// torch's current stream of the tensor's CUDA device.
void* current_stream(const TensorView& where);

using OptionalTensor = std::optional<TensorView>;
inline void* data_or_null(const OptionalTensor& t) { return t ? t->data() : nullptr; }
template <class T> T* data_or_null(const OptionalTensor& t) { return t ? t->data<T>() : nullptr; }

// Kernels of loaded libraries (common/kernel_table.h); csrc/bind/kernels.cpp.
bool routed(const char* name, const TensorView& where);  // to a library: tensors on a CUDA device, or the tests' shim is switched on
void launch_routed(const char* name, const void* params, size_t params_bytes, const TensorView& where);

// Runs a kernel now: the library's where the tensors are on a CUDA device (on torch's current stream), else the CPU's, which is also noted when
// this thread records a step. `where` is any of the op's tensors: they share a device. The interpreter lock is released while it runs.
template <class P> void launch(const char* name, void (*kernel)(const P&), const P& params, const TensorView& where) {
  if (routed(name, where)) return launch_routed(name, &params, sizeof(P), where);
  if (Step* step = Step::recording()) step->add(name, kernel, params);
  py::gil_scoped_release nogil;
  kernel(params);
}

// For an op without a CUDA kernel: Python sends its CUDA tensors to the reference.
template <class P> void launch(const char* name, void (*kernel)(const P&), const P& params) { launch(name, kernel, params, TensorView{}); }

}  // namespace stretto

namespace pybind11::detail {
template <> struct type_caster<stretto::TensorView> {
  PYBIND11_TYPE_CASTER(stretto::TensorView, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    if (!source || source.is_none()) return false;
    value = stretto::view_of(source);
    return true;
  }
};
}  // namespace pybind11::detail
