// From torch's tensors to plain memory. Only LibTorch's stable ABI is used, so one build serves several releases.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "core/elements.h"

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

inline std::optional<Tensor> packed_if(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(packed(*tensor)) : std::nullopt;
}

inline std::optional<Tensor> packed_if(const std::optional<Tensor>& tensor, ScalarType type) {
  return tensor ? std::optional<Tensor>(packed(*tensor, type)) : std::nullopt;
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

inline std::string listed(const int64_t* sizes, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + (sizes[i] < 0 ? "any" : std::to_string(sizes[i]));
  return text + "]";
}

inline void check_cpu(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is on another device than the CPU, expected it there like the others");
}

// A size below 0 may be anything.
inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected) {
  check_cpu(name, tensor);
  const auto sizes = tensor.sizes();
  bool is_equal = sizes.size() == expected.size();
  for (size_t i = 0; is_equal && i < sizes.size(); ++i) is_equal = expected.begin()[i] < 0 || sizes[i] == expected.begin()[i];
  STD_TORCH_CHECK(
      is_equal, name, " has shape ", listed(sizes.data(), sizes.size()), ", expected ", listed(expected.begin(), expected.size()));
}

inline void check_shape(const char* name, const std::optional<Tensor>& tensor, std::initializer_list<int64_t> expected) {
  if (tensor) check_shape(name, *tensor, expected);
}

inline void check_type(const char* name, const Tensor& tensor, ScalarType expected) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == expected, name, " has dtype ", toString(type), ", expected ", toString(expected));
}

// What the memory behind a table holds is decided by its indices alone.
inline void check_index(const char* name, int64_t index, int64_t least, int64_t most) {
  STD_TORCH_CHECK(index >= least && index <= most, name, " names ", index, ", expected ", least, " to ", most);
}

inline void check_indices(const char* name, const Tensor& packed_indices, int64_t least, int64_t most) {
  const int64_t* indices = packed_indices.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < packed_indices.numel(); ++i) check_index(name, indices[i], least, most);
}

constexpr int64_t kGrainElements = 16384;  // the least work for a thread

// In tokens of this width.
inline int64_t grain(int64_t width) { return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width)); }

template <typename T>
const T* data_if(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

}  // namespace miga
