// The definition of score_topk's scores, and the packing of its tables, on plain pointers.
#pragma once

#include "score_topk.h"

namespace fastdiff {

// scores[i] = float32 of ((q_0 e_0 + q_1 e_1) + q_2 e_2) + ... in float64; a zero is +0
FASTDIFF_KERNEL(void, topk_exact, (const topk::ExactArgs&))

// A number near the k-th largest of `values`, and not above it: at least k of them reach it. n >= k.
FASTDIFF_KERNEL(float, topk_floor, (const float* values, int64_t n, int64_t k))

// Keeps what may reach the floor; returns how many that are.
FASTDIFF_KERNEL(int64_t, topk_prune, (topk::Kept&, float floor))

FASTDIFF_KERNEL(void, topk_pack, (const topk::PackArgs&))

}  // namespace fastdiff
