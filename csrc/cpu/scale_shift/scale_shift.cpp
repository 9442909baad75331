// resfast::scale_shift: a batch norm in eval mode over maps that are concatenated, with an
// activation, in one pass. Called by resfast/ops/scale_shift/op.py, which documents it and numbers
// the activations.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../../common/check.h"
#include "../common/dtype.h"
#include "../common/isa.h"

namespace resfast {
namespace {

constexpr int64_t kValuesPerThread = 1 << 15;
constexpr int64_t kLanes = 32; // channels that are computed together

// Channels of a pixel that lie together, and where a pixel's next to it are.
struct Part {
  const void* data;
  int64_t pixel_stride, channels;
};

struct Maps {
  const std::vector<Part>& parts;
  std::vector<float> scale, shift; // padded
  void* out;
  int64_t channels; // of all parts
  float slope;

  int64_t padded() const { return (channels + kLanes - 1) / kLanes * kLanes; }
};

// NaN stays NaN: a comparison with it is false.
template <int kActivation>
RESFAST_INLINE float activated(float value, float slope) {
  if constexpr (kActivation == 1) return value <= 0 ? 0 : value;
  if constexpr (kActivation == 2) return value <= 0 ? value * slope : value;
  if constexpr (kActivation >= 5) {
    const float up = kActivation == 5 ? value : value + 3;
    const float low = up <= 0 ? 0 : up;
    const float clamped = low >= 6 ? 6 : low;
    if constexpr (kActivation == 5) return clamped;
    if constexpr (kActivation == 6) return value * clamped / 6;
    return clamped / 6;
  }
  return value;
}

// A call of memcpy would take longer than the few channels that a map of a DenseNet has.
template <class Stored>
RESFAST_INLINE void copy(const Stored* from, Stored* to, int64_t count) {
  constexpr int64_t kPiece = 16 / sizeof(Stored);
  if (count < kPiece) {
    std::memcpy(to, from, count * sizeof(Stored));
    return;
  }
  for (int64_t c = 0; c < count; c += kPiece) {
    const int64_t at = std::min(c, count - kPiece); // the last piece overlaps the one before
    std::memcpy(to + at, from + at, 16);
  }
}

template <class Dtype, int kActivation>
struct ScaleShift {
  using Stored = typename Dtype::Stored;

  // Whole groups of lanes only, since what is left of a loop is computed value by value.
  static RESFAST_INLINE void channels(
      const Stored* __restrict x, const float* __restrict scale, const float* __restrict shift,
      Stored* __restrict out, int64_t count, float slope) {
    for (int64_t c = 0; c < count; ++c)
      out[c] = Dtype::store(
          activated<kActivation>(Dtype::load(x[c]) * scale[c] + shift[c], slope));
  }

  static RESFAST_INLINE void run(const Maps& maps, int64_t begin, int64_t end) {
    const int64_t padded = maps.padded();
    const bool is_full = padded == maps.channels;
    std::vector<Stored> room(2 * padded); // one pixel's values and results, with its padding
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const auto* values = static_cast<const Stored*>(maps.parts[0].data) +
          pixel * maps.parts[0].pixel_stride;
      if (!is_full || maps.parts.size() > 1) {
        Stored* to = room.data();
        for (const Part& part : maps.parts) {
          copy(static_cast<const Stored*>(part.data) + pixel * part.pixel_stride, to,
               part.channels);
          to += part.channels;
        }
        values = room.data();
      }
      Stored* out = static_cast<Stored*>(maps.out) + pixel * maps.channels;
      Stored* results = is_full ? out : room.data() + padded;
      channels(values, maps.scale.data(), maps.shift.data(), results, padded, maps.slope);
      if (!is_full) std::memcpy(out, results, maps.channels * sizeof(Stored));
    }
  }
};

template <class Dtype, int kActivation>
void over_threads(const Maps& maps, int64_t pixels) {
  const int64_t grain = std::max<int64_t>(1, kValuesPerThread / maps.channels);
  torch::stable::parallel_for(0, pixels, grain, [&](int64_t begin, int64_t end) {
    dispatch<ScaleShift<Dtype, kActivation>>(maps, begin, end);
  });
}

template <class Dtype>
void with_activation(const Maps& maps, int64_t pixels, int64_t activation) {
  switch (activation) {
    case 0: return over_threads<Dtype, 0>(maps, pixels);
    case 1: return over_threads<Dtype, 1>(maps, pixels);
    case 2: return over_threads<Dtype, 2>(maps, pixels);
    case 5: return over_threads<Dtype, 5>(maps, pixels);
    case 6: return over_threads<Dtype, 6>(maps, pixels);
    case 7: return over_threads<Dtype, 7>(maps, pixels);
    default: fail("activation ", activation, " is not one of 0, 1, 2, 5, 6, 7");
  }
}

// A map [N, C, H, W] whose channels lie together: in channels_last memory, or a slice of such a map.
Part as_part(const Tensor& map, const Tensor& like) {
  if (map.scalar_type() != like.scalar_type() || !map.is_cpu() || map.dim() != 4)
    fail("a map is ", dtype_name(map.scalar_type()), " ", shape_name(map.sizes()), "; expected ",
         dtype_name(like.scalar_type()), " [N, C, H, W] on the CPU");
  for (int axis : {0, 2, 3})
    if (map.size(axis) != like.size(axis))
      fail("a map is ", shape_name(map.sizes()), "; expected the size of ",
           shape_name(like.sizes()));
  const int64_t height = map.size(2), width = map.size(3);
  int64_t stride = map.size(1); // strides of axes of size 1 say nothing
  if (width > 1) stride = map.stride(3);
  else if (height > 1) stride = map.stride(2);
  else if (map.size(0) > 1) stride = map.stride(0);
  const std::array<int64_t, 4> expected{height * width * stride, 1, width * stride, stride};
  for (int axis = 0; axis < 4; ++axis)
    if (map.size(axis) > 1 && map.stride(axis) != expected[axis])
      fail("a map is not in channels_last memory, nor a slice of channels of such a map");
  return {map.const_data_ptr(), stride, map.size(1)};
}

std::vector<float> factors(const char* name, const Tensor& tensor, int64_t channels) {
  if (tensor.dim() != 1 || tensor.size(0) != channels ||
      tensor.scalar_type() != ScalarType::Float || !tensor.is_cpu() || !tensor.is_contiguous())
    fail(name, " is ", dtype_name(tensor.scalar_type()), " ", shape_name(tensor.sizes()),
         "; expected contiguous torch.float32 ", shape_name(std::vector<int64_t>{channels}),
         " on the CPU");
  const auto* values = static_cast<const float*>(tensor.const_data_ptr());
  return {values, values + channels};
}

Tensor scale_shift(
    const std::vector<Tensor>& maps, const Tensor& scale, const Tensor& shift, int64_t activation,
    double slope) {
  if (maps.empty()) fail("maps has no tensors; expected at least one");
  const Tensor& first = maps[0];
  std::vector<Part> parts;
  int64_t channels = 0;
  for (const Tensor& map : maps) {
    parts.push_back(as_part(map, first));
    channels += parts.back().channels;
  }
  const int64_t images = first.size(0), area = first.size(2) * first.size(3);
  Tensor out = torch::stable::empty(
      {images, channels, first.size(2), first.size(3)}, first.scalar_type(), std::nullopt,
      std::nullopt, std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  Maps all{
      parts,
      factors("scale", scale, channels),
      factors("shift", shift, channels),
      out.mutable_data_ptr(),
      channels,
      static_cast<float>(slope)};
  all.scale.resize(all.padded()), all.shift.resize(all.padded());
  if (!channels || !area) return out;
  switch (first.scalar_type()) {
    case ScalarType::Float: with_activation<Float32>(all, images * area, activation); break;
    case ScalarType::BFloat16: with_activation<BFloat16>(all, images * area, activation); break;
    case ScalarType::Half: with_activation<Float16>(all, images * area, activation); break;
    default:
      fail("a map is ", dtype_name(first.scalar_type()),
           "; expected torch.float32, torch.bfloat16 or torch.float16");
  }
  return out;
}

} // namespace
} // namespace resfast

STABLE_TORCH_LIBRARY_FRAGMENT(resfast, m) {
  m.def(
      "scale_shift(Tensor[] maps, Tensor scale, Tensor shift, int activation, float negative_slope) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("scale_shift", TORCH_BOX(&resfast::scale_shift));
}
