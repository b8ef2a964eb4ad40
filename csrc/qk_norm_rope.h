// Mathematics of qk_norm_rope on one token, free of torch; T is float or double.
#pragma once

#include <cstdint>

#include "core/elements.h"

namespace miga {

// For every channel of a head, x·cos + (its neighbour in the pair)·sin is the rotated x; from cosines and sines [num_pairs].
void expand_pairs(const float* cosines, const float* sines, int64_t num_pairs, float* cos, float* sin);
void expand_pairs(const double* cosines, const double* sines, int64_t num_pairs, double* cos, double* sin);

// row [num_heads·head_width] <- rotate(rms_norm(row)·weight), rounded once; weight null: no norm; cos, sin [head_width] null: no
// rotation. scratch: [2·num_heads·head_width].
void norm_rotate(
    Elements row, const float* weight, const float* cos, const float* sin, int64_t num_heads, int64_t head_width, float eps,
    float* scratch);
void norm_rotate(
    Elements row, const double* weight, const double* cos, const double* sin, int64_t num_heads, int64_t head_width, double eps,
    double* scratch);

}  // namespace miga
