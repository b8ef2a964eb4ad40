// Unpacks the arguments of sampler_update (miga_engine/ops/sampler_update.py: schema, fake, checks), spreads the work over
// threads and registers it.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "core/tensors.h"
#include "sampler_update.h"

namespace miga {
namespace {

constexpr int64_t kRunElements = 16384;  // a thread's unit of work

// Contract and formula: miga_engine.ops.sampler_update. States are contiguous here, coefficients of their type T.
template <typename T>
void update_frames(
    std::vector<Tensor>& states, const Tensor& velocity_cond, const std::optional<Tensor>& velocity_uncond, const Tensor& slots,
    const Tensor& coefficients, const Tensor& step_index, const Tensor& history_length, double guidance_scale,
    const std::optional<Tensor>& guidance_weights, const std::optional<Tensor>& noise, const std::vector<NoiseState>& noise_states) {
  const int64_t num_frames = slots.numel();
  if (num_frames == 0) return;
  const int64_t frame_size = velocity_cond.numel() / num_frames;
  const int64_t num_runs = (frame_size + kRunElements - 1) / kRunElements;
  const int64_t num_histories = coefficients.size(1);
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const int64_t* step = step_index.const_data_ptr<int64_t>();
  const int64_t* history = history_length.const_data_ptr<int64_t>();
  const T* rows = coefficients.const_data_ptr<T>();
  const T* weights = data_if<T>(guidance_weights);
  T* state[4];
  for (int i = 0; i < 4; ++i) state[i] = states[i].mutable_data_ptr<T>();
  const ConstElements cond = elements(velocity_cond), uncond = elements(velocity_uncond), given_noise = elements(noise);
  torch::stable::parallel_for(0, num_frames * num_runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t frame = unit / num_runs;
      if (slot[frame] < 0) continue;
      const int64_t start = unit % num_runs * kRunElements;
      const int64_t to = slot[frame] * frame_size + start;
      const int64_t length = std::min(history[frame], num_histories - 1);
      const SamplerRun<T> run{
          state[0] + to, state[1] + to, state[2] + to, state[3] + to,
          cond,          uncond,        given_noise,   frame * frame_size + start,
          noise_states.empty() ? nullptr : &noise_states[frame], start, weights == nullptr ? nullptr : weights + frame * 3};
      update_run(
          run, rows + (step[frame] * num_histories + length) * kNumCoefficients, length > 0, static_cast<T>(guidance_scale),
          std::min(kRunElements, frame_size - start));
    }
  });
}

// counters [n,3]: words 1, 2 and 3 of each frame
std::vector<NoiseState> unpack_noise(const Tensor& counters, int64_t seed) {
  const uint64_t key = static_cast<uint64_t>(seed);
  const int64_t* words = counters.const_data_ptr<int64_t>();
  std::vector<NoiseState> noise_states;
  for (int64_t i = 0; i < counters.size(0); ++i, words += 3)
    noise_states.push_back(
        {{static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)},
         {static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[1]), static_cast<uint32_t>(words[2])}});
  return noise_states;
}

// Indices in bounds for every frame that has a slot, and no slot named twice: threads write them at the same time.
void check_frames(
    const Tensor& slots, const Tensor& step_index, const Tensor& history_length, int64_t num_slots, int64_t num_steps) {
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const int64_t* step = step_index.const_data_ptr<int64_t>();
  const int64_t* history = history_length.const_data_ptr<int64_t>();
  std::vector<bool> is_taken(num_slots);
  for (int64_t i = 0; i < slots.numel(); ++i) {
    check_index("slots", slot[i], -1, num_slots - 1);
    if (slot[i] < 0) continue;
    check_index("step_index", step[i], 0, num_steps - 1);
    check_index("history_length", history[i], 0, std::numeric_limits<int64_t>::max());
    STD_TORCH_CHECK(!is_taken[slot[i]], "slots names ", slot[i], " twice, expected every row once");
    is_taken[slot[i]] = true;
  }
}

void sampler_update(
    Tensor sample, Tensor last_sample, Tensor x0, Tensor x0_previous, const Tensor& velocity_cond,
    std::optional<Tensor> velocity_uncond, const Tensor& slots, const Tensor& coefficients, const Tensor& step_index,
    const Tensor& history_length, double guidance_scale, std::optional<Tensor> guidance_weights, std::optional<Tensor> noise,
    std::optional<Tensor> noise_counters, int64_t noise_seed) {
  const ScalarType type = sample.scalar_type();
  check_shape("sample", sample, {-1, -1, -1, -1});
  const std::initializer_list<int64_t> state_shape = {sample.size(0), sample.size(1), sample.size(2), sample.size(3)};
  check_shape("last_sample", last_sample, state_shape);
  check_shape("x0", x0, state_shape);
  check_shape("x0_previous", x0_previous, state_shape);
  check_shape("slots", slots, {-1});
  const int64_t num_frames = slots.size(0);
  const std::initializer_list<int64_t> pass_shape = {num_frames, sample.size(1), sample.size(2), sample.size(3)};
  check_shape("velocity_cond", velocity_cond, pass_shape);
  check_shape("velocity_uncond", velocity_uncond, pass_shape);
  check_shape("guidance_weights", guidance_weights, {num_frames, 3});
  check_shape("noise", noise, pass_shape);
  check_shape("noise_counters", noise_counters, {num_frames, 3});
  check_shape("step_index", step_index, {num_frames});
  check_shape("history_length", history_length, {num_frames});
  check_shape("coefficients", coefficients, {-1, -1, kNumCoefficients});
  STD_TORCH_CHECK(coefficients.size(1) > 0, "coefficients has no history lengths, expected one at least");
  const Tensor packed_slots = packed(slots), packed_steps = packed(step_index), packed_lengths = packed(history_length);
  check_frames(packed_slots, packed_steps, packed_lengths, sample.size(0), coefficients.size(0));
  Tensor* states[] = {&sample, &last_sample, &x0, &x0_previous};
  std::vector<Tensor> dense;
  for (Tensor* state : states) dense.push_back(packed(*state));
  std::vector<NoiseState> noise_states;
  if (noise_counters) noise_states = unpack_noise(packed(*noise_counters), noise_seed);
  const auto update = type == ScalarType::Double ? update_frames<double> : update_frames<float>;
  update(
      dense, readable(velocity_cond), readable(velocity_uncond), packed_slots, packed(coefficients, type), packed_steps,
      packed_lengths, guidance_scale, packed_if(guidance_weights, type), readable(noise), noise_states);
  for (size_t i = 0; i < dense.size(); ++i)
    if (!states[i]->is_contiguous()) torch::stable::copy_(*states[i], dense[i]);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(miga, CPU, m) {
  m.impl("sampler_update", TORCH_BOX(&sampler_update));
}

}  // namespace miga
