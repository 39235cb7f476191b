#include "common/dtype.h"

#include <stdexcept>
#include <string>

namespace stretto {

void unsupported_dtype(DType t, const char* expected) {
  throw std::invalid_argument(std::string("dtype: ") + dtype_name(t) + ", expected " + expected);
}

}  // namespace stretto
