// Unpacks the arguments of consistency_score (miga_engine/ops/consistency_score.py: schema, fake, checks), spreads the work over
// threads and registers it.
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "core/tensors.h"
#include "consistency_score.h"

namespace miga {
namespace {

// reference [n,C,H,W], candidates [k,m,C,H,W] -> [k] float32
Tensor consistency_score(const Tensor& reference, const Tensor& candidates, std::string channels) {
  STD_TORCH_CHECK(channels == "all" || channels == "mean", "channels is ", channels, ", expected mean or all");
  check_shape("reference", reference, {-1, -1, -1, -1});
  check_shape("candidates", candidates, {-1, -1, reference.size(1), reference.size(2), reference.size(3)});
  STD_TORCH_CHECK(
      reference.size(0) > 0 && candidates.size(1) > 0 && reference.size(1) > 0,
      "reference or candidates has no frames or no channels, expected one at least");
  const bool use_all_channels = channels == "all";
  const Tensor reference_frames = packed(reference, ScalarType::Float);
  const Tensor candidate_frames = packed(candidates, ScalarType::Float);
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
      add_mean_direction(
          frames, num_frames, num_channels, num_positions, use_all_channels, directions.data() + row * size, scratch.data());
    }
  });

  Tensor scores = torch::stable::new_empty(candidate_frames, {num_candidates});
  float* scores_data = scores.mutable_data_ptr<float>();
  for (int64_t k = 0; k < num_candidates; ++k)
    scores_data[k] = static_cast<float>(dot(directions.data() + (k + 1) * size, directions.data(), size));
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(miga, CPU, m) {
  m.impl("consistency_score", TORCH_BOX(&consistency_score));
}

}  // namespace miga
