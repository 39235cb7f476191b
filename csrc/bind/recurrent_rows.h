// Checks that the recurrent cells share: which tokens belong to which sequence, and where its state is.
#pragma once
#include <vector>

#include "bind/bind.h"

namespace stretto {

// [batch + 1], from 0 to the number of tokens, never decreasing.
inline void require_bounds(const TensorView& cu_seqlens, const char* op, int64_t batch, int64_t tokens) {
  require_tensor(cu_seqlens, op, "cu_seqlens", DType::i32, {batch + 1});
  const int32_t* at = cu_seqlens.data<int32_t>();
  const auto found = [&](int64_t b) { return std::to_string(at[b]) + " at " + std::to_string(b); };
  require(at[0] == 0, op, "cu_seqlens", found(0) + ", expected 0");
  for (int64_t b = 0; b < batch; ++b)
    require(at[b + 1] >= at[b], op, "cu_seqlens", found(b + 1) + ", expected at least " + std::to_string(at[b]) + ", the value before it");
  require(at[batch] == tokens, op, "cu_seqlens", found(batch) + ", expected " + std::to_string(tokens) + ", the number of tokens");
}

// Slots in range, -1 for idle, and no slot twice where states are written.
inline void require_slots(const TensorView& ids, const char* op, int64_t num_slots, bool written) {
  require_tensor(ids, op, "slot_ids", DType::i32, {-1});
  std::vector<bool> used(static_cast<size_t>(written ? num_slots : 0));
  for (int64_t b = 0; b < ids.shape[0]; ++b) {
    const int32_t slot = ids.data<int32_t>()[b];
    const auto where = std::to_string(slot) + " at " + std::to_string(b);
    require(slot >= -1 && slot < num_slots, op, "slot_ids", where + ", expected -1 (idle) or a slot below " + std::to_string(num_slots));
    if (!written || slot < 0) continue;
    require(!used[static_cast<size_t>(slot)], op, "slot_ids", where + ", expected each slot once");
    used[static_cast<size_t>(slot)] = true;
  }
}

}  // namespace stretto
