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

using OptionalTensor = std::optional<TensorView>;
inline void* data_or_null(const OptionalTensor& t) { return t ? t->data() : nullptr; }
template <class T> T* data_or_null(const OptionalTensor& t) { return t ? t->data<T>() : nullptr; }

// Runs a kernel now, and notes it when this thread records a step. The interpreter lock is released while it runs.
template <class P> void launch(const char* name, void (*kernel)(const P&), const P& params) {
  if (Step* step = Step::recording()) step->add(name, kernel, params);
  py::gil_scoped_release nogil;
  kernel(params);
}

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
