// Libraries of CUDA kernels: found by path, never linked, so that this module loads where there is no driver.
#include <dlfcn.h>

#include <cstring>
#include <map>

#include "bind/bind.h"
#include "common/kernel_table.h"

namespace stretto {
namespace {

using Kernels = std::map<std::string, const KernelEntry*, std::less<>>;
Kernels cuda_kernels, shim_kernels;  // filled once and then only read; guarded by the interpreter lock
bool shim_on = false;                // tests: CPU tensors go to the shim's kernels

py::tuple load_kernels(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  const auto table_of = reinterpret_cast<KernelTableFn>(dlsym(library, kKernelTableSymbol));
  if (!table_of) throw std::runtime_error(path + ": no kernel table");
  const KernelTable& table = *table_of();
  if (table.abi != kKernelAbi)
    throw std::runtime_error(path + ": kernel table of version " + std::to_string(table.abi) + ", expected " + std::to_string(kKernelAbi));
  Kernels& kernels = std::strcmp(table.target, "shim") == 0 ? shim_kernels : cuda_kernels;
  std::vector<std::string> names;
  for (uint32_t i = 0; i < table.count; ++i) {
    kernels[table.entries[i].name] = &table.entries[i];
    names.emplace_back(table.entries[i].name);
  }
  return py::make_tuple(table.target, names);
}

const KernelEntry* find(const char* name, const TensorView& where) {
  const Kernels& kernels = where.cuda ? cuda_kernels : shim_kernels;
  const auto found = kernels.find(std::string_view(name));
  return found == kernels.end() ? nullptr : found->second;
}

}  // namespace

bool routed(const char* name, const TensorView& where) { return where.cuda || (shim_on && find(name, where)); }

void launch_routed(const char* name, const void* params, size_t params_bytes, const TensorView& where) {
  const std::string op = name;
  const KernelEntry* entry = find(name, where);
  if (!entry) throw std::runtime_error(op + ": no CUDA kernel is loaded");
  if (Step::recording()) throw std::runtime_error(op + ": a Step records CPU kernels; on CUDA capture with torch.cuda.graph");
  if (entry->params_bytes != params_bytes)
    throw std::runtime_error(op + ": the library of CUDA kernels was built from other sources than the module; build both again");
  void* stream = where.cuda ? current_stream(where) : nullptr;
  char error[512];
  py::gil_scoped_release nogil;
  if (entry->launch(params, where.device, stream, error, sizeof error) != 0) throw std::runtime_error(op + ": " + error);
}

STRETTO_BIND(kernels) {
  m.def("load_kernels", &load_kernels, "Path of a library -> (what it runs on, names of its kernels).");
  m.def("route_to_shim", [](bool on) { shim_on = on; });
}

}  // namespace stretto
