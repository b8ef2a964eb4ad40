// From torch's tensors to plain memory. Only LibTorch's stable ABI is used, so one build serves several releases.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "elements.h"

namespace miga {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_element_type(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline ElementType element_type(ScalarType type) {
  STD_TORCH_CHECK(is_element_type(type), "dtype is ", toString(type), ", expected float32, float64, float16 or bfloat16");
  if (type == ScalarType::Float) return ElementType::kFloat;
  if (type == ScalarType::Double) return ElementType::kDouble;
  return type == ScalarType::Half ? ElementType::kHalf : ElementType::kBFloat16;
}

// The tensor itself where it is as asked: a call through the dispatcher costs more than a small tensor's arithmetic.
inline Tensor packed(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

inline Tensor packed(const Tensor& tensor, ScalarType type) {
  return packed(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

// Contiguous and of a type that `elements` takes.
inline Tensor readable(const Tensor& tensor) {
  return is_element_type(tensor.scalar_type()) ? packed(tensor) : packed(tensor, ScalarType::Float);
}

inline std::optional<Tensor> readable(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(readable(*tensor)) : std::nullopt;
}

inline ConstElements elements(const Tensor& tensor) { return {tensor.const_data_ptr(), element_type(tensor.scalar_type())}; }

inline ConstElements elements(const std::optional<Tensor>& tensor) {
  return tensor ? elements(*tensor) : ConstElements{nullptr, ElementType::kFloat};
}

template <typename T>
const T* data_if(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

}  // namespace miga
