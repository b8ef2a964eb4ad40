// The torch side: unpacks tensors, spreads work over threads and registers the CPU implementations of the `miga` ops.
// Schemas, fakes and checks are Python's (miga_engine/ops); only LibTorch's stable ABI is used, so one build serves several releases.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "consistency_score.h"
#include "sampler_update.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor contiguous_float(const Tensor& tensor) {
  return torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float));
}

// reference [n,C,H,W], candidates [k,m,C,H,W] -> [k] float32
Tensor consistency_score(const Tensor& reference, const Tensor& candidates, std::string channels) {
  const bool use_all_channels = channels == "all";
  const Tensor reference_frames = contiguous_float(reference);
  const Tensor candidate_frames = contiguous_float(candidates);
  const int64_t num_candidates = candidates.size(0);
  const int64_t num_channels = reference.size(1);
  const int64_t num_positions = reference.size(2) * reference.size(3);
  const int64_t size = use_all_channels ? num_channels * num_positions : num_positions;
  const int64_t group_numel = candidates.size(1) * num_channels * num_positions;
  const float* reference_data = reference_frames.const_data_ptr<float>();
  const float* candidate_data = candidate_frames.const_data_ptr<float>();

  // Row 0 is the reference's mean direction, row 1 + k that of candidate k.
  std::vector<float> directions((num_candidates + 1) * size, 0.0f);
  torch::stable::parallel_for(0, num_candidates + 1, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(use_all_channels ? 0 : num_positions);
    for (int64_t row = begin; row < end; ++row) {
      const float* frames = row == 0 ? reference_data : candidate_data + (row - 1) * group_numel;
      const int64_t num_frames = row == 0 ? reference.size(0) : candidates.size(1);
      miga::add_mean_direction(
          frames, num_frames, num_channels, num_positions, use_all_channels, directions.data() + row * size, scratch.data());
    }
  });

  Tensor scores = torch::stable::new_empty(candidate_frames, {num_candidates});
  float* scores_data = scores.mutable_data_ptr<float>();
  for (int64_t k = 0; k < num_candidates; ++k)
    scores_data[k] = static_cast<float>(miga::dot(directions.data() + (k + 1) * size, directions.data(), size));
  return scores;
}

constexpr int64_t kRunElements = 16384;  // a thread's unit of work

// One solver step of the frames of a pass, state in place; every tensor is contiguous and states and frames are of type T.
template <typename T>
void update_frames(
    Tensor& sample, Tensor& last_sample, Tensor& x0, Tensor& x0_previous, const Tensor& cond, const std::optional<Tensor>& uncond,
    const Tensor& slots, const Tensor& coefficients, const Tensor& step_index, const Tensor& history_length, T guidance_scale,
    const std::optional<Tensor>& noise) {
  const int64_t num_frames = slots.numel();
  if (num_frames == 0) return;
  const int64_t frame_size = cond.numel() / num_frames;
  const int64_t num_runs = (frame_size + kRunElements - 1) / kRunElements;
  const int64_t num_histories = coefficients.size(1);
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const int64_t* step = step_index.const_data_ptr<int64_t>();
  const int64_t* history = history_length.const_data_ptr<int64_t>();
  const T* rows = coefficients.const_data_ptr<T>();
  const T* cond_data = cond.const_data_ptr<T>();
  const T* uncond_data = uncond ? uncond->const_data_ptr<T>() : nullptr;
  const T* noise_data = noise ? noise->const_data_ptr<T>() : nullptr;
  T* state[] = {sample.mutable_data_ptr<T>(), last_sample.mutable_data_ptr<T>(), x0.mutable_data_ptr<T>(),
                x0_previous.mutable_data_ptr<T>()};
  torch::stable::parallel_for(0, num_frames * num_runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t frame = unit / num_runs;
      if (slot[frame] < 0) continue;
      const int64_t start = unit % num_runs * kRunElements;
      const int64_t to = slot[frame] * frame_size + start;
      const int64_t from = frame * frame_size + start;
      const int64_t length = std::min(history[frame], num_histories - 1);
      const miga::SamplerRun<T> run{
          state[0] + to,
          state[1] + to,
          state[2] + to,
          state[3] + to,
          cond_data + from,
          uncond_data == nullptr ? nullptr : uncond_data + from,
          noise_data == nullptr ? nullptr : noise_data + from};
      miga::update_run(
          run, rows + (step[frame] * num_histories + length) * miga::kNumCoefficients, length > 0, guidance_scale,
          std::min(kRunElements, frame_size - start));
    }
  });
}

// Contract and formula: miga_engine.ops.sampler_update.
void sampler_update(
    Tensor sample, Tensor last_sample, Tensor x0, Tensor x0_previous, const Tensor& velocity_cond,
    std::optional<Tensor> velocity_uncond, const Tensor& slots, const Tensor& coefficients, const Tensor& step_index,
    const Tensor& history_length, double guidance_scale, std::optional<Tensor> noise, std::optional<Tensor> noise_counters,
    int64_t noise_seed) {
  const ScalarType type = sample.scalar_type();
  const auto packed = [type](const Tensor& tensor) { return torch::stable::contiguous(torch::stable::to(tensor, type)); };
  const auto packed_if = [&](const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<Tensor>(packed(*tensor)) : std::nullopt;
  };
  Tensor* states[] = {&sample, &last_sample, &x0, &x0_previous};
  std::vector<Tensor> dense;
  for (Tensor* state : states) dense.push_back(torch::stable::contiguous(*state));
  const auto run = [&](auto scale) {
    update_frames<decltype(scale)>(
        dense[0], dense[1], dense[2], dense[3], packed(velocity_cond), packed_if(velocity_uncond), torch::stable::contiguous(slots),
        packed(coefficients), torch::stable::contiguous(step_index), torch::stable::contiguous(history_length), scale,
        packed_if(noise));
  };
  if (type == ScalarType::Double) {
    run(guidance_scale);
  } else {
    run(static_cast<float>(guidance_scale));
  }
  for (size_t i = 0; i < dense.size(); ++i)
    if (!states[i]->is_contiguous()) torch::stable::copy_(*states[i], dense[i]);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(miga, CPU, m) {
  m.impl("consistency_score", TORCH_BOX(&consistency_score));
  m.impl("sampler_update", TORCH_BOX(&sampler_update));
}
