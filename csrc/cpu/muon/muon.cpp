// resfast::nesterov_ and resfast::move_filters_ on the CPU, the memory-bound parts of Muon; schemas
// and documentation: resfast/ops/muon/op.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../../common/check.h"
#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/order.h"

namespace resfast {
namespace {

constexpr int64_t kLeastElements = 1 << 14; // per thread
constexpr int64_t kSumElements = 4096;      // per partial sum; independent of the number of threads
constexpr int kLanes = 16;
constexpr double kLeastNorm = 1e-7;

template <class Dtype>
struct Nesterov {
  static RESFAST_INLINE void run(
      float* __restrict buffer, const float* __restrict grad,
      typename Dtype::Stored* __restrict update, float momentum, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float velocity = momentum * buffer[i] + grad[i];
      buffer[i] = velocity;
      update[i] = Dtype::store(grad[i] + momentum * velocity);
    }
  }
};

template <class Dtype>
struct Move {
  static RESFAST_INLINE void run(
      float* __restrict weight, const typename Dtype::Stored* __restrict update, float keep,
      float size, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      weight[i] = keep * weight[i] - size * Dtype::load(update[i]);
  }
};

struct SumOfSquares {
  static RESFAST_INLINE void run(const float* __restrict x, int64_t count, double* sum) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] * x[i + lane];
    for (; i < count; ++i) lanes[0] += x[i] * x[i];
    double total = 0;
    for (float lane : lanes) total += lane;
    *sum = total;
  }
};

double norm(const float* x, int64_t count) {
  const int64_t parts = (count + kSumElements - 1) / kSumElements;
  std::vector<double> sums(parts);
  torch::stable::parallel_for(
      0, parts, kLeastElements / kSumElements, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          const int64_t start = part * kSumElements;
          dispatch<SumOfSquares>(
              x + start, std::min(kSumElements, count - start), &sums[part]);
        }
      });
  double total = 0;
  for (double sum : sums) total += sum;
  return std::sqrt(total);
}

void check(const char* name, const Tensor& tensor, ScalarType dtype, const Tensor& like) {
  if (!tensor.is_cpu()) fail(name, " is not on the CPU");
  if (tensor.scalar_type() != dtype)
    fail(name, " is ", dtype_name(tensor.scalar_type()), "; expected ", dtype_name(dtype));
  if (!same_sizes(tensor, like))
    fail(name, " is ", shape_name(tensor.sizes()), "; expected ", shape_name(like.sizes()));
}

void check_written(const char* name, const Tensor& tensor) {
  check(name, tensor, ScalarType::Float, tensor);
  if (!same_strides(tensor, torch::stable::empty_like(tensor)))
    fail(name, " has gaps in memory; expected a dense tensor");
}

// Whether the update is bfloat16 instead of float32.
bool check_update(const Tensor& update, const Tensor& like) {
  const bool half = update.scalar_type() == ScalarType::BFloat16;
  check("update", update, half ? ScalarType::BFloat16 : ScalarType::Float, like);
  return half;
}

template <class Dtype>
void nesterov_pass(Tensor& buffer, const Tensor& grad, Tensor& update, float momentum) {
  auto* velocity = static_cast<float*>(buffer.mutable_data_ptr());
  const auto* gradient = static_cast<const float*>(grad.const_data_ptr());
  auto* out = static_cast<typename Dtype::Stored*>(update.mutable_data_ptr());
  torch::stable::parallel_for(
      0, buffer.numel(), kLeastElements, [&](int64_t begin, int64_t end) {
        dispatch<Nesterov<Dtype>>(velocity, gradient, out, momentum, begin, end);
      });
}

void nesterov_(Tensor buffer, const Tensor& grad, Tensor update, double momentum) {
  check_written("buffer", buffer);
  check("grad", grad, ScalarType::Float, buffer);
  const bool half = check_update(update, buffer);
  if (!same_strides(update, buffer)) fail("update is not in the memory order of buffer");
  const Tensor gradient = ordered(grad, buffer);
  if (half)
    nesterov_pass<BFloat16>(buffer, gradient, update, static_cast<float>(momentum));
  else
    nesterov_pass<Float32>(buffer, gradient, update, static_cast<float>(momentum));
}

template <class Dtype>
void move_pass(Tensor& weight, const Tensor& update, float keep, float size) {
  auto* target = static_cast<float*>(weight.mutable_data_ptr());
  const auto* step = static_cast<const typename Dtype::Stored*>(update.const_data_ptr());
  torch::stable::parallel_for(
      0, weight.numel(), kLeastElements, [&](int64_t begin, int64_t end) {
        dispatch<Move<Dtype>>(target, step, keep, size, begin, end);
      });
}

void move_filters_(Tensor weight, const Tensor& update, double size, double keep, bool normalize) {
  check_written("weight", weight);
  const bool half = check_update(update, weight);
  if (normalize && weight.numel()) {
    const auto* values = static_cast<const float*>(weight.const_data_ptr());
    keep *= std::sqrt(static_cast<double>(weight.size(0))) /
        std::max(norm(values, weight.numel()), kLeastNorm);
  }
  if (!same_strides(update, weight)) fail("update is not in the memory order of weight");
  if (half)
    move_pass<BFloat16>(weight, update, static_cast<float>(keep), static_cast<float>(size));
  else
    move_pass<Float32>(weight, update, static_cast<float>(keep), static_cast<float>(size));
}

} // namespace
} // namespace resfast

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("nesterov_", TORCH_BOX(&resfast::nesterov_));
  m.impl("move_filters_", TORCH_BOX(&resfast::move_filters_));
}
