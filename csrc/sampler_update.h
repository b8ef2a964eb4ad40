// Mathematics of sampler_update, free of torch.
#pragma once

#include <cstdint>

#include "core/elements.h"
#include "core/normal_noise.h"

namespace miga {

// The coefficients of a row, as miga_engine.schedule.COLUMNS names them.
enum Column : int64_t { kMX, kMV, kCX, kCY, kCM, kCM1, kCM2, kPX, kPV, kPM, kPM1, kPN, kNumCoefficients };

// A run of elements of one frame. Terms with coefficient 0 are left out, so what they point to is never read.
template <typename T>
struct SamplerRun {
  T* sample;       // x, becomes x'
  T* last_sample;  // y, becomes the corrected sample
  T* x0;           // m1, becomes m
  T* x0_previous;  // m2, becomes m1, or 0 where there is no history
  // Of all frames of the pass; the run begins at their element first_of_pass.
  ConstElements velocity_cond;
  ConstElements velocity_uncond;  // data null: no guidance
  ConstElements noise;            // data null: no noise term, unless it is drawn
  int64_t first_of_pass;
  const NoiseState* noise_state;  // null: no noise is drawn
  int64_t first_of_frame;     // the run's first element in its frame, a multiple of 4
  const T* guidance_weights;  // [3] of v_c - v_u, v_u and x; null: guidance_scale
};

// One solver step over `size` elements; row: [kNumCoefficients].
void update_run(const SamplerRun<float>& run, const float* row, bool has_history, float guidance_scale, int64_t size);
void update_run(const SamplerRun<double>& run, const double* row, bool has_history, double guidance_scale, int64_t size);

}  // namespace miga
