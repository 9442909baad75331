// Reads a float32 training weight 16 outputs at a time, for packing.
#pragma once

#if defined(__x86_64__)

#include "conv_bf16.h"

namespace resfast {

// Transposes 16x16 values of 32 bits.
RESFAST_BF16_INLINE void transpose(__m512 (&rows)[kLanes]) {
  __m512 part[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    part[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    part[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) // then rows[i + c] has columns c, 4 + c, 8 + c, 12 + c of 4
    for (int j = 0; j < 2; ++j) {
      const __m512d first = (__m512d)part[i + j], second = (__m512d)part[i + j + 2];
      rows[i + 2 * j] = (__m512)_mm512_unpacklo_pd(first, second);
      rows[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(first, second);
    }
  for (int c = 0; c < 4; ++c) {
    const __m512 even = _mm512_shuffle_f32x4(rows[c], rows[4 + c], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(rows[c], rows[4 + c], 0xDD);
    const __m512 late_even = _mm512_shuffle_f32x4(rows[8 + c], rows[12 + c], 0x88);
    const __m512 late_odd = _mm512_shuffle_f32x4(rows[8 + c], rows[12 + c], 0xDD);
    part[c] = _mm512_shuffle_f32x4(even, late_even, 0x88);
    part[4 + c] = _mm512_shuffle_f32x4(odd, late_odd, 0x88);
    part[8 + c] = _mm512_shuffle_f32x4(even, late_even, 0xDD);
    part[12 + c] = _mm512_shuffle_f32x4(odd, late_odd, 0xDD);
  }
  for (int i = 0; i < kLanes; ++i) rows[i] = part[i];
}

// A weight in float32, [K, 3, 3, C].
struct Weight {
  const float* values;
  int64_t filters, channels;

  RESFAST_BF16_INLINE const float* at(int64_t filter, int tap, int64_t channel) const {
    return values + (filter * 9 + tap) * channels + channel;
  }
};

inline Weight check_train_weight(const Tensor& weight) {
  if (weight.scalar_type() != ScalarType::Float || weight.dim() != 4 || weight.numel() == 0 ||
      weight.size(2) != 3 || weight.size(3) != 3 || !is_channels_last(weight) || !weight.is_cpu())
    fail("weight is ", dtype_name(weight.scalar_type()), " ", shape_name(weight.sizes()),
         "; expected torch.float32 [K, C, 3, 3] in channels_last memory on the CPU");
  if (weight.numel() > int64_t{1} << 30) fail("the weight has more than 2^30 values");
  return {static_cast<const float*>(weight.const_data_ptr()), weight.size(0), weight.size(1)};
}

// 16 outputs of one channel and tap of the transposed weight: its channels are outputs, its filters
// are channels, and its taps are rotated by 180 degrees.
struct TransposedLanes {
  const Weight weight;

  int64_t outputs() const { return weight.channels; }
  int64_t channels() const { return weight.filters; }
  void go_to(int64_t, int64_t) {}
  RESFAST_BF16_INLINE __m512 load(int64_t output, int64_t channel, int tap) const {
    return _mm512_maskz_loadu_ps(
        lane_mask(weight.channels - output), weight.at(channel, 8 - tap, output));
  }
};

// The same for the weight itself, whose filters are far apart: 32 channels are transposed at once.
struct PlainLanes {
  static constexpr int64_t kGroup = 32; // channel_of stays within a group
  const Weight weight;
  alignas(64) float turned[9 * kGroup * kLanes] = {}; // [tap][channel][output]

  explicit PlainLanes(const Weight& weight_) : weight(weight_) {}
  int64_t outputs() const { return weight.filters; }
  int64_t channels() const { return weight.channels; }

  RESFAST_BF16 void go_to(int64_t output, int64_t group) {
    const int64_t rows = std::min(kLanes, weight.filters - output);
    for (int tap = 0; tap < 9; ++tap)
      for (int64_t half = 0; half < kGroup; half += kLanes) {
        const int64_t channel = group * kGroup + half;
        if (channel >= weight.channels) break;
        const __mmask16 mask = lane_mask(weight.channels - channel);
        __m512 lanes[kLanes];
        for (int64_t row = 0; row < kLanes; ++row)
          lanes[row] = row < rows
              ? _mm512_maskz_loadu_ps(mask, weight.at(output + row, tap, channel))
              : _mm512_setzero_ps();
        transpose(lanes);
        float* to = turned + (tap * kGroup + half) * kLanes;
        for (int64_t row = 0; row < kLanes; ++row) _mm512_store_ps(to + row * kLanes, lanes[row]);
      }
  }

  RESFAST_BF16_INLINE __m512 load(int64_t, int64_t channel, int tap) const {
    return _mm512_load_ps(turned + (tap * kGroup + channel % kGroup) * kLanes);
  }
};

// Rounded to bfloat16, in the lower halves.
RESFAST_BF16_INLINE __m512i words(__m512 value) {
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(value));
}

} // namespace resfast

#endif
