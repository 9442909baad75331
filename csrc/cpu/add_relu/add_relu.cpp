// resfast::add_relu and its backward on the CPU; schema and documentation:
// resfast/ops/add_relu/op.py.

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../../common/check.h"
#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/order.h"

namespace resfast {
namespace {

template <class Dtype>
struct AddRelu {
  using Stored = typename Dtype::Stored;
  static RESFAST_INLINE void run(
      const Stored* __restrict x, const Stored* __restrict residual, Stored* __restrict out,
      int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float sum = Dtype::load(x[i]) + Dtype::load(residual[i]);
      out[i] = Dtype::store(sum <= 0 ? 0 : sum); // keeps NaN
    }
  }
};

template <class Dtype>
struct AddReluBackward {
  using Stored = typename Dtype::Stored;
  static RESFAST_INLINE void run(
      const Stored* __restrict grad, const Stored* __restrict result, Stored* __restrict out,
      int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      out[i] = Dtype::load(result[i]) <= 0 ? Stored{0} : grad[i];
  }
};

template <template <class> class Kernel, class Dtype>
void over_threads(const Tensor& first, const Tensor& second, Tensor& out) {
  using Stored = typename Dtype::Stored;
  const auto* a = static_cast<const Stored*>(first.const_data_ptr());
  const auto* b = static_cast<const Stored*>(second.const_data_ptr());
  auto* target = static_cast<Stored*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, out.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
    dispatch<Kernel<Dtype>>(a, b, target, begin, end);
  });
}

template <template <class> class Kernel>
Tensor elementwise(
    const char* first_name, const Tensor& first, const char* second_name, const Tensor& second,
    const Tensor& order) {
  const ScalarType dtype = first.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half)
    fail(first_name, " is ", dtype_name(dtype),
         "; expected one of torch.float32, torch.bfloat16, torch.float16");
  if (second.scalar_type() != dtype)
    fail(second_name, " is ", dtype_name(second.scalar_type()), "; expected ", dtype_name(dtype),
         ", like ", first_name);
  if (!first.is_cpu() || !second.is_cpu())
    fail(first.is_cpu() ? second_name : first_name, " is not on the CPU; expected cpu, like ",
         first.is_cpu() ? first_name : second_name);
  if (!same_sizes(first, second))
    fail(second_name, " is ", shape_name(second.sizes()), "; expected ", shape_name(first.sizes()),
         ", like ", first_name);

  Tensor out = torch::stable::empty_like(order);
  const Tensor a = ordered(first, out), b = ordered(second, out);
  switch (dtype) {
    case ScalarType::BFloat16: over_threads<Kernel, BFloat16>(a, b, out); break;
    case ScalarType::Half: over_threads<Kernel, Float16>(a, b, out); break;
    default: over_threads<Kernel, Float32>(a, b, out);
  }
  return out;
}

Tensor add_relu(const Tensor& x, const Tensor& residual) {
  return elementwise<AddRelu>("x", x, "residual", residual, x);
}

Tensor add_relu_backward(const Tensor& grad, const Tensor& result) {
  return elementwise<AddReluBackward>("grad", grad, "result", result, result);
}

} // namespace
} // namespace resfast

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("add_relu", TORCH_BOX(&resfast::add_relu));
  m.impl("add_relu_backward", TORCH_BOX(&resfast::add_relu_backward));
}
