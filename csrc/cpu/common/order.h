// Memory order of tensors: comparison and conversion.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace resfast {

using torch::stable::Tensor;

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t axis = 0; same && axis < a.dim(); ++axis) same = a.size(axis) == b.size(axis);
  return same;
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t axis = 0; axis < a.dim(); ++axis)
    if (a.size(axis) > 1 && a.stride(axis) != b.stride(axis)) return false;
  return true;
}

// `tensor` itself, or a copy, dense in the memory order of `like`.
inline Tensor ordered(const Tensor& tensor, const Tensor& like) {
  if (same_strides(tensor, like)) return tensor;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, tensor);
  return copy;
}

} // namespace resfast
