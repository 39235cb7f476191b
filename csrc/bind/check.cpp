// The quick way through ops/_check.py: check_tensors costs 0.6 us here and ten times that in Python, as much as a small kernel.
// It only ever says "all is well". Whatever is not, or not known to be, goes to the Python function, which words the error.
#include "bind/bind.h"

namespace stretto {
namespace {

PyObject* words_of_shape = nullptr;  // dict: "rows 3 _" -> ("rows", 3, None)
PyObject *name_dtype = nullptr, *name_is_neg = nullptr;

// A borrowed tuple of words; nullptr with an error set, or without one where the shape is no string.
PyObject* words_of(PyObject* shape) {
  if (!PyUnicode_Check(shape)) return nullptr;
  if (PyObject* known = PyDict_GetItemWithError(words_of_shape, shape)) return known;
  py::list words;
  for (py::handle word : py::reinterpret_steal<py::list>(PyUnicode_Split(shape, nullptr, -1))) {
    if (word.attr("isdigit")().cast<bool>()) words.append(py::int_(py::str(word)));
    else if (word.cast<std::string>() == "_") words.append(py::none());
    else words.append(word);
  }
  if (PyDict_GET_SIZE(words_of_shape) >= 1024) PyDict_Clear(words_of_shape);  // shapes are literals; made-up ones must not pile up
  const py::tuple tuple(words);
  if (PyDict_SetItem(words_of_shape, shape, tuple.ptr()) != 0) throw py::error_already_set();
  return PyDict_GetItemWithError(words_of_shape, shape);
}

bool contains(PyObject* dtypes, PyObject* dtype) {
  if (!PyTuple_Check(dtypes)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(dtypes); ++i)
    if (PyTuple_GET_ITEM(dtypes, i) == dtype) return true;
  return false;
}

// A view such as x.conj().imag carries its minus sign as a flag that DLPack does not show.
bool is_negated(PyObject* tensor) {
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, name_is_neg));
  return answer.ptr() != Py_False;
}

bool has_memory(const DLTensor& dl) {
  if (dl.data) return true;
  for (int i = 0; i < dl.ndim; ++i)
    if (dl.shape[i] == 0) return true;
  return false;
}

bool fits(PyObject* argument, PyObject* sizes, DLDevice& device, bool& has_device) {
  if (!PyTuple_Check(argument) || PyTuple_GET_SIZE(argument) != 3) return false;
  PyObject* tensor = PyTuple_GET_ITEM(argument, 0);
  if (tensor == Py_None) return true;
  DLTensor dl;
  if (!borrow_tensor(tensor, dl) || !has_memory(dl)) return false;
  const auto dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name_dtype));
  if (!dtype || !contains(PyTuple_GET_ITEM(argument, 2), dtype.ptr())) return false;
  if ((dl.dtype.code == kDLFloat || dl.dtype.code == kDLBfloat) && is_negated(tensor)) return false;
  PyObject* words = words_of(PyTuple_GET_ITEM(argument, 1));
  if (!words || PyTuple_GET_SIZE(words) != dl.ndim) return false;
  for (int i = 0; i < dl.ndim; ++i) {
    PyObject* word = PyTuple_GET_ITEM(words, i);
    if (word == Py_None) continue;
    PyObject* want = PyLong_Check(word) ? word : PyDict_GetItemWithError(sizes, word);
    if (want) {
      if (PyLong_AsLongLong(want) != dl.shape[i]) return false;
    } else if (PyDict_SetItem(sizes, word, py::int_(dl.shape[i]).ptr()) != 0) {
      return false;
    }
  }
  if (has_device && (dl.device.device_type != device.device_type || dl.device.device_id != device.device_id)) return false;
  device = dl.device;
  return has_device = true;
}

// check_tensors(op, **tensors) as in ops/_check.py; `self` is that function.
PyObject* check_tensors(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* names) {
  try {
    const py::dict sizes;
    DLDevice device{};
    bool has_device = false, ok = nargs == 1 && names;
    for (Py_ssize_t i = 0; ok && i < PyTuple_GET_SIZE(names); ++i) ok = fits(args[nargs + i], sizes.ptr(), device, has_device);
    if (ok) return sizes.inc_ref().ptr();
  } catch (py::error_already_set&) {  // the Python function meets the same and says it better
  }
  PyErr_Clear();
  return PyObject_Vectorcall(self, args, static_cast<size_t>(nargs), names);
}

PyMethodDef definition = {"check_tensors", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&check_tensors)), METH_FASTCALL | METH_KEYWORDS,
                          nullptr};

}  // namespace

STRETTO_BIND(check) {
  words_of_shape = PyDict_New();
  name_dtype = PyUnicode_InternFromString("dtype");
  name_is_neg = PyUnicode_InternFromString("is_neg");
  m.def("quick_check", [](py::function slow) {
    return py::reinterpret_steal<py::object>(PyCFunction_New(&definition, slow.ptr()));  // keeps `slow`
  });
}

}  // namespace stretto
