// Checked tensors of the transformer ops.
#pragma once

#include "../tensors.h"
#include "transformer_block.h"

namespace fastdiff {

inline BlockShape block_shape(const char* op, int64_t dim, int64_t hidden, int64_t heads, double eps) {
  FASTDIFF_CHECK(heads >= 1 && dim >= 1 && dim % heads == 0 && dim <= (1 << 16), op,
                 ": dim must be a multiple of heads (got ", dim, " and ", heads, ")");
  FASTDIFF_CHECK(hidden >= 1 && hidden <= (1 << 18), op, ": hidden must be in 1 .. 2^18 (got ", hidden, ")");
  return {static_cast<int>(dim), static_cast<int>(hidden), static_cast<int>(heads), static_cast<float>(eps)};
}

// Packed blocks and the pointers that kernels take; lives as long as they are used.
struct PackedBlocks {
  std::vector<Tensor> tensors;
  std::vector<const float*> pointers;

  PackedBlocks(const char* op, const std::vector<Tensor>& packed, const BlockShape& shape) {
    for (const Tensor& block : packed) {
      tensors.push_back(floats(op, "blocks", block, {block_floats(shape)}));
      pointers.push_back(data<float>(tensors.back()));
    }
  }
  int64_t size() const { return static_cast<int64_t>(tensors.size()); }
};

// Where each sequence begins among packed rows, and where the last one ends.
inline std::vector<int64_t> starts_of(const char* op, const Tensor& lengths) {
  const int64_t n = lengths.size(0);
  std::vector<int64_t> starts(n + 1, 0);
  for (int64_t i = 0; i < n; i++) {
    const int64_t length = data<int64_t>(lengths)[i];
    FASTDIFF_CHECK(length >= 0 && length < (1 << 24), op, ": lengths must be in 0 .. 2^24 (got ", length, ")");
    starts[i + 1] = starts[i] + length;
  }
  return starts;
}

}  // namespace fastdiff
