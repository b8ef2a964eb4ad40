#include "sampler_update.h"

#include <algorithm>

#include "core/reductions.h"

namespace miga {
namespace {

constexpr int64_t kBlock = 1024;  // all buffers of a block stay in the first-level cache

template <typename T>
MIGA_INLINE void update_block(
    const SamplerRun<T>& run, const T* row, bool has_history, T guidance_scale, int64_t start, int64_t size) {
  T conditional[kBlock], buffer[kBlock], guided[kBlock], prediction[kBlock] = {}, corrected[kBlock] = {}, following[kBlock] = {};
  T* x = run.sample + start;
  T* y = run.last_sample + start;
  T* m1 = run.x0 + start;
  T* m2 = run.x0_previous + start;
  const int64_t first = run.first_of_pass + start;
  const T* v = widen(run.velocity_cond, first, size, conditional);
  if (run.velocity_uncond.data != nullptr) {
    const T* u = widen(run.velocity_uncond, first, size, buffer);
    if (const T* weights = run.guidance_weights; weights == nullptr) {
      for (int64_t i = 0; i < size; ++i) guided[i] = u[i] + guidance_scale * (v[i] - u[i]);
    } else {
      std::fill_n(guided, size, T(0));
      if (weights[0] != 0)
        for (int64_t i = 0; i < size; ++i) guided[i] = weights[0] * (v[i] - u[i]);
      add_term(guided, weights[1], u, size);
      add_term(guided, weights[2], x, size);
    }
    v = guided;
  }
  add_term(prediction, row[kMX], x, size);
  add_term(prediction, row[kMV], v, size);

  add_term(corrected, row[kCX], x, size);
  add_term(corrected, row[kCY], y, size);
  add_term(corrected, row[kCM], prediction, size);
  add_term(corrected, row[kCM1], m1, size);
  add_term(corrected, row[kCM2], m2, size);

  add_term(following, row[kPX], corrected, size);
  add_term(following, row[kPV], v, size);
  add_term(following, row[kPM], prediction, size);
  add_term(following, row[kPM1], m1, size);
  if (row[kPN] != 0 && run.noise_state != nullptr) {
    float drawn[kBlock];
    draw_normals(*run.noise_state, run.first_of_frame + start, size, drawn);
    add_term(following, row[kPN], widen({drawn, ElementType::kFloat}, 0, size, buffer), size);
  } else if (row[kPN] != 0 && run.noise.data != nullptr) {
    add_term(following, row[kPN], widen(run.noise, first, size, buffer), size);
  }

  if (has_history) {
    std::copy_n(m1, size, m2);
  } else {
    std::fill_n(m2, size, T(0));
  }
  std::copy_n(prediction, size, m1);
  std::copy_n(corrected, size, y);
  std::copy_n(following, size, x);
}

template <typename T>
MIGA_INLINE void update_blocks(
    const SamplerRun<T>& run, const T* row, bool has_history, T guidance_scale, int64_t size) {
  for (int64_t start = 0; start < size; start += kBlock)
    update_block(run, row, has_history, guidance_scale, start, std::min(kBlock, size - start));
}

}  // namespace

MIGA_CLONES void update_run(
    const SamplerRun<float>& run, const float* row, bool has_history, float guidance_scale, int64_t size) {
  update_blocks(run, row, has_history, guidance_scale, size);
}

MIGA_CLONES void update_run(
    const SamplerRun<double>& run, const double* row, bool has_history, double guidance_scale, int64_t size) {
  update_blocks(run, row, has_history, guidance_scale, size);
}

}  // namespace miga
