// stretto._C: kernels on plain pointers. torch is neither included nor linked; see bind.h for how tensors arrive.
#include "bind/bind.h"

#include "common/isa.h"
#include "common/parallel.h"

namespace stretto {
namespace {

const DLPackExchangeAPI* exchange_api = nullptr;
PyTypeObject* tensor_types[2] = {};  // torch.Tensor, torch.nn.Parameter: exact types only
thread_local std::vector<py::object>* keep_alive = nullptr;

// Called once at import. A FakeTensor or a subclass would come through the table too, with a null pointer or another meaning,
// so view_of compares exact types.
void register_tensor_types(py::type tensor, py::type parameter) {
  py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  auto* header = static_cast<const DLPackExchangeAPIHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!header) throw py::error_already_set();
  while (header && header->version.major != DLPACK_MAJOR_VERSION) header = header->prev_api;
  if (!header) throw std::runtime_error("torch offers no DLPack exchange table of major version " + std::to_string(DLPACK_MAJOR_VERSION));
  exchange_api = reinterpret_cast<const DLPackExchangeAPI*>(header);
  if (!exchange_api->dltensor_from_py_object_no_sync) throw std::runtime_error("torch's DLPack exchange table cannot borrow tensors");
  tensor_types[0] = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  tensor_types[1] = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
}

DType dtype_of(const DLDataType& t) {
  if (t.lanes == 1) {
    switch (t.code) {
      case kDLFloat:
        if (t.bits == 32) return DType::f32;
        if (t.bits == 16) return DType::f16;
        if (t.bits == 64) return DType::f64;
        break;
      case kDLBfloat:
        if (t.bits == 16) return DType::bf16;
        break;
      case kDLInt:
        if (t.bits == 8) return DType::i8;
        if (t.bits == 32) return DType::i32;
        if (t.bits == 64) return DType::i64;
        break;
      case kDLUInt:
        if (t.bits == 8) return DType::u8;
        if (t.bits == 64) return DType::u64;
        break;
      case kDLBool: return DType::boolean;
      default: break;
    }
  }
  throw py::type_error("tensor: element type with DLPack code " + std::to_string(t.code) + " and " + std::to_string(t.bits) +
                       " bits, expected float32/16/64, bfloat16, int8/32/64, uint8/64 or bool");
}

// Python's side of recording; ops/step.py is its only user.
struct PyStep {
  Step step;
  std::vector<py::object> tensors;  // what the recorded pointers point into
  bool recording = false;           // guarded, like `running`, by the interpreter lock
  int running = 0;                  // replays under way, in any number of threads
};
thread_local PyStep* recorder = nullptr;  // holds a reference from start to stop

void start_step(py::object self) {
  PyStep& s = self.cast<PyStep&>();
  if (recorder) throw std::runtime_error("Step.start: this thread is recording already");
  if (s.recording || s.running) throw std::runtime_error("Step.start: the step is in use by another thread");
  s.recording = true;
  recorder = &s;
  Step::set_recording(&s.step);
  keep_alive = &s.tensors;
  self.inc_ref();
}

void stop_step(py::object self) {
  PyStep& s = self.cast<PyStep&>();
  if (recorder != &s) throw std::runtime_error("Step.stop: this thread is not recording the step");
  s.recording = false;
  recorder = nullptr;
  Step::set_recording(nullptr);
  keep_alive = nullptr;
  self.dec_ref();
}

// Replays without the interpreter lock. Calls are not added meanwhile, so several threads may replay at once, each into the same outputs.
template <class Replay> auto replay(PyStep& s, const Replay& body) {
  if (s.recording) throw std::runtime_error("Step.run: the step is still being recorded");
  struct Running {
    int& count;
    explicit Running(int& c) : count(c) { ++count; }
    ~Running() { --count; }
  } running(s.running);  // counts down with the lock held again
  py::gil_scoped_release nogil;
  return body();
}

}  // namespace

std::vector<BindFn>& bind_functions() {
  static std::vector<BindFn> functions;
  return functions;
}

static bool is_plain(PyTypeObject* type) { return type == tensor_types[0] || type == tensor_types[1]; }

bool borrow_tensor(py::handle tensor, DLTensor& dl) {
  return is_plain(Py_TYPE(tensor.ptr())) && exchange_api->dltensor_from_py_object_no_sync(tensor.ptr(), &dl) == 0;
}

TensorView view_of(py::handle tensor) {
  PyTypeObject* type = Py_TYPE(tensor.ptr());
  if (!is_plain(type)) throw py::type_error(std::string("tensor: ") + type->tp_name + ", expected torch.Tensor");
  DLTensor dl;
  if (exchange_api->dltensor_from_py_object_no_sync(tensor.ptr(), &dl) != 0) throw py::error_already_set();
  TensorView v;
  if (dl.ndim > TensorView::kMaxDims) throw py::type_error("tensor: " + std::to_string(dl.ndim) + " dimensions, expected at most 8");
  v.dtype = dtype_of(dl.dtype);
  v.ndim = dl.ndim;
  v.cuda = dl.device.device_type == kDLCUDA;
  if (!v.cuda && dl.device.device_type != kDLCPU) throw py::type_error("tensor: on a device other than CPU or CUDA");
  v.device = dl.device.device_id;
  v.ptr = static_cast<char*>(dl.data) + dl.byte_offset;
  int64_t dense = 1;
  for (int i = dl.ndim - 1; i >= 0; --i) {
    v.shape[i] = dl.shape[i];
    v.strides[i] = dl.strides ? dl.strides[i] : dense;
    dense *= dl.shape[i];
  }
  if (!dl.data && v.numel() != 0) throw py::type_error("tensor: no storage (a meta or fake tensor), expected real data");
  if (keep_alive) keep_alive->push_back(py::reinterpret_borrow<py::object>(tensor));
  return v;
}

void* current_stream(const TensorView& where) {
  void* stream = nullptr;
  if (exchange_api->current_work_stream(kDLCUDA, where.device, &stream) != 0) throw py::error_already_set();
  return stream;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of stretto. Use stretto.ops; nothing here checks enough for direct use.";
  m.def("register_tensor_types", &register_tensor_types);
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads);
  m.def("available_cpus", &available_cpus);
  m.def("isa", [] { return isa_name(active_isa()); });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512})
      if (isa_available(isa)) names.emplace_back(isa_name(isa));
    return names;
  });
  m.def("set_isa", [](const std::string& name) {
    for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512})
      if (name == isa_name(isa)) return set_isa(isa);
    throw std::invalid_argument("set_isa: isa: " + name + ", expected scalar, avx2 or avx512");
  });
  py::class_<PyStep>(m, "Step", "Kernel calls recorded from one pass of Python, replayed without it.")
      .def(py::init<>())
      .def("start", &start_step)
      .def("stop", &stop_step)
      .def(
          "run", [](PyStep& s, int threads) { replay(s, [&] { s.step.run(threads); }); }, py::arg("threads"))
      .def(
          "run_timed", [](PyStep& s, int threads) { return replay(s, [&] { return s.step.run_timed(threads); }); }, py::arg("threads"))
      .def("__len__", [](const PyStep& s) { return s.step.size(); });
  for (BindFn bind : bind_functions()) bind(m);
}

}  // namespace stretto
