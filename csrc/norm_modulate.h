// Mathematics of norm_modulate and residual_norm_modulate on one token, free of torch; T is float or double.
#pragma once

#include <cstdint>

#include "core/elements.h"

namespace miga {

// x += gate·y; gate null: 1. scratch: [width].
void add_gated(float* x, ConstElements y, const float* gate, int64_t width, float* scratch);
void add_gated(double* x, ConstElements y, const double* gate, int64_t width, double* scratch);

// out = layer_norm(x)·weight + bias, rounded to out's type; weight null: out = x.
void norm_modulate(const float* x, const float* weight, const float* bias, float eps, int64_t width, Elements out);
void norm_modulate(const double* x, const double* weight, const double* bias, double eps, int64_t width, Elements out);

}  // namespace miga
