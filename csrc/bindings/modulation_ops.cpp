// Unpacks the arguments of the ops on tokens (miga_engine/ops/modulation.py: contracts, schemas, fakes, checks), spreads the work over
// threads and registers it with torch.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "gelu.h"
#include "norm_modulate.h"
#include "qk_norm_rope.h"
#include "tensors.h"

namespace miga {
namespace {

constexpr int64_t kGrainElements = 16384;  // the least work for a thread

int64_t grain(int64_t width) { return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width)); }

// A table [R,D] of which every frame has a row.
template <typename T>
class FrameTable {
 public:
  FrameTable(const std::optional<Tensor>& table, const int64_t* rows)
      : data_(data_if<T>(table)), stride_(table ? table->stride(0) : 0), rows_(table && table->size(0) > 1 ? rows : nullptr) {}

  const T* row(int64_t frame) const { return rows_ == nullptr ? data_ : data_ + rows_[frame] * stride_; }

 private:
  const T* data_;  // null: no table
  int64_t stride_;
  const int64_t* rows_;  // null: one row serves every frame
};

// The contract as far as memory depends on it: x, rows and a table [R,D] each.
void check_modulation(
    const Tensor& x, const std::optional<Tensor>& gate, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& packed_rows) {
  check_shape("x", x, {-1, -1, -1, -1});
  STD_TORCH_CHECK(x.is_contiguous(), "x is strided, expected a contiguous tensor");
  STD_TORCH_CHECK(weight.has_value() == bias.has_value(), "weight or bias is None, expected both or neither");
  check_shape("rows", packed_rows, {x.size(0), x.size(1)});
  const std::pair<const char*, const std::optional<Tensor>&> tables[] = {{"gate", gate}, {"weight", weight}, {"bias", bias}};
  for (const auto& [name, table] : tables) {
    if (!table) continue;
    check_shape(name, *table, {-1, x.size(3)});
    check_type(name, *table, x.scalar_type());
    STD_TORCH_CHECK(x.size(3) < 2 || table->stride(1) == 1, name, " is strided along its last dimension, expected a contiguous one");
    STD_TORCH_CHECK(packed_rows || table->size(0) == 1, name, " has ", table->size(0), " rows, expected 1 without rows");
    if (table->size(0) != 1) check_indices("rows", *packed_rows, 0, table->size(0) - 1);
  }
}

// x [B,F,S,D] of T; y and its gate only for the residual form.
template <typename T>
Tensor modulate(
    const T* x, T* updated_x, const Tensor& shape, const std::optional<Tensor>& y, const std::optional<Tensor>& gate,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& packed_rows, double eps,
    ScalarType dtype) {
  const ElementType out_type = element_type(dtype);
  Tensor out = torch::stable::new_empty(shape, shape.sizes(), dtype);
  const int64_t tokens_per_frame = shape.size(2), width = shape.size(3);
  const int64_t num_tokens = shape.size(0) * shape.size(1) * tokens_per_frame;
  const int64_t* row_of_frame = data_if<int64_t>(packed_rows);
  const FrameTable<T> gates(gate, row_of_frame), weights(weight, row_of_frame), biases(bias, row_of_frame);
  const ConstElements residual = elements(y);
  char* out_data = static_cast<char*>(out.mutable_data_ptr());
  const int64_t y_bytes = y ? y->element_size() : 0, out_bytes = out.element_size();
  torch::stable::parallel_for(0, num_tokens, grain(width), [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(y ? width : 0);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t frame = token / tokens_per_frame, first = token * width;
      if (y) {
        const ConstElements added{static_cast<const char*>(residual.data) + first * y_bytes, residual.type};
        add_gated(updated_x + first, added, gates.row(frame), width, scratch.data());
      }
      norm_modulate(
          x + first, weights.row(frame), biases.row(frame), static_cast<T>(eps), width, {out_data + first * out_bytes, out_type});
    }
  });
  return out;
}

Tensor norm_modulate_tokens(
    const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> rows, double eps,
    ScalarType dtype) {
  const std::optional<Tensor> packed_rows = packed_if(rows);
  check_modulation(x, {}, weight, bias, packed_rows);
  if (x.scalar_type() == ScalarType::Double)
    return modulate<double>(x.const_data_ptr<double>(), nullptr, x, {}, {}, weight, bias, packed_rows, eps, dtype);
  return modulate<float>(x.const_data_ptr<float>(), nullptr, x, {}, {}, weight, bias, packed_rows, eps, dtype);
}

Tensor residual_norm_modulate_tokens(
    Tensor x, const Tensor& y, std::optional<Tensor> gate, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> rows, double eps, ScalarType dtype) {
  const std::optional<Tensor> packed_rows = packed_if(rows);
  check_modulation(x, gate, weight, bias, packed_rows);
  check_shape("y", y, {x.size(0), x.size(1), x.size(2), x.size(3)});
  const Tensor added = readable(y);
  if (x.scalar_type() == ScalarType::Double) {
    double* data = x.mutable_data_ptr<double>();
    return modulate<double>(data, data, x, added, gate, weight, bias, packed_rows, eps, dtype);
  }
  float* data = x.mutable_data_ptr<float>();
  return modulate<float>(data, data, x, added, gate, weight, bias, packed_rows, eps, dtype);
}

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

// x of float32, contiguous.
void gelu_elements(Tensor x) {
  STD_TORCH_CHECK(x.is_contiguous(), "x is strided, expected a contiguous tensor");
  float* data = x.mutable_data_ptr<float>();
  torch::stable::parallel_for(
      0, x.numel(), kGrainElements, [&](int64_t begin, int64_t end) { gelu(data + begin, end - begin); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(miga, CPU, m) {
  m.impl("norm_modulate", TORCH_BOX(&norm_modulate_tokens));
  m.impl("residual_norm_modulate", TORCH_BOX(&residual_norm_modulate_tokens));
  m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
  m.impl("gelu_", TORCH_BOX(&gelu_elements));
}

}  // namespace miga
