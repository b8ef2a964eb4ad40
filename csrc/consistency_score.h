// Mathematics of consistency_score, free of torch.
#pragma once

#include <cstdint>

namespace miga {

// sum[v] += û_f[v] / num_frames over the group's frames, where u_f is the frame's mean over channels (v over positions) or, with
// use_all_channels, the frame itself (v over channels and positions), and û = u/‖u‖, 0 for a zero frame.
// frames: [num_frames,num_channels,num_positions]; sum: zeroed; scratch: [num_positions], unused with use_all_channels.
void add_mean_direction(
    const float* frames, int64_t num_frames, int64_t num_channels, int64_t num_positions, bool use_all_channels, float* sum,
    float* scratch);

double dot(const float* a, const float* b, int64_t size);

}  // namespace miga
