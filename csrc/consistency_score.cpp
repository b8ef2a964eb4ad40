#include "consistency_score.h"

#include <cmath>

#include "core/clones.h"

namespace miga {
namespace {

constexpr int64_t kLanes = 16;  // independent accumulators: the sum vectorises without reassociating

MIGA_CLONES void mean_over_channels(const float* frame, int64_t num_channels, int64_t num_positions, float* out) {
  for (int64_t i = 0; i < num_positions; ++i) out[i] = frame[i];
  for (int64_t c = 1; c < num_channels; ++c) {
    const float* channel = frame + c * num_positions;
    for (int64_t i = 0; i < num_positions; ++i) out[i] += channel[i];
  }
  const float count = static_cast<float>(num_channels);
  for (int64_t i = 0; i < num_positions; ++i) out[i] /= count;
}

MIGA_CLONES void add_divided(const float* vector, float divisor, float* sum, int64_t size) {
  for (int64_t i = 0; i < size; ++i) sum[i] += vector[i] / divisor;
}

MIGA_CLONES void divide(float* vector, float divisor, int64_t size) {
  for (int64_t i = 0; i < size; ++i) vector[i] /= divisor;
}

}  // namespace

MIGA_CLONES double dot(const float* a, const float* b, int64_t size) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += static_cast<double>(a[i + j]) * static_cast<double>(b[i + j]);
  double total = 0;
  for (; i < size; ++i) total += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  for (double lane : lanes) total += lane;
  return total;
}

void add_mean_direction(
    const float* frames, int64_t num_frames, int64_t num_channels, int64_t num_positions, bool use_all_channels, float* sum,
    float* scratch) {
  const int64_t frame_size = num_channels * num_positions;
  const int64_t size = use_all_channels ? frame_size : num_positions;
  for (int64_t f = 0; f < num_frames; ++f) {
    const float* vector = frames + f * frame_size;
    if (!use_all_channels) {
      mean_over_channels(vector, num_channels, num_positions, scratch);
      vector = scratch;
    }
    const float norm = static_cast<float>(std::sqrt(dot(vector, vector, size)));
    add_divided(vector, norm > 0 ? norm : 1.0f, sum, size);
  }
  divide(sum, static_cast<float>(num_frames), size);
}

}  // namespace miga
