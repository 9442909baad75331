// Layout of images for the direct 3x3 convolutions on AMX. A few images are interleaved pixel by
// pixel, so that the rows of a tile are a fixed distance apart, none is wasted at an edge, and a
// tap is a constant offset.
//
// A row of inputs consists of cells of `images` positions each, one cell per column, with zeros on
// both sides: [row][cell][image]. With stride 2 the even columns come first, then the odd ones. The
// results of a row are the positions [column][image], a multiple of 32; tap s reads the positions
// shift(s) further on. Rows outside the image are skipped.
#pragma once

#if defined(__x86_64__)

#include <numeric>

#include "conv_bf16.h"

namespace resfast {

constexpr int64_t kPositions = 2 * amx::kRows; // computed at once
constexpr int64_t kChannels = 2 * amx::kPairs; // summed over by a tile

struct Grid {
  int64_t images, groups; // images per group; groups in the batch
  int64_t stride, columns, height, padding; // columns of results; rows of inputs and their padding
  int64_t cells; // cells per row of inputs

  Grid(const ConvShape& shape, int64_t least_images)
      : images(std::max(least_images, kPositions / std::gcd(shape.columns, kPositions))),
        groups(ceil_div(shape.batch, images)), stride(shape.stride_h), columns(shape.columns),
        height(shape.height), padding(shape.padding_h),
        cells(stride == 1 ? columns + 2 : 2 * columns + 1) {}

  int64_t positions() const { return columns * images; } // per row of results
  int64_t input_positions() const { return height * cells * images; } // per group
  // The cell of a column, counted from the start of the padding.
  int64_t cell(int64_t column) const {
    return stride == 1 ? column : column % 2 * (columns + 1) + column / 2;
  }
  int64_t shift(int64_t s) const { return cell(s) * images; }
  // The row of inputs that tap r of a row of results reads, and whether it exists.
  int64_t input_row(int64_t row, int64_t r) const { return row * stride + r - padding; }
  bool has_row(int64_t row, int64_t r) const {
    return input_row(row, r) >= 0 && input_row(row, r) < height;
  }

  // The pixel of the results at a position of a row of a group, -1 for images beyond the last.
  int64_t pixel(const ConvShape& shape, int64_t group, int64_t row, int64_t position) const {
    const int64_t image = group * images + position % images;
    if (image >= shape.batch) return -1;
    return (image * shape.rows + row) * shape.columns + position / images;
  }

  // Calls `visit(row, cell, channels)` for all cells of one image; `channels` is null in the
  // padding.
  template <class Visit>
  void visit(const ConvShape& shape, int64_t image, Visit visit) const {
    for (int64_t row = 0; row < height; ++row) {
      const int64_t there = std::min(image, shape.batch - 1);
      const uint16_t* values =
          shape.x + (there * height + row) * shape.width * shape.channels;
      for (int64_t padded = 0; padded < stride * (columns - 1) + 3; ++padded) {
        const int64_t column = padded - shape.padding_w;
        const bool inside = image < shape.batch && column >= 0 && column < shape.width;
        visit(row, cell(padded), inside ? values + column * shape.channels : nullptr);
      }
    }
  }
};

RESFAST_BF16_INLINE __mmask32 channel_mask(int64_t left) {
  if (left >= kChannels) return 0xFFFFFFFF;
  return left > 0 ? (__mmask32{1} << left) - 1 : 0;
}

RESFAST_BF16_INLINE __m512i load_channels(const uint16_t* values, int64_t channel, int64_t channels) {
  if (!values) return _mm512_setzero_si512();
  return _mm512_maskz_loadu_epi16(channel_mask(channels - channel), values + channel);
}

inline void check_amx() {
  if (!bf16_supported() || !amx::supported()) fail("this processor has no AMX");
}

} // namespace resfast

#endif
