// Unpacks the arguments of the ops on tokens (miga_engine/ops/modulation.py: contracts, schemas, fakes, checks), spreads the work over
// threads and registers it with torch.
#include <torch/csrc/stable/library.h>

#include <algorithm>
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

// x [B,F,S,D] of T; y and its gate only for the residual form.
template <typename T>
Tensor modulate(
    const T* x, T* updated_x, const Tensor& shape, const std::optional<Tensor>& y, const std::optional<Tensor>& gate,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& rows, double eps,
    ScalarType dtype) {
  Tensor out = torch::stable::new_empty(shape, shape.sizes(), dtype);
  const int64_t tokens_per_frame = shape.size(2), width = shape.size(3);
  const int64_t num_tokens = shape.size(0) * shape.size(1) * tokens_per_frame;
  const std::optional<Tensor> packed_rows = rows ? std::optional<Tensor>(packed(*rows)) : std::nullopt;
  const int64_t* row_of_frame = data_if<int64_t>(packed_rows);
  const FrameTable<T> gates(gate, row_of_frame), weights(weight, row_of_frame), biases(bias, row_of_frame);
  const ConstElements residual = elements(y);
  const ElementType out_type = element_type(dtype);
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
  if (x.scalar_type() == ScalarType::Double)
    return modulate<double>(x.const_data_ptr<double>(), nullptr, x, {}, {}, weight, bias, rows, eps, dtype);
  return modulate<float>(x.const_data_ptr<float>(), nullptr, x, {}, {}, weight, bias, rows, eps, dtype);
}

Tensor residual_norm_modulate_tokens(
    Tensor x, const Tensor& y, std::optional<Tensor> gate, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> rows, double eps, ScalarType dtype) {
  const Tensor added = readable(y);
  if (x.scalar_type() == ScalarType::Double) {
    double* data = x.mutable_data_ptr<double>();
    return modulate<double>(data, data, x, added, gate, weight, bias, rows, eps, dtype);
  }
  float* data = x.mutable_data_ptr<float>();
  return modulate<float>(data, data, x, added, gate, weight, bias, rows, eps, dtype);
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

void qk_norm_rope(
    Tensor q, std::optional<Tensor> k, std::optional<Tensor> weight_q, std::optional<Tensor> weight_k,
    std::optional<Tensor> temporal, std::optional<Tensor> spatial, std::optional<Tensor> positions, int64_t num_heads,
    double eps) {
  const bool is_double = q.scalar_type() == ScalarType::Double;
  const auto as_table = [&](const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<Tensor>(packed(*tensor, is_double ? ScalarType::Double : ScalarType::Float)) : std::nullopt;
  };
  const auto packed_positions = positions ? std::optional<Tensor>(packed(*positions)) : std::nullopt;
  const auto run = is_double ? norm_rotate_tokens<double> : norm_rotate_tokens<float>;
  run(q, k, as_table(weight_q), as_table(weight_k), as_table(temporal), as_table(spatial), packed_positions, num_heads, eps);
}

// x of float32, contiguous.
void gelu_elements(Tensor x) {
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
