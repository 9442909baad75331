// Training-mode batch norm fused with adjacent operations, in bfloat16 on AVX-512: an optional 2x2
// max pool before it, a residual addition and an activation after it, and the gradients.
// Documentation of the operators: resfast/ops/norm_act/op.py.
//
// Forward: one pass for the sums of each channel, one for the result. Backward: one pass for the
// sums (and, with a residual, its gradient), one for the input gradient. Sums are float32 over 512
// pixels, then double over these in order, so results are bit-identical for any number of threads.
//
// 32 channels of a pixel are a vector of 32-bit words with the even channels in the lower halves
// and the odd channels in the upper halves; all per-channel values are stored in this order.

#if defined(__x86_64__)

#include <array>
#include <cmath>
#include <tuple>
#include <type_traits>

#include "../conv/act_gradient.h"

// Target features for the pooling masks.
#define RESFAST_POOL \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,bmi2")))

namespace resfast {
namespace {

constexpr int64_t kGroup = 2 * kLanes; // channels per vector
constexpr int64_t kChunk = 512; // pixels per float32 sum
constexpr int64_t kTile = 8192; // values processed group by group: a part of L1
constexpr int64_t kStreamed = 16 * 1024 * 1024; // larger results bypass the cache

// -- 32 channels -----------------------------------------------------------------------------------

struct Halves {
  __m512 even, odd;
};

RESFAST_BF16_INLINE Halves halves(__m512i words) {
  return {
      _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
      _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-0x10000)))};
}

RESFAST_BF16_INLINE __m512i rounded(const Halves& value) {
  alignas(64) static constexpr uint16_t kOrder[kGroup] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(
      _mm512_load_si512(kOrder), (__m512i)_mm512_cvtne2ps_pbh(value.odd, value.even));
}

// Prefetches what is read a tile later into L2. The hardware does not prefetch far enough ahead,
// least of all if a group's channels are only a part of each pixel.
RESFAST_BF16_INLINE void prefetch(const uint16_t* from) { __builtin_prefetch(from + kTile, 0, 2); }

// kWhole: all 32 channels exist; otherwise those in `mask`.
template <bool kWhole>
RESFAST_BF16_INLINE __m512i load_words(const uint16_t* from, __mmask32 mask) {
  return kWhole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(mask, from);
}

template <bool kWhole>
RESFAST_BF16_INLINE void store_words(uint16_t* to, __mmask32 mask, bool stream, __m512i words) {
  if (!kWhole)
    _mm512_mask_storeu_epi16(to, mask, words);
  else if (stream)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), words);
  else
    _mm512_storeu_si512(to, words);
}

inline __mmask32 group_mask(int64_t channels, int64_t group) {
  const int64_t left = channels - group * kGroup;
  return left >= kGroup ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
}

// Position of a channel's value in the order of the vectors.
inline int64_t place(int64_t channel) {
  return channel / kGroup * kGroup + channel % 2 * kLanes + channel % kGroup / 2;
}

template <int kGroups>
struct Values { // of kGroups groups
  __m512 at[2 * kGroups];
};

template <int kGroups>
RESFAST_BF16_INLINE Values<kGroups> load_values(const float* from) {
  Values<kGroups> values;
#pragma GCC unroll 4
  for (int i = 0; i < 2 * kGroups; ++i) values.at[i] = _mm512_loadu_ps(from + i * kLanes);
  return values;
}

template <int kGroups>
RESFAST_BF16_INLINE void store_values(float* to, const Values<kGroups>& values) {
#pragma GCC unroll 4
  for (int i = 0; i < 2 * kGroups; ++i) _mm512_storeu_ps(to + i * kLanes, values.at[i]);
}

// -- iteration over pixels -------------------------------------------------------------------------

struct NormShape {
  int64_t batch, height, width, channels; // of x
  int64_t rows, columns; // of the result
  bool pool;
  float negative_slope;

  int64_t pixels() const { return batch * rows * columns; } // of the result
  int64_t groups() const { return ceil_div(channels, kGroup); }
  int64_t padded() const { return groups() * kGroup; }
  int64_t chunks() const { return ceil_div(pixels(), kChunk); }
};

// Calls `part(groups, whole, first group, first pixel, last pixel)` for tiles of [begin, end), up
// to `kMost` groups at a time; the last group is not whole if it has fewer than 32 channels.
template <int kMost, class Part>
RESFAST_BF16 void walk(const NormShape& shape, int64_t begin, int64_t end, Part part) {
  const int64_t tile = std::max<int64_t>(8, kTile / shape.channels);
  for (int64_t first = begin; first < end; first += tile) {
    const int64_t last = std::min(end, first + tile);
    int64_t group = 0;
    for (; (group + kMost) * kGroup <= shape.channels; group += kMost)
      part(Constant<kMost>{}, std::true_type{}, group, first, last);
    for (; (group + 1) * kGroup <= shape.channels; ++group)
      part(Constant<1>{}, std::true_type{}, group, first, last);
    if (group < shape.groups()) part(Constant<1>{}, std::false_type{}, group, first, last);
  }
}

// Distributes chunks over threads.
template <class Part>
void share_chunks(const NormShape& shape, Part part) {
  share_all(shape.chunks(), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      part(chunk, chunk * kChunk, std::min(shape.pixels(), (chunk + 1) * kChunk));
    _mm_sfence(); // after streaming stores
  });
}

// Two sums per channel: partial sums [chunk][2][padded] and their total.
class Sums {
 public:
  explicit Sums(const NormShape& shape) : shape_(shape), size_(2 * shape.padded()) {
    values_ = memory().get(shape.chunks() * size_);
  }
  float* of(int64_t chunk) {
    float* sums = values_ + chunk * size_;
    std::fill(sums, sums + size_, 0.0f);
    return sums;
  }
  // [2][padded]
  RESFAST_BF16 std::vector<double> total() const {
    std::vector<double> total(size_, 0.0);
    for (int64_t chunk = 0; chunk < shape_.chunks(); ++chunk)
      for (int64_t i = 0; i < size_; ++i) total[i] += values_[chunk * size_ + i];
    return total;
  }

 private:
  static Workspace<float>& memory() {
    thread_local Workspace<float> memory;
    return memory;
  }
  const NormShape& shape_;
  int64_t size_;
  float* values_;
};

// -- pooling ---------------------------------------------------------------------------------------

// Iterates over pooling windows.
struct Window {
  const NormShape& shape;
  int64_t image, row, column;
  Window(const NormShape& all, int64_t pixel)
      : shape(all), image(pixel / all.columns / all.rows), row(pixel / all.columns % all.rows),
        column(pixel % all.columns) {}
  // The pixel of x at its upper left.
  int64_t corner() const {
    return (image * shape.height + 2 * row) * shape.width + 2 * column;
  }
  void next() {
    if (++column < shape.columns) return;
    column = 0;
    if (++row == shape.rows) row = 0, ++image;
  }
};

// Index (row-major) of the largest of a window's four pixels, as two bit planes, lower and upper,
// for 32 channels.
struct Planes {
  uint32_t lower, upper;
};

RESFAST_POOL inline __mmask32 interleaved(__mmask16 even, __mmask16 odd) {
  return _pdep_u32(even, 0x55555555) | _pdep_u32(odd, 0xAAAAAAAA);
}

template <bool kWhole>
RESFAST_POOL inline Halves largest(
    const uint16_t* from, int64_t right, int64_t below, __mmask32 mask, Planes& planes) {
  Halves best = halves(load_words<kWhole>(from, mask));
  __mmask16 lower[2] = {0, 0}, upper[2] = {0, 0};
#pragma GCC unroll 3
  for (int position = 1; position < 4; ++position) {
    const Halves next = halves(load_words<kWhole>(
        from + (position & 1 ? right : 0) + (position & 2 ? below : 0), mask));
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512& value = half ? best.odd : best.even;
      const __m512 other = half ? next.odd : next.even;
      // Larger, or NaN, which is kept as in torch.nn.functional.max_pool2d.
      const __mmask16 taken = _mm512_cmp_ps_mask(other, value, _CMP_GT_OQ) |
          _mm512_cmp_ps_mask(other, other, _CMP_UNORD_Q);
      value = _mm512_mask_mov_ps(value, taken, other);
      lower[half] = position & 1 ? lower[half] | taken : lower[half] & ~taken;
      upper[half] = position & 2 ? upper[half] | taken : upper[half] & ~taken;
    }
  }
  planes = {interleaved(lower[0], lower[1]), interleaved(upper[0], upper[1])};
  return best;
}

// -- forward ---------------------------------------------------------------------------------------

// Adds the pixels [begin, end) of some groups to their sums of x - origin and its square.
template <int kGroups, bool kWhole>
RESFAST_BF16 void add_moments(
    const NormShape& shape, const uint16_t* x, int64_t group, int64_t begin, int64_t end,
    const float* origin, float* sums) {
  const __mmask32 mask = group_mask(shape.channels, group);
  const int64_t at = group * kGroup;
  const auto origins = load_values<kGroups>(origin + at);
  auto first = load_values<kGroups>(sums + at);
  auto second = load_values<kGroups>(sums + shape.padded() + at);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const uint16_t* from = x + pixel * shape.channels + at;
#pragma GCC unroll 2
    for (int i = 0; i < kGroups; ++i) {
      const Halves value = halves(load_words<kWhole>(from + i * kGroup, mask));
      prefetch(from + i * kGroup);
      const __m512 even = _mm512_sub_ps(value.even, origins.at[2 * i]);
      const __m512 odd = _mm512_sub_ps(value.odd, origins.at[2 * i + 1]);
      first.at[2 * i] = _mm512_add_ps(first.at[2 * i], even);
      first.at[2 * i + 1] = _mm512_add_ps(first.at[2 * i + 1], odd);
      second.at[2 * i] = _mm512_fmadd_ps(even, even, second.at[2 * i]);
      second.at[2 * i + 1] = _mm512_fmadd_ps(odd, odd, second.at[2 * i + 1]);
    }
  }
  store_values<kGroups>(sums + at, first);
  store_values<kGroups>(sums + shape.padded() + at, second);
}

// The same sums of the pooled pixels, which are also written.
template <bool kWhole>
RESFAST_POOL void pool_moments(
    const NormShape& shape, const uint16_t* x, int64_t group, int64_t begin, int64_t end,
    const float* origin, float* sums, uint16_t* pooled, Planes* planes) {
  const __mmask32 mask = group_mask(shape.channels, group);
  const int64_t at = group * kGroup, below = shape.width * shape.channels;
  const auto origins = load_values<1>(origin + at);
  auto first = load_values<1>(sums + at), second = load_values<1>(sums + shape.padded() + at);
  Window window(shape, begin);
  for (int64_t pixel = begin; pixel < end; ++pixel, window.next()) {
    const Halves value = largest<kWhole>(
        x + window.corner() * shape.channels + at, shape.channels, below, mask,
        planes[pixel * shape.groups() + group]);
    store_words<kWhole>(pooled + pixel * shape.channels + at, mask, false, rounded(value));
    const __m512 even = _mm512_sub_ps(value.even, origins.at[0]);
    const __m512 odd = _mm512_sub_ps(value.odd, origins.at[1]);
    first.at[0] = _mm512_add_ps(first.at[0], even), first.at[1] = _mm512_add_ps(first.at[1], odd);
    second.at[0] = _mm512_fmadd_ps(even, even, second.at[0]);
    second.at[1] = _mm512_fmadd_ps(odd, odd, second.at[1]);
  }
  store_values<1>(sums + at, first);
  store_values<1>(sums + shape.padded() + at, second);
}

// out = activation(scale * x + shift + residual)
template <int kGroups, bool kWhole, int64_t kActivation>
RESFAST_BF16 void apply(
    const NormShape& shape, const uint16_t* x, const uint16_t* residual, int64_t group,
    int64_t begin, int64_t end, const float* scale, const float* shift, bool stream,
    uint16_t* out) {
  const __mmask32 mask = group_mask(shape.channels, group);
  const int64_t at = group * kGroup;
  const auto scales = load_values<kGroups>(scale + at), shifts = load_values<kGroups>(shift + at);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t from = pixel * shape.channels + at;
#pragma GCC unroll 2
    for (int i = 0; i < kGroups; ++i) {
      Halves value = halves(load_words<kWhole>(x + from + i * kGroup, mask));
      prefetch(x + from + i * kGroup);
      value.even = _mm512_fmadd_ps(value.even, scales.at[2 * i], shifts.at[2 * i]);
      value.odd = _mm512_fmadd_ps(value.odd, scales.at[2 * i + 1], shifts.at[2 * i + 1]);
      if (residual) {
        prefetch(residual + from + i * kGroup);
        const Halves more = halves(load_words<kWhole>(residual + from + i * kGroup, mask));
        value.even = _mm512_add_ps(value.even, more.even);
        value.odd = _mm512_add_ps(value.odd, more.odd);
      }
      value.even = activated(value.even, kActivation, shape.negative_slope);
      value.odd = activated(value.odd, kActivation, shape.negative_slope);
      store_words<kWhole>(out + from + i * kGroup, mask, stream, rounded(value));
    }
  }
}

// -- backward --------------------------------------------------------------------------------------

// The value that the derivative of the activation is computed from.
enum class At {
  kNorm, // scale * x + shift
  kSum, // scale * x + shift + residual
  kResult, // the result (relu, leaky_relu)
};

struct Gradients {
  const uint16_t* grad;
  const uint16_t* x; // pooled
  const uint16_t* other; // the residual or the result
  const float *mean, *scale, *shift; // [padded]
};

// grad times the derivative of the activation, for 16 channels.
template <int64_t kActivation, At kAt>
RESFAST_BF16_INLINE __m512 before_activation(
    __m512 grad, __m512 x, __m512 other, __m512 scale, __m512 shift, float negative_slope) {
  if constexpr (kActivation == kNone) return grad;
  __m512 z = other;
  if constexpr (kAt != At::kResult) z = _mm512_fmadd_ps(x, scale, shift);
  if constexpr (kAt == At::kSum) z = _mm512_add_ps(z, other);
  return act_gradient<kActivation>(grad, z, negative_slope);
}

// Adds to the sums of dz, the gradient before the activation, and of dz * (x - mean); writes dz
// unless its pointer is null.
template <int kGroups, bool kWhole, int64_t kActivation, At kAt>
RESFAST_BF16 void add_gradients(
    const NormShape& shape, const Gradients& from, int64_t group, int64_t begin, int64_t end,
    float* sums, uint16_t* dz) {
  const __mmask32 mask = group_mask(shape.channels, group);
  const int64_t at = group * kGroup;
  const auto means = load_values<kGroups>(from.mean + at);
  const auto scales = load_values<kGroups>(from.scale + at);
  const auto shifts = load_values<kGroups>(from.shift + at);
  auto first = load_values<kGroups>(sums + at);
  auto second = load_values<kGroups>(sums + shape.padded() + at);
  for (int64_t pixel = begin; pixel < end; ++pixel)
#pragma GCC unroll 2
    for (int i = 0; i < kGroups; ++i) {
      const int64_t place = pixel * shape.channels + at + i * kGroup;
      Halves value = halves(load_words<kWhole>(from.grad + place, mask));
      const Halves x = halves(load_words<kWhole>(from.x + place, mask));
      prefetch(from.grad + place), prefetch(from.x + place);
      if constexpr (kAt != At::kNorm) prefetch(from.other + place);
      Halves other{};
      if constexpr (kAt != At::kNorm) other = halves(load_words<kWhole>(from.other + place, mask));
      value.even = before_activation<kActivation, kAt>(
          value.even, x.even, other.even, scales.at[2 * i], shifts.at[2 * i],
          shape.negative_slope);
      value.odd = before_activation<kActivation, kAt>(
          value.odd, x.odd, other.odd, scales.at[2 * i + 1], shifts.at[2 * i + 1],
          shape.negative_slope);
      if (dz) store_words<kWhole>(dz + place, mask, false, rounded(value));
      first.at[2 * i] = _mm512_add_ps(first.at[2 * i], value.even);
      first.at[2 * i + 1] = _mm512_add_ps(first.at[2 * i + 1], value.odd);
      second.at[2 * i] = _mm512_fmadd_ps(
          value.even, _mm512_sub_ps(x.even, means.at[2 * i]), second.at[2 * i]);
      second.at[2 * i + 1] = _mm512_fmadd_ps(
          value.odd, _mm512_sub_ps(x.odd, means.at[2 * i + 1]), second.at[2 * i + 1]);
    }
  store_values<kGroups>(sums + at, first);
  store_values<kGroups>(sums + shape.padded() + at, second);
}

// dx = scale * dz + slope * x + level; dz was written before or, for relu and leaky_relu without a
// residual, is recomputed.
struct InputGradient {
  const float *slope, *level; // [padded]
  const Planes* planes; // of the pooling
  bool stream;
  uint16_t* to;
};

template <bool kWhole>
RESFAST_BF16_INLINE void scatter(
    const NormShape& shape, uint16_t* to, __mmask32 mask, bool stream, const Planes& planes,
    __m512i words) {
  const __mmask32 taken[] = {
      ~(planes.lower | planes.upper), planes.lower & ~planes.upper, planes.upper & ~planes.lower,
      planes.lower & planes.upper};
#pragma GCC unroll 4
  for (int position = 0; position < 4; ++position)
    store_words<kWhole>(
        to + (position % 2 + position / 2 * shape.width) * shape.channels, mask, stream,
        _mm512_maskz_mov_epi16(taken[position], words));
}

template <int kGroups, bool kWhole, int64_t kActivation>
RESFAST_BF16 void input_gradient(
    const NormShape& shape, const Gradients& from, int64_t group, int64_t begin, int64_t end,
    const InputGradient& result) {
  const __mmask32 mask = group_mask(shape.channels, group);
  const int64_t at = group * kGroup;
  const auto scales = load_values<kGroups>(from.scale + at);
  const auto shifts = load_values<kGroups>(from.shift + at);
  const auto slopes = load_values<kGroups>(result.slope + at);
  const auto levels = load_values<kGroups>(result.level + at);
  Window window(shape, begin);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
#pragma GCC unroll 2
    for (int i = 0; i < kGroups; ++i) {
      const int64_t place = pixel * shape.channels + at + i * kGroup;
      const Halves grad = halves(load_words<kWhole>(from.grad + place, mask));
      const Halves x = halves(load_words<kWhole>(from.x + place, mask));
      prefetch(from.grad + place), prefetch(from.x + place);
      Halves value;
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m512 input = half ? x.odd : x.even;
        const __m512 dz = before_activation<kActivation, At::kNorm>(
            half ? grad.odd : grad.even, input, input, scales.at[2 * i + half],
            shifts.at[2 * i + half], shape.negative_slope);
        (half ? value.odd : value.even) = _mm512_fmadd_ps(
            dz, scales.at[2 * i + half],
            _mm512_fmadd_ps(input, slopes.at[2 * i + half], levels.at[2 * i + half]));
      }
      if (result.planes)
        scatter<kWhole>(
            shape, result.to + window.corner() * shape.channels + at + i * kGroup, mask,
            result.stream, result.planes[pixel * shape.groups() + group + i], rounded(value));
      else
        store_words<kWhole>(result.to + place, mask, result.stream, rounded(value));
    }
    if (result.planes) window.next();
  }
}

// Zeroes the pixels outside every window: the last row and column of odd sizes.
void clear_rest(const NormShape& shape, uint16_t* to) {
  const int64_t line = shape.width * shape.channels, used = 2 * shape.columns * shape.channels;
  for (int64_t image = 0; image < shape.batch; ++image) {
    uint16_t* first = to + image * shape.height * line;
    for (int64_t row = 0; row < 2 * shape.rows; ++row)
      std::fill(first + row * line + used, first + (row + 1) * line, uint16_t{0});
    std::fill(first + 2 * shape.rows * line, first + shape.height * line, uint16_t{0});
  }
}

// -- operators -------------------------------------------------------------------------------------

NormShape checked_shape(const Tensor& x, int64_t activation, double negative_slope, bool pool) {
  if (!bf16_supported()) fail("this processor has no AVX512-BF16");
  check_map("x", x, {-1, -1, -1, -1});
  check_activation(activation);
  NormShape shape{x.size(0), x.size(2), x.size(3), x.size(1), x.size(2), x.size(3), pool,
                  static_cast<float>(negative_slope)};
  if (pool) shape.rows /= 2, shape.columns /= 2;
  if (shape.pixels() == 0) fail("x of ", shape_name(x.sizes()), " is too small to pool");
  return shape;
}

// A per-channel tensor in the order of the vectors; `missing` if it is not given.
std::vector<float> per_channel(
    const char* name, const std::optional<Tensor>& tensor, const NormShape& shape, float missing) {
  std::vector<float> values(shape.padded(), 0.0f);
  if (tensor && (tensor->scalar_type() != ScalarType::Float || tensor->dim() != 1 ||
                 tensor->size(0) != shape.channels || !tensor->is_contiguous() || !tensor->is_cpu()))
    fail(name, " is ", dtype_name(tensor->scalar_type()), " ", shape_name(tensor->sizes()),
         "; expected torch.float32 [", shape.channels, "], contiguous, on the CPU");
  const float* from = tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
  for (int64_t channel = 0; channel < shape.channels; ++channel)
    values[place(channel)] = from ? from[channel] : missing;
  return values;
}

const uint16_t* checked_map(
    const char* name, const std::optional<Tensor>& tensor, const NormShape& shape) {
  if (!tensor) return nullptr;
  check_map(name, *tensor, {shape.batch, shape.channels, shape.rows, shape.columns});
  return static_cast<const uint16_t*>(tensor->const_data_ptr());
}

Tensor new_map(const NormShape& shape, int64_t rows, int64_t columns) {
  return torch::stable::empty(
      {shape.batch, shape.channels, rows, columns}, ScalarType::BFloat16, std::nullopt,
      std::nullopt, std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

uint16_t* values_of(Tensor& tensor) { return static_cast<uint16_t*>(tensor.mutable_data_ptr()); }

bool streamed(const NormShape& shape, const Tensor& tensor) {
  return shape.channels % kGroup == 0 && 2 * tensor.numel() >= kStreamed &&
      reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 64 == 0;
}

// The norm as scale * x + shift.
struct Affine {
  std::vector<float> scale, shift;
  Affine(const NormShape& shape, const std::vector<float>& mean, const std::vector<float>& var,
         const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps)
      : scale(per_channel("weight", weight, shape, 1.0f)),
        shift(per_channel("bias", bias, shape, 0.0f)) {
    for (size_t i = 0; i < scale.size(); ++i) {
      scale[i] = static_cast<float>(scale[i] / std::sqrt(var[i] + eps));
      shift[i] = static_cast<float>(shift[i] - static_cast<double>(mean[i]) * scale[i]);
    }
  }
};

// The mean of 16 pixels of x, subtracted to avoid cancellation in the sums of squares; rounded to
// bfloat16, so that most differences are exact.
std::vector<float> near_mean(const NormShape& shape, const uint16_t* x) {
  constexpr int64_t kSamples = 16;
  const int64_t pixels = shape.batch * shape.height * shape.width;
  std::vector<float> mean(shape.padded(), 0.0f);
  for (int64_t sample = 0; sample < kSamples; ++sample) {
    const uint16_t* from = x + pixels * sample / kSamples * shape.channels;
    for (int64_t channel = 0; channel < shape.channels; ++channel)
      mean[place(channel)] += from_bfloat16(from[channel]) / kSamples;
  }
  for (float& value : mean) value = from_bfloat16(to_bfloat16(value));
  return mean;
}

// The result, mean and variance [C], and with pooling the pooled x and the indices of its pixels.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_act_forward(
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& residual, double eps, int64_t activation, double negative_slope,
    bool pool) {
  const NormShape shape = checked_shape(x, activation, negative_slope, pool);
  const uint16_t* other = checked_map("residual", residual, shape);
  const auto* source = static_cast<const uint16_t*>(x.const_data_ptr());

  Tensor pooled = pool ? new_map(shape, shape.rows, shape.columns)
                       : torch::stable::empty({0}, ScalarType::BFloat16);
  Tensor where = torch::stable::empty(
      {pool ? shape.pixels() * shape.groups() * static_cast<int64_t>(sizeof(Planes)) : 0},
      ScalarType::Byte);
  const std::vector<float> origin = near_mean(shape, source);
  Sums sums(shape);
  share_chunks(shape, [&](int64_t chunk, int64_t begin, int64_t end) {
    float* to = sums.of(chunk);
    if (pool)
      walk<1>(shape, begin, end, [&](auto, auto whole, int64_t group, int64_t a, int64_t b) {
        pool_moments<decltype(whole)::value>(
            shape, source, group, a, b, origin.data(), to, values_of(pooled),
            static_cast<Planes*>(where.mutable_data_ptr()));
      });
    else
      walk<2>(shape, begin, end, [&](auto groups, auto whole, int64_t group, int64_t a, int64_t b) {
        add_moments<decltype(groups)::value, decltype(whole)::value>(
            shape, source, group, a, b, origin.data(), to);
      });
  });

  const std::vector<double> total = sums.total();
  std::vector<float> mean(shape.padded(), 0.0f), var(shape.padded(), 0.0f);
  for (int64_t i = 0; i < shape.padded(); ++i) {
    const double first = total[i] / shape.pixels();
    const double second = total[shape.padded() + i] / shape.pixels() - first * first;
    mean[i] = static_cast<float>(origin[i] + first);
    var[i] = static_cast<float>(second < 0 ? 0 : second); // keeps NaN
  }
  Tensor means = torch::stable::empty({shape.channels}, ScalarType::Float);
  Tensor variances = torch::stable::empty({shape.channels}, ScalarType::Float);
  for (int64_t channel = 0; channel < shape.channels; ++channel) {
    static_cast<float*>(means.mutable_data_ptr())[channel] = mean[place(channel)];
    static_cast<float*>(variances.mutable_data_ptr())[channel] = var[place(channel)];
  }

  const Affine affine(shape, mean, var, weight, bias, eps);
  Tensor out = new_map(shape, shape.rows, shape.columns);
  const bool stream = streamed(shape, out);
  if (pool) source = static_cast<const uint16_t*>(pooled.const_data_ptr());
  with_activation(activation, [&](auto which) {
    share_chunks(shape, [&](int64_t, int64_t begin, int64_t end) {
      walk<2>(shape, begin, end, [&](auto groups, auto whole, int64_t group, int64_t a, int64_t b) {
        apply<decltype(groups)::value, decltype(whole)::value, decltype(which)::value>(
            shape, source, other, group, a, b, affine.scale.data(), affine.shift.data(), stream,
            values_of(out));
      });
    });
  });
  return {out, means, variances, pooled, where};
}

// The gradients of x, weight and bias [C], and of the residual if `other` is given: the residual,
// or for relu and leaky_relu the result.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_backward(
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& var,
    const std::optional<Tensor>& other, const std::optional<Tensor>& where,
    const std::vector<int64_t>& size, double eps, int64_t activation, double negative_slope) {
  NormShape shape = checked_shape(x, activation, negative_slope, false);
  shape.pool = where.has_value();
  if (size.size() != 2 || size[0] / (shape.pool ? 2 : 1) != shape.rows ||
      size[1] / (shape.pool ? 2 : 1) != shape.columns)
    fail("size is ", shape_name(size), "; expected height and width before the pooling to ",
         shape.rows, "x", shape.columns);
  shape.height = size[0], shape.width = size[1];
  const int64_t planes = shape.pixels() * shape.groups() * static_cast<int64_t>(sizeof(Planes));
  if (where && (where->scalar_type() != ScalarType::Byte || where->numel() != planes ||
                !where->is_contiguous() || !where->is_cpu()))
    fail("where is ", dtype_name(where->scalar_type()), " ", shape_name(where->sizes()),
         "; expected torch.uint8 [", planes, "], contiguous, on the CPU");
  const std::vector<float> means = per_channel("mean", mean, shape, 0.0f);
  const std::vector<float> variances = per_channel("var", var, shape, 0.0f);
  const Affine affine(shape, means, variances, weight, bias, eps);
  const std::optional<Tensor> behind = grad;
  Gradients from{
      checked_map("grad", behind, shape), static_cast<const uint16_t*>(x.const_data_ptr()),
      checked_map("other", other, shape), means.data(), affine.scale.data(), affine.shift.data()};

  const Tensor nothing = torch::stable::empty({0}, ScalarType::BFloat16);
  Tensor for_x = new_map(shape, shape.height, shape.width);
  const bool costly = activation == kSilu || activation == kGelu; // to recompute
  const bool apart = other.has_value() || (costly && shape.pool); // cannot share memory with for_x
  Tensor for_residual = apart ? new_map(shape, shape.rows, shape.columns) : nothing;
  uint16_t* dz = apart ? values_of(for_residual) : costly ? values_of(for_x) : nullptr;
  Sums sums(shape);
  with_activation(activation, [&](auto which) {
    constexpr int64_t kActivation = decltype(which)::value;
    constexpr int kMost = kActivation == kSilu || kActivation == kGelu ? 1 : 2; // registers
    constexpr At kWith = kMost == 1 ? At::kSum : At::kResult;
    share_chunks(shape, [&](int64_t chunk, int64_t begin, int64_t end) {
      float* to = sums.of(chunk);
      walk<kMost>(
          shape, begin, end, [&](auto groups, auto whole, int64_t group, int64_t a, int64_t b) {
            constexpr int kGroups = decltype(groups)::value;
            constexpr bool kWhole = decltype(whole)::value;
            if (from.other)
              add_gradients<kGroups, kWhole, kActivation, kWith>(
                  shape, from, group, a, b, to, dz);
            else
              add_gradients<kGroups, kWhole, kActivation, At::kNorm>(
                  shape, from, group, a, b, to, dz);
          });
    });
  });

  const std::vector<double> total = sums.total();
  std::vector<float> slope(shape.padded()), level(shape.padded());
  Tensor for_weight = torch::stable::empty({shape.channels}, ScalarType::Float);
  Tensor for_bias = torch::stable::empty({shape.channels}, ScalarType::Float);
  for (int64_t channel = 0; channel < shape.channels; ++channel) {
    const int64_t i = place(channel);
    const double scale = affine.scale[i], rstd = 1 / std::sqrt(variances[i] + eps);
    const double first = total[i], second = total[shape.padded() + i] * rstd;
    static_cast<float*>(for_bias.mutable_data_ptr())[channel] = static_cast<float>(first);
    static_cast<float*>(for_weight.mutable_data_ptr())[channel] = static_cast<float>(second);
    slope[i] = static_cast<float>(-scale * rstd * second / shape.pixels());
    level[i] = static_cast<float>(
        -scale * first / shape.pixels() - static_cast<double>(slope[i]) * means[i]);
  }

  if (shape.pool) clear_rest(shape, values_of(for_x));
  const InputGradient result{
      slope.data(), level.data(),
      where ? static_cast<const Planes*>(where->const_data_ptr()) : nullptr,
      (apart || !costly) && streamed(shape, for_x), values_of(for_x)};
  if (dz) from.grad = dz;
  auto run = [&](auto which) {
    share_chunks(shape, [&](int64_t, int64_t begin, int64_t end) {
      walk<2>(shape, begin, end, [&](auto groups, auto whole, int64_t group, int64_t a, int64_t b) {
        input_gradient<decltype(groups)::value, decltype(whole)::value, decltype(which)::value>(
            shape, from, group, a, b, result);
      });
    });
  };
  if (dz || activation == kNone)
    run(Constant<kNone>{});
  else if (activation == kRelu)
    run(Constant<kRelu>{});
  else
    run(Constant<kLeakyRelu>{});
  return {for_x, for_weight, for_bias, other ? for_residual : nothing};
}

} // namespace
} // namespace resfast

STABLE_TORCH_LIBRARY_FRAGMENT(resfast, m) {
  m.def(
      "norm_act_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "int activation, float negative_slope, bool pool) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "norm_act_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor var, Tensor? other, Tensor? where, int[] size, float eps, int activation, "
      "float negative_slope) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("norm_act_forward", TORCH_BOX(&resfast::norm_act_forward));
  m.impl("norm_act_backward", TORCH_BOX(&resfast::norm_act_backward));
}

#endif
