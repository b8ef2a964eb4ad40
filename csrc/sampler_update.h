// Mathematics of sampler_update, free of torch.
#pragma once

#include <cstdint>

namespace miga {

constexpr int64_t kNumCoefficients = 12;

// A run of elements of one frame. Terms with coefficient 0 are left out, so what they point to is never read.
template <typename T>
struct SamplerRun {
  T* sample;       // x, becomes x'
  T* last_sample;  // y, becomes the corrected sample
  T* x0;           // m1, becomes m
  T* x0_previous;  // m2, becomes m1, or 0 where there is no history
  const T* velocity_cond;
  const T* velocity_uncond;  // null: no guidance
  const T* noise;            // null: no noise term
};

// One solver step over `size` elements; row holds the coefficients in the order of miga_engine.schedule.COLUMNS.
void update_run(const SamplerRun<float>& run, const float* row, bool has_history, float guidance_scale, int64_t size);
void update_run(const SamplerRun<double>& run, const double* row, bool has_history, double guidance_scale, int64_t size);

}  // namespace miga
