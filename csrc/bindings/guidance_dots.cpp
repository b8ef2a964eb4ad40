// Unpacks the arguments of guidance_dots (miga_engine/ops/guidance_dots.py: schema, fake, checks), spreads the work over
// threads and registers it.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "core/tensors.h"
#include "guidance_dots.h"

namespace miga {
namespace {

constexpr int64_t kRunElements = 16384;  // a thread's unit of work; a frame's runs are added in order

template <typename T>
void dots_of_frames(
    const Tensor& sample, const Tensor& velocity_cond, const Tensor& velocity_uncond, const Tensor& slots,
    const Tensor& direction, Tensor& dots) {
  const int64_t num_frames = slots.numel();
  if (num_frames == 0) return;
  const int64_t frame_size = velocity_cond.numel() / num_frames;
  const int64_t num_runs = (frame_size + kRunElements - 1) / kRunElements;
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const T* samples = sample.const_data_ptr<T>();
  const T* directions = direction.const_data_ptr<T>();
  const ConstElements cond = elements(velocity_cond), uncond = elements(velocity_uncond);
  std::vector<T> partial(num_frames * num_runs * 3);
  torch::stable::parallel_for(0, num_frames * num_runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t frame = unit / num_runs;
      if (slot[frame] < 0) continue;
      const int64_t start = unit % num_runs * kRunElements;
      const GuidanceRun<T> run{samples + slot[frame] * frame_size + start, cond, uncond, frame * frame_size + start};
      guidance_dots(run, directions + frame * 3, std::min(kRunElements, frame_size - start), &partial[unit * 3]);
    }
  });
  T* out = dots.mutable_data_ptr<T>();
  std::fill_n(out, num_frames * 3, T(0));
  for (int64_t unit = 0; unit < num_frames * num_runs; ++unit)
    for (int64_t i = 0; i < 3; ++i) out[unit / num_runs * 3 + i] += partial[unit * 3 + i];
}

// sample [L,C,H,W], velocities [n,C,H,W], slots [n], direction [n,3] -> [n,3] of sample's type
Tensor dots(
    const Tensor& sample, const Tensor& velocity_cond, const Tensor& velocity_uncond, const Tensor& slots,
    const Tensor& direction) {
  const ScalarType type = sample.scalar_type();
  check_shape("sample", sample, {-1, -1, -1, -1});
  check_shape("slots", slots, {-1});
  check_type("slots", slots, ScalarType::Long);
  const std::initializer_list<int64_t> pass_shape = {slots.size(0), sample.size(1), sample.size(2), sample.size(3)};
  check_shape("velocity_cond", velocity_cond, pass_shape);
  check_shape("velocity_uncond", velocity_uncond, pass_shape);
  check_shape("direction", direction, {slots.size(0), 3});
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Double, "sample has dtype ", toString(type),
      ", expected float32 or float64");
  const Tensor packed_slots = packed(slots);
  check_indices("slots", packed_slots, -1, sample.size(0) - 1);
  Tensor result = torch::stable::new_empty(sample, {slots.size(0), 3});
  const auto compute = type == ScalarType::Double ? dots_of_frames<double> : dots_of_frames<float>;
  compute(
      packed(sample), readable(velocity_cond), readable(velocity_uncond), packed_slots, packed(direction, type), result);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(miga, CPU, m) {
  m.impl("guidance_dots", TORCH_BOX(&dots));
}

}  // namespace miga
