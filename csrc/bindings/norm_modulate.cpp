// Unpacks the arguments of norm_modulate (miga_engine/ops/norm_modulate.py: schema, fake, checks), spreads the work over
// threads and registers it.
#include <torch/csrc/stable/library.h>

#include <utility>
#include <vector>

#include "core/tensors.h"
#include "norm_modulate.h"

namespace miga {
namespace {

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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(miga, CPU, m) {
  m.impl("norm_modulate", TORCH_BOX(&norm_modulate_tokens));
  m.impl("residual_norm_modulate", TORCH_BOX(&residual_norm_modulate_tokens));
}

}  // namespace miga
