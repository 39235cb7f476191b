#include "common/cuda_utils.cuh"

namespace stretto {

std::vector<KernelEntry>& kernel_entries() {
  static std::vector<KernelEntry> entries;
  return entries;
}

}  // namespace stretto

extern "C" __attribute__((visibility("default"))) const stretto::KernelTable* stretto_kernel_table() {
  static const stretto::KernelTable table{stretto::kKernelAbi, static_cast<uint32_t>(stretto::kernel_entries().size()),
                                          stretto::kernel_entries().data(), stretto::kKernelTarget};
  return &table;
}
