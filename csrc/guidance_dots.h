// Mathematics of guidance_dots, free of torch.
#pragma once

#include <cstdint>

#include "core/elements.h"

namespace miga {

// A run of elements of one frame.
template <typename T>
struct GuidanceRun {
  const T* sample;  // not read where its weight is 0
  // Of all frames of the pass; the run begins at their element first_of_pass.
  ConstElements velocity_cond;
  ConstElements velocity_uncond;
  int64_t first_of_pass;
};

// With d = v_c - v_u and b the sum of x, v_c, v_u by direction [3]: <d,b>, <b,b>, <d,d> over `size` elements to dots [3].
void guidance_dots(const GuidanceRun<float>& run, const float* direction, int64_t size, float* dots);
void guidance_dots(const GuidanceRun<double>& run, const double* direction, int64_t size, double* dots);

}  // namespace miga
