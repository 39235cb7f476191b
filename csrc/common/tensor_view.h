// A tensor as C++ sees it: borrowed for the length of one call (a recorded step keeps its own reference), never owned.
#pragma once
#include <stdexcept>
#include <string>

#include "common/dtype.h"

namespace stretto {

struct TensorView {
  static constexpr int kMaxDims = 8;
  char* ptr = nullptr;  // first element; nullptr only when numel() is 0
  DType dtype = DType::f32;
  int ndim = 0;
  bool cuda = false;
  int device = 0;  // index among CUDA devices
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  // Contiguous from dimension `first` on: those dimensions can be read as one run of elements.
  bool contiguous_from(int first) const {
    if (numel() == 0) return true;  // strides of an empty tensor say nothing
    int64_t expected = 1;
    for (int i = ndim - 1; i >= first; --i) {
      if (shape[i] != 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
  bool contiguous() const { return contiguous_from(0); }
  void* data() const { return ptr; }
  template <class T> T* data() const { return reinterpret_cast<T*>(ptr); }
};

// What Python has not checked already. Python's message names sizes symbolically; this one guards the pointer arithmetic.
inline void require(bool ok, const char* op, const char* argument, const std::string& problem) {
  if (!ok) throw std::invalid_argument(std::string(op) + ": " + argument + ": " + problem);
}

// A tensor of this type and rank, dense from dimension `dense_from` on; -1 in `shape` is any size. That the tensors of a call share a device,
// Python's check_tensors has seen.
inline void require_tensor(const TensorView& t, const char* op, const char* argument, DType dtype, std::initializer_list<int64_t> shape,
                           int dense_from = 0) {
  require(t.dtype == dtype, op, argument, std::string(dtype_name(t.dtype)) + ", expected " + dtype_name(dtype));
  require(t.ndim == static_cast<int>(shape.size()), op, argument, std::to_string(t.ndim) + " dimensions, expected " + std::to_string(shape.size()));
  int i = 0;
  for (int64_t want : shape) {
    require(want < 0 || t.shape[i] == want, op, argument,
            "size " + std::to_string(t.shape[i]) + " in dimension " + std::to_string(i) + ", expected " + std::to_string(want));
    ++i;
  }
  require(t.contiguous_from(dense_from), op, argument, "strided, expected contiguous");
}

}  // namespace stretto
