// Unpacks the arguments of qk_norm_rope (miga_engine/ops/qk_norm_rope.py: schema, fake, checks), spreads the work over
// threads and registers it.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "core/tensors.h"
#include "qk_norm_rope.h"

namespace miga {
namespace {

// The tokens of q or k [B,N,D], with the norm's weight.
template <typename T>
class HeadTokens {
 public:
  HeadTokens(Tensor& tensor, const std::optional<Tensor>& weight)
      : data_(static_cast<char*>(tensor.mutable_data_ptr())),
        type_(element_type(tensor.scalar_type())),
        batch_bytes_(tensor.stride(0) * tensor.element_size()),
        token_bytes_(tensor.stride(1) * tensor.element_size()),
        weight_(data_if<T>(weight)) {}

  Elements row(int64_t batch_index, int64_t token) const {
    return {data_ + batch_index * batch_bytes_ + token * token_bytes_, type_};
  }
  const T* weight() const { return weight_; }

 private:
  char* data_;
  ElementType type_;
  int64_t batch_bytes_, token_bytes_;
  const T* weight_;  // null: no norm
};

template <typename T>
void norm_rotate_tokens(
    Tensor& q, std::optional<Tensor>& k, const std::optional<Tensor>& weight_q, const std::optional<Tensor>& weight_k,
    const std::optional<Tensor>& temporal, const std::optional<Tensor>& spatial, const std::optional<Tensor>& positions,
    int64_t num_heads, double eps) {
  const int64_t batch = q.size(0), num_tokens = q.size(1), width = q.size(2), head_width = width / num_heads;
  const bool has_rotation = temporal && spatial && positions;
  const int64_t tokens_per_frame = has_rotation ? spatial->size(0) : num_tokens;
  const int64_t time_pairs = has_rotation ? temporal->size(2) : 0, space_pairs = head_width / 2 - time_pairs;
  const T* time = data_if<T>(temporal);
  const T* space = data_if<T>(spatial);
  const int64_t* position = data_if<int64_t>(positions);
  std::vector<HeadTokens<T>> sides{{q, weight_q}};
  if (k) sides.emplace_back(*k, weight_k);
  torch::stable::parallel_for(0, batch * num_tokens, grain(width), [&](int64_t begin, int64_t end) {
    std::vector<T> buffer(2 * (width + head_width));
    T* scratch = buffer.data();
    T* cos = has_rotation ? scratch + 2 * width : nullptr;
    T* sin = has_rotation ? cos + head_width : nullptr;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t batch_index = row / num_tokens, token = row % num_tokens;
      if (has_rotation) {
        const T* in_time = time + position[row / tokens_per_frame] * 2 * time_pairs;
        const T* in_space = space + token % tokens_per_frame * 2 * space_pairs;
        expand_pairs(in_time, in_time + time_pairs, time_pairs, cos, sin);
        expand_pairs(in_space, in_space + space_pairs, space_pairs, cos + 2 * time_pairs, sin + 2 * time_pairs);
      }
      for (const HeadTokens<T>& side : sides)
        norm_rotate(
            side.row(batch_index, token), side.weight(), cos, sin, num_heads, head_width, static_cast<T>(eps), scratch);
    }
  });
}

// The contract as far as memory depends on it.
void check_heads(
    const Tensor& q, const std::optional<Tensor>& k, const std::optional<Tensor>& weight_q, const std::optional<Tensor>& weight_k,
    const std::optional<Tensor>& temporal, const std::optional<Tensor>& spatial, const std::optional<Tensor>& packed_positions,
    int64_t num_heads) {
  check_shape("q", q, {-1, -1, -1});
  const int64_t width = q.size(2);
  check_shape("k", k, {q.size(0), q.size(1), width});
  STD_TORCH_CHECK(
      width < 2 || (q.stride(2) == 1 && (!k || k->stride(2) == 1)), "q or k is strided along its last dimension, expected a contiguous one");
  check_shape("weight_q", weight_q, {width});
  check_shape("weight_k", weight_k, {width});
  STD_TORCH_CHECK(num_heads > 0 && width % num_heads == 0, "num_heads is ", num_heads, ", expected a divisor of the width ", width);
  STD_TORCH_CHECK(
      temporal.has_value() == spatial.has_value() && spatial.has_value() == packed_positions.has_value(),
      "temporal, spatial or positions is None, expected all or none of them");
  if (!temporal) return;
  check_shape("temporal", temporal, {-1, 2, -1});
  check_shape("spatial", spatial, {-1, 2, -1});
  check_shape("positions", packed_positions, {q.size(0), -1});
  const int64_t pairs = temporal->size(2) + spatial->size(2), tokens = packed_positions->size(1) * spatial->size(0);
  STD_TORCH_CHECK(
      2 * pairs * num_heads == width, "temporal and spatial have ", pairs, " pairs, expected half of the channels of a head");
  STD_TORCH_CHECK(tokens == q.size(1), "positions and spatial name ", tokens, " tokens, expected ", q.size(1), " as in q");
  check_indices("positions", *packed_positions, 0, temporal->size(0) - 1);
}

void qk_norm_rope(
    Tensor q, std::optional<Tensor> k, std::optional<Tensor> weight_q, std::optional<Tensor> weight_k,
    std::optional<Tensor> temporal, std::optional<Tensor> spatial, std::optional<Tensor> positions, int64_t num_heads,
    double eps) {
  const bool is_double = q.scalar_type() == ScalarType::Double;
  const auto as_table = [&](const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<Tensor>(packed(*tensor, is_double ? ScalarType::Double : ScalarType::Float)) : std::nullopt;
  };
  const auto packed_positions = packed_if(positions);
  check_heads(q, k, weight_q, weight_k, temporal, spatial, packed_positions, num_heads);
  const auto run = is_double ? norm_rotate_tokens<double> : norm_rotate_tokens<float>;
  run(q, k, as_table(weight_q), as_table(weight_k), as_table(temporal), as_table(spatial), packed_positions, num_heads, eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(miga, CPU, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
}

}  // namespace miga
