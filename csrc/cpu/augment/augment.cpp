// resfast::augment on the CPU. Schema and arguments: resfast/ops/augment/op.py; the same steps in
// plain PyTorch: resfast/ops/augment/reference.py.
//
// An image is processed in one of two ways:
//   bytes:  shifted and mirrored as rows of bytes, then normalized: exact and fast;
//   planes: with `affine` or `color`, row by row as one float row per channel.
// All kernels compute in the order of the reference, so that only the sum over channels in `color`
// can be rounded differently.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../../common/check.h"
#include "../common/dtype.h"
#include "../common/isa.h"

namespace resfast {
namespace {

constexpr int64_t kMaxChannels = 4;
constexpr int64_t kMaxSide = int64_t{1} << 24; // coordinates are float
constexpr int64_t kMaxPixels = std::numeric_limits<int32_t>::max(); // indices are int32
constexpr int64_t kSlack = 4; // bytes that may be read or written past a row of pixels

struct Job {
  int64_t count, height, width, channels;
  bool zero_padding;
  const uint8_t* images;
  const int64_t* indices;
  const float* offset; // [W, C], like `scale`: repeated for each pixel of a row
  const float* scale;
  const int32_t* shift; // null if not given, like all below
  const bool* flip;
  const float* affine;
  const float* color;
  const int32_t* cutout;
  const int64_t* partner;
  const float* weight;
  const int32_t* box;

  RESFAST_INLINE int64_t row() const { return width * channels; }
  RESFAST_INLINE int64_t image() const { return height * row(); }
};

// Working memory of one thread.
struct Scratch {
  explicit Scratch(const Job& job)
      : row(job.row() + kSlack), mirrored(job.row() + kSlack) {
    if (job.affine) {
      packed.resize(job.height * job.width + 1); // one more, black
      indices.resize(4 * job.width);
      taps.resize(4 * job.width);
      fractions.resize(2 * job.width);
    }
    if (job.affine || job.color) planes.resize(2 * job.row());
    if (job.affine || job.color || job.partner) own.resize(job.image());
    if (job.partner) other.resize(job.image());
  }
  std::vector<uint8_t> row, mirrored; // [W, C]
  std::vector<uint32_t> packed; // [H, W]: the channels of a pixel in its bytes
  std::vector<int32_t> indices; // [4, W]: indices of the pixels around each point of a row
  std::vector<uint32_t> taps; // [4, W]: the values of these pixels
  std::vector<float> fractions; // [2, W]: vertical and horizontal distance from the first tap
  std::vector<float> planes; // [2, C, W]: before and after `color`
  std::vector<float> own, other; // [H, W, C], normalized
};

// -- coordinates ---------------------------------------------------------------------------------

// Reflected once at either border without repeating it; positions still outside are clamped.
template <class Int>
RESFAST_INLINE Int reflect(Int position, Int size) {
  position = position < 0 ? -position : position;
  position = position >= size ? 2 * (size - 1) - position : position;
  position = position < 0 ? 0 : position;
  return position >= size ? size - 1 : position;
}

// -- bytes ---------------------------------------------------------------------------------------

template <int C>
RESFAST_INLINE void mirror_pixels(
    const uint8_t* __restrict source, uint8_t* __restrict target, int64_t width) {
  // Three bytes are moved as four; the next pixel overwrites the extra one.
  constexpr int kBytes = C == 3 ? 4 : C;
  for (int64_t x = 0; x < width; ++x)
    std::memcpy(target + C * x, source + C * (width - 1 - x), kBytes);
}

RESFAST_INLINE void mirror(
    const uint8_t* source, uint8_t* target, int64_t width, int64_t channels) {
  switch (channels) {
    case 1: return mirror_pixels<1>(source, target, width);
    case 2: return mirror_pixels<2>(source, target, width);
    case 3: return mirror_pixels<3>(source, target, width);
    default: return mirror_pixels<4>(source, target, width);
  }
}

// Pixels [begin, end) of a row shifted by `right` that lie outside the image.
RESFAST_INLINE void fill_outside(
    const Job& job, const uint8_t* source, int64_t right, int64_t begin, int64_t end,
    uint8_t* row) {
  for (int64_t x = begin; x < end; ++x) {
    const uint8_t* pixel = source + reflect(x + right, job.width) * job.channels;
    for (int64_t c = 0; c < job.channels; ++c)
      row[x * job.channels + c] = job.zero_padding ? 0 : pixel[c];
  }
}

// Row y of an image, shifted and mirrored: [W, C] bytes, in the image itself or in the scratch.
RESFAST_INLINE const uint8_t* shifted_row(
    const Job& job, int64_t index, int64_t y, Scratch& scratch) {
  const int64_t width = job.width, channels = job.channels;
  const int64_t down = job.shift ? job.shift[2 * index] : 0;
  const int64_t right = job.shift ? job.shift[2 * index + 1] : 0;
  const bool flip = job.flip && job.flip[index];
  uint8_t* row = scratch.row.data();
  y += down;
  if (job.zero_padding && (y < 0 || y >= job.height)) {
    std::memset(row, 0, job.row());
    return row;
  }
  const uint8_t* source = job.images + index * job.image() + reflect(y, job.height) * job.row();
  if (right == 0 && !flip) return source;
  // The pixels inside the image, [first, last), and those on either side.
  const int64_t first = std::clamp<int64_t>(-right, 0, width);
  const int64_t last = std::clamp<int64_t>(width - right, first, width);
  if (first < last)
    std::memcpy(
        row + first * channels, source + (first + right) * channels, (last - first) * channels);
  fill_outside(job, source, right, 0, first, row);
  fill_outside(job, source, right, last, width, row);
  if (!flip) return row;
  mirror(row, scratch.mirrored.data(), width, channels);
  return scratch.mirrored.data();
}

template <class Dtype>
RESFAST_INLINE void normalize_row(
    const uint8_t* __restrict pixels, const float* __restrict offset, const float* __restrict scale,
    typename Dtype::Stored* __restrict result, int64_t size) {
  for (int64_t i = 0; i < size; ++i)
    result[i] = Dtype::store((static_cast<float>(pixels[i]) - offset[i]) * scale[i]);
}

// Steps 1 and 3 of one image, [H, W, C].
template <class Dtype>
struct NormalizedBytes {
  static RESFAST_INLINE void run(
      const Job& job, int64_t index, typename Dtype::Stored* result, Scratch& scratch) {
    for (int64_t y = 0; y < job.height; ++y)
      normalize_row<Dtype>(
          shifted_row(job, index, y, scratch), job.offset, job.scale, result + y * job.row(),
          job.row());
  }
};

// -- planes --------------------------------------------------------------------------------------

template <int C>
RESFAST_INLINE void split_channels(
    const uint8_t* __restrict row, float* __restrict planes, int64_t width) {
  for (int c = 0; c < C; ++c)
    for (int64_t x = 0; x < width; ++x) planes[c * width + x] = row[C * x + c];
}

// The pixels of an image as words, followed by a black one.
template <int C>
RESFAST_INLINE void pack(
    const uint8_t* __restrict image, uint32_t* __restrict packed, int64_t size) {
  // Three bytes are read as four; the extra byte is never used.
  constexpr int kBytes = C == 3 ? 4 : C;
  for (int64_t i = 0; i < size - 1; ++i) {
    uint32_t pixel = 0;
    std::memcpy(&pixel, image + C * i, kBytes);
    packed[i] = pixel;
  }
  uint32_t pixel = 0;
  std::memcpy(&pixel, image + C * (size - 1), C);
  packed[size - 1] = pixel;
  packed[size] = 0;
}

// Source positions of the points of row y: indices of the four pixels around each, and its vertical
// and horizontal distance from the first. Coordinates beyond any valid one are clamped so that they
// fit an int.
template <bool zero_padding>
RESFAST_INLINE void find_taps(
    const float* affine, int32_t height, int32_t width, float y, int32_t* __restrict index00,
    int32_t* __restrict index01, int32_t* __restrict index10, int32_t* __restrict index11,
    float* __restrict down, float* __restrict right) {
  const float low_y = -2.0f * height, high_y = 3.0f * height;
  const float low_x = -2.0f * width, high_x = 3.0f * width;
  const float start_y = affine[0] * y, step_y = affine[1], shift_y = affine[2];
  const float start_x = affine[3] * y, step_x = affine[4], shift_x = affine[5];
  const int32_t black = height * width;
  constexpr bool everywhere = !zero_padding; // every position has a pixel
  for (int32_t x = 0; x < width; ++x) {
    float at_y = start_y + step_y * static_cast<float>(x) + shift_y;
    float at_x = start_x + step_x * static_cast<float>(x) + shift_x;
    at_y = at_y > low_y ? at_y : low_y; // also if NaN
    at_x = at_x > low_x ? at_x : low_x;
    at_y = at_y < high_y ? at_y : high_y;
    at_x = at_x < high_x ? at_x : high_x;
    // Floor: a cast to int rounds towards 0.
    int32_t top = static_cast<int32_t>(at_y), left = static_cast<int32_t>(at_x);
    top -= static_cast<float>(top) > at_y ? 1 : 0;
    left -= static_cast<float>(left) > at_x ? 1 : 0;
    down[x] = at_y - static_cast<float>(top);
    right[x] = at_x - static_cast<float>(left);
    const int32_t row0 = reflect(top, height) * width, row1 = reflect(top + 1, height) * width;
    const int32_t column0 = reflect(left, width), column1 = reflect(left + 1, width);
    const bool in_row0 = everywhere | ((top >= 0) & (top < height));
    const bool in_row1 = everywhere | ((top >= -1) & (top < height - 1));
    const bool in_column0 = everywhere | ((left >= 0) & (left < width));
    const bool in_column1 = everywhere | ((left >= -1) & (left < width - 1));
    index00[x] = in_row0 & in_column0 ? row0 + column0 : black;
    index01[x] = in_row0 & in_column1 ? row0 + column1 : black;
    index10[x] = in_row1 & in_column0 ? row1 + column0 : black;
    index11[x] = in_row1 & in_column1 ? row1 + column1 : black;
  }
}

RESFAST_INLINE void fetch(
    const uint32_t* __restrict packed, const int32_t* __restrict indices,
    uint32_t* __restrict taps, int64_t size) {
  for (int64_t i = 0; i < size; ++i) taps[i] = packed[indices[i]];
}

RESFAST_INLINE float channel(uint32_t pixel, int c) {
  return static_cast<float>(static_cast<int32_t>((pixel >> (8 * c)) & 255));
}

template <int C>
RESFAST_INLINE void interpolate(
    const uint32_t* __restrict taps, const float* __restrict fractions, float* __restrict planes,
    int64_t width) {
  for (int c = 0; c < C; ++c)
    for (int64_t x = 0; x < width; ++x) {
      const float down = fractions[x], right = fractions[width + x];
      const float left = 1 - right;
      const float upper = channel(taps[x], c) * left + channel(taps[width + x], c) * right;
      const float lower =
          channel(taps[2 * width + x], c) * left + channel(taps[3 * width + x], c) * right;
      planes[c * width + x] = upper * (1 - down) + lower * down;
    }
}

// Row y of an image under its affine map, as planes [C, W]; `scratch.packed` holds the image.
template <int C, bool zero_padding>
RESFAST_INLINE void interpolated_row(
    const Job& job, int64_t index, int64_t y, float* planes, Scratch& scratch) {
  const int32_t height = static_cast<int32_t>(job.height), width = static_cast<int32_t>(job.width);
  int32_t* indices = scratch.indices.data();
  float* fractions = scratch.fractions.data();
  find_taps<zero_padding>(
      job.affine + 6 * index, height, width, static_cast<float>(y), indices, indices + width,
      indices + 2 * width, indices + 3 * width, fractions, fractions + width);
  fetch(scratch.packed.data(), indices, scratch.taps.data(), 4 * job.width);
  interpolate<C>(scratch.taps.data(), fractions, planes, job.width);
}

template <int C>
RESFAST_INLINE void mix_channels(
    const float* __restrict matrix, const float* __restrict planes, float* __restrict result,
    int64_t width) {
  for (int d = 0; d < C; ++d)
    for (int64_t x = 0; x < width; ++x) {
      float sum = matrix[d * (C + 1)] * planes[x];
      for (int c = 1; c < C; ++c) sum += matrix[d * (C + 1) + c] * planes[c * width + x];
      sum += matrix[d * (C + 1) + C];
      sum = sum > 0 ? sum : 0;
      result[d * width + x] = sum < 255 ? sum : 255;
    }
}

template <int C>
RESFAST_INLINE void normalize_planes(
    const float* __restrict planes, const float* __restrict offset, const float* __restrict scale,
    float* __restrict result, int64_t width) {
  for (int64_t x = 0; x < width; ++x)
    for (int c = 0; c < C; ++c)
      result[C * x + c] = (planes[c * width + x] - offset[c]) * scale[c];
}

// Steps 1 to 3 of one image, [H, W, C].
template <int C>
struct NormalizedPlanes {
  static RESFAST_INLINE void run(const Job& job, int64_t index, float* result, Scratch& scratch) {
    if (job.affine)
      pack<C>(job.images + index * job.image(), scratch.packed.data(), job.height * job.width);
    for (int64_t y = 0; y < job.height; ++y) {
      float* planes = scratch.planes.data();
      if (job.affine) {
        if (job.zero_padding)
          interpolated_row<C, true>(job, index, y, planes, scratch);
        else
          interpolated_row<C, false>(job, index, y, planes, scratch);
      } else {
        split_channels<C>(shifted_row(job, index, y, scratch), planes, job.width);
      }
      if (job.color) {
        float* mixed = planes + job.row();
        mix_channels<C>(job.color + C * (C + 1) * index, planes, mixed, job.width);
        planes = mixed;
      }
      normalize_planes<C>(planes, job.offset, job.scale, result + y * job.row(), job.width);
    }
  }
};

// -- images --------------------------------------------------------------------------------------

struct Box {
  int64_t top, left, bottom, right;
};

// The part of a rectangle inside the image; {} if empty.
inline Box clipped(const int32_t* box, const Job& job) {
  const int64_t top = std::clamp<int64_t>(box[0], 0, job.height);
  const int64_t left = std::clamp<int64_t>(box[1], 0, job.width);
  return {
      top, left, std::clamp<int64_t>(box[2], top, job.height),
      std::clamp<int64_t>(box[3], left, job.width)};
}

template <class Value>
void cut_out(const Job& job, int64_t index, Value* result) {
  if (!job.cutout) return;
  const Box box = clipped(job.cutout + 4 * index, job);
  for (int64_t y = box.top; y < box.bottom; ++y)
    std::fill_n(
        result + y * job.row() + box.left * job.channels, (box.right - box.left) * job.channels,
        Value{0});
}

struct Mix {
  static RESFAST_INLINE void run(
      float* __restrict own, const float* __restrict other, int64_t size, float weight) {
    for (int64_t i = 0; i < size; ++i) own[i] = weight * own[i] + (1 - weight) * other[i];
  }
};

template <class Dtype>
struct Round {
  static RESFAST_INLINE void run(
      const float* __restrict values, typename Dtype::Stored* __restrict result, int64_t size) {
    for (int64_t i = 0; i < size; ++i) result[i] = Dtype::store(values[i]);
  }
};

// Steps 1 to 4 of one image, float32 [H, W, C].
void normalized(const Job& job, int64_t index, float* result, Scratch& scratch) {
  if (!job.affine && !job.color) {
    dispatch<NormalizedBytes<Float32>>(job, index, result, scratch);
  } else {
    switch (job.channels) {
      case 1: dispatch<NormalizedPlanes<1>>(job, index, result, scratch); break;
      case 2: dispatch<NormalizedPlanes<2>>(job, index, result, scratch); break;
      case 3: dispatch<NormalizedPlanes<3>>(job, index, result, scratch); break;
      default: dispatch<NormalizedPlanes<4>>(job, index, result, scratch);
    }
  }
  cut_out(job, index, result);
}

// Step 5: outside the box, `own` and the other image mixed by `weight`; inside, the other image.
void mix(const Job& job, int64_t item, float* own, const float* other) {
  const Box box = clipped(job.box + 4 * item, job);
  const float weight = job.weight[item];
  const auto part = [&](int64_t y, int64_t begin, int64_t end, float own_weight) {
    const int64_t start = y * job.row() + begin * job.channels;
    dispatch<Mix>(own + start, other + start, (end - begin) * job.channels, own_weight);
  };
  if (box.top == box.bottom || box.left == box.right) {
    dispatch<Mix>(own, other, job.image(), weight);
    return;
  }
  for (int64_t y = 0; y < job.height; ++y) {
    if (y < box.top || y >= box.bottom) {
      part(y, 0, job.width, weight);
      continue;
    }
    part(y, 0, box.left, weight);
    part(y, box.left, box.right, 0);
    part(y, box.right, job.width, weight);
  }
}

template <class Dtype>
void augment_item(const Job& job, int64_t item, typename Dtype::Stored* result, Scratch& scratch) {
  const int64_t index = job.indices[item];
  if (!job.affine && !job.color && !job.partner) {
    dispatch<NormalizedBytes<Dtype>>(job, index, result, scratch);
    cut_out(job, index, result);
    return;
  }
  normalized(job, index, scratch.own.data(), scratch);
  if (job.partner) {
    normalized(job, job.partner[item], scratch.other.data(), scratch);
    mix(job, item, scratch.own.data(), scratch.other.data());
  }
  dispatch<Round<Dtype>>(scratch.own.data(), result, job.image());
}

template <class Dtype>
void augment_batch(const Job& job, int64_t batch, void* result) {
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / job.image());
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(job);
    for (int64_t item = begin; item < end; ++item)
      augment_item<Dtype>(
          job, item, static_cast<typename Dtype::Stored*>(result) + item * job.image(), scratch);
  });
}

// -- arguments -----------------------------------------------------------------------------------

// -1 in `expected` stands for any size.
void check_tensor(
    const char* name, const Tensor& tensor, ScalarType dtype, std::vector<int64_t> expected) {
  if (tensor.scalar_type() != dtype)
    fail(name, " is ", dtype_name(tensor.scalar_type()), "; expected ", dtype_name(dtype));
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == expected.size();
  for (size_t axis = 0; same && axis < expected.size(); ++axis)
    same = expected[axis] == -1 || sizes[axis] == expected[axis];
  if (!same) {
    if (expected[0] == -1) fail(name, " is ", shape_name(sizes), "; expected [B]");
    fail(name, " is ", shape_name(sizes), "; expected ", shape_name(expected));
  }
  if (!tensor.is_cpu()) fail(name, " is not on the CPU; expected cpu, like images");
  if (!tensor.is_contiguous()) fail(name, " is not contiguous");
}

void check_images(const Tensor& images) {
  if (images.scalar_type() != ScalarType::Byte)
    fail("images are ", dtype_name(images.scalar_type()), "; expected torch.uint8");
  if (images.dim() != 4 || images.numel() == 0)
    fail("images are ", shape_name(images.sizes()), "; expected [N, H, W, C], none of them 0");
  const int64_t height = images.size(1), width = images.size(2), channels = images.size(3);
  if (channels > kMaxChannels)
    fail("images have ", channels, " channels; expected 1 to ", kMaxChannels);
  if (!images.is_contiguous())
    fail("images are not contiguous; expected [N, H, W, C] in that order in memory");
  if (height >= kMaxSide || width >= kMaxSide || height * width >= kMaxPixels)
    fail("images have ", height, "x", width,
         " pixels; expected sides below 2^24 and fewer than 2^31 - 1 pixels");
}

// As Python prints it, to nine digits.
std::string decimal(double value) {
  std::ostringstream text;
  text.precision(std::numeric_limits<float>::max_digits10);
  text << value;
  const bool whole = text.str().find_first_not_of("-0123456789") == std::string::npos;
  return text.str() + (whole ? ".0" : "");
}

std::string decimal(int64_t value) { return std::to_string(value); }

// Minimum and maximum of some values; NaN if any value is.
template <class Value>
struct Range {
  Value least = std::numeric_limits<Value>::max();
  Value most = std::numeric_limits<Value>::lowest();

  void add(Value value) {
    least = least != least || least < value ? least : value;
    most = most != most || most > value ? most : value;
  }
  void check(const char* name, Value low, Value high, const std::string& what) const {
    if (low <= least && most <= high) return; // false if NaN
    fail(name, " ", decimal(low <= least ? most : least), " ", what, "; expected ", decimal(low),
         " to ", decimal(high));
  }
};

void check_indices(const char* name, const int64_t* indices, int64_t batch, int64_t count) {
  for (int64_t item = 0; item < batch; ++item)
    if (indices[item] < 0 || indices[item] >= count)
      fail(name, " ", indices[item], " is out of range for ", count, " images; expected 0 to ",
           count - 1);
}

void check_values(const Job& job, int64_t batch) {
  std::vector<int64_t> used(job.indices, job.indices + batch);
  if (job.partner) used.insert(used.end(), job.partner, job.partner + batch);
  if (job.weight) {
    Range<double> weights;
    for (int64_t item = 0; item < batch; ++item) weights.add(job.weight[item]);
    weights.check("weight", 0, 1, "is out of range");
  }
  const std::string outside = "leaves the padded image of " + std::to_string(job.height) + "x" +
      std::to_string(job.width) + " pixels";
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t last = (axis == 0 ? job.height : job.width) - 1;
    if (job.shift) {
      Range<int64_t> shifts;
      for (int64_t index : used) shifts.add(job.shift[2 * index + axis]);
      shifts.check("shift", -last, last, outside);
    }
    if (job.affine) {
      Range<double> reached; // an affine map has its extremes at the corners
      for (int64_t index : used) {
        const float* row = job.affine + 6 * index + 3 * axis;
        for (float y : {0.0f, static_cast<float>(job.height - 1)})
          for (float x : {0.0f, static_cast<float>(job.width - 1)})
            reached.add(row[0] * y + row[1] * x + row[2]);
      }
      // A tolerance of 1/1000 pixel for the rounding of coordinates.
      const double end = static_cast<double>(last);
      reached.check("affine coordinate", -end - 1e-3, 2 * end + 1e-3, outside);
    }
  }
}

// -- the operator --------------------------------------------------------------------------------

template <class Value>
const Value* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const Value*>(tensor->const_data_ptr()) : nullptr;
}

Tensor augment(
    const Tensor& images, const Tensor& indices, const Tensor& offset, const Tensor& scale,
    const std::optional<Tensor>& shift, const std::optional<Tensor>& flip,
    const std::optional<Tensor>& affine, const std::optional<Tensor>& color,
    const std::optional<Tensor>& cutout, const std::optional<Tensor>& partner,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& box, bool zero_padding,
    ScalarType dtype, bool check) {
  check_images(images);
  const int64_t count = images.size(0), height = images.size(1), width = images.size(2);
  const int64_t channels = images.size(3);
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half)
    fail("the result's dtype is ", dtype_name(dtype),
         "; expected one of torch.float32, torch.bfloat16, torch.float16");
  check_tensor("indices", indices, ScalarType::Long, {-1});
  const int64_t batch = indices.size(0);
  check_tensor("offset", offset, ScalarType::Float, {channels});
  check_tensor("scale", scale, ScalarType::Float, {channels});
  if (shift) check_tensor("shift", *shift, ScalarType::Int, {count, 2});
  if (flip) check_tensor("flip", *flip, ScalarType::Bool, {count});
  if (affine) check_tensor("affine", *affine, ScalarType::Float, {count, 2, 3});
  if (color) check_tensor("color", *color, ScalarType::Float, {count, channels, channels + 1});
  if (cutout) check_tensor("cutout", *cutout, ScalarType::Int, {count, 4});
  if (partner) check_tensor("partner", *partner, ScalarType::Long, {batch});
  if (weight) check_tensor("weight", *weight, ScalarType::Float, {batch});
  if (box) check_tensor("box", *box, ScalarType::Int, {batch, 4});
  if (affine && (shift || flip))
    fail("affine is given together with shift or flip; include them in the affine map");
  if (partner.has_value() != weight.has_value() || partner.has_value() != box.has_value())
    fail("mixing needs partner, weight and box together");

  std::vector<float> offsets(width * channels), scales(width * channels);
  for (int64_t i = 0; i < width * channels; ++i) {
    offsets[i] = offset.const_data_ptr<float>()[i % channels];
    scales[i] = scale.const_data_ptr<float>()[i % channels];
  }
  Job job{
      count, height, width, channels, zero_padding,
      images.const_data_ptr<uint8_t>(), indices.const_data_ptr<int64_t>(),
      offsets.data(), scales.data(),
      data_or_null<int32_t>(shift), data_or_null<bool>(flip), data_or_null<float>(affine),
      data_or_null<float>(color), data_or_null<int32_t>(cutout), data_or_null<int64_t>(partner),
      data_or_null<float>(weight), data_or_null<int32_t>(box)};
  check_indices("index", job.indices, batch, count);
  if (job.partner) check_indices("partner", job.partner, batch, count);
  if (check) check_values(job, batch);

  Tensor result = torch::stable::empty(
      {batch, channels, height, width}, dtype, std::nullopt, std::nullopt, std::nullopt,
      torch::headeronly::MemoryFormat::ChannelsLast);
  void* data = result.mutable_data_ptr();
  switch (dtype) {
    case ScalarType::BFloat16: augment_batch<BFloat16>(job, batch, data); break;
    case ScalarType::Half: augment_batch<Float16>(job, batch, data); break;
    default: augment_batch<Float32>(job, batch, data);
  }
  return result;
}

} // namespace
} // namespace resfast

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("augment", TORCH_BOX(&resfast::augment));
}
