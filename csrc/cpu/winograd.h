// Winograd's minimal filtering for 3x3 kernels, tiles of 2x2 results: its transforms, and the walk
// over tiles. What they compute: conv_winograd.cpp.
#pragma once

#if defined(__x86_64__)

#include "conv_bf16.h"

namespace resfast {

// The transforms of one direction, in any arithmetic: of inputs, of products to results, of kernels,
// and, transposed, of the results' gradients and to the kernel's gradient.
template <int kStride>
struct Transform;

template <>
struct Transform<1> {
  static constexpr int kSide = 4; // inputs of a tile, and its products
  template <class V>
  RESFAST_BF16_INLINE static void inputs(const V* d, V* t) {
    t[0] = d[0] - d[2], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[1] - d[3];
  }
  template <class V>
  RESFAST_BF16_INLINE static void results(const V* m, V* y) {
    y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
  }
  template <class V>
  RESFAST_BF16_INLINE static void kernel(const V* g, V* u) {
    const V outer = 0.5f * (g[0] + g[2]), inner = 0.5f * g[1];
    u[0] = g[0], u[1] = outer + inner, u[2] = outer - inner, u[3] = g[2];
  }
  template <class V>
  RESFAST_BF16_INLINE static void gradients(const V* y, V* m) {
    m[0] = y[0], m[1] = y[0] + y[1], m[2] = y[0] - y[1], m[3] = V{} - y[1];
  }
  template <class V>
  RESFAST_BF16_INLINE static void kernel_gradient(const V* u, V* g) {
    const V sum = 0.5f * (u[1] + u[2]);
    g[0] = u[0] + sum, g[1] = 0.5f * (u[1] - u[2]), g[2] = sum + u[3];
  }
};

template <>
struct Transform<2> {
  static constexpr int kSide = 5;
  template <class V>
  RESFAST_BF16_INLINE static void inputs(const V* d, V* t) {
    t[0] = d[0] - d[2], t[1] = d[2], t[2] = d[4] - d[2], t[3] = d[1], t[4] = d[3];
  }
  template <class V>
  RESFAST_BF16_INLINE static void results(const V* m, V* y) {
    y[0] = m[0] + m[1] + m[3], y[1] = m[1] + m[2] + m[4];
  }
  template <class V>
  RESFAST_BF16_INLINE static void kernel(const V* g, V* u) {
    u[0] = g[0], u[1] = g[0] + g[2], u[2] = g[2], u[3] = g[1], u[4] = g[1];
  }
  template <class V>
  RESFAST_BF16_INLINE static void gradients(const V* y, V* m) {
    m[0] = y[0], m[1] = y[0] + y[1], m[2] = y[1], m[3] = y[0], m[4] = y[1];
  }
  template <class V>
  RESFAST_BF16_INLINE static void kernel_gradient(const V* u, V* g) {
    g[0] = u[0] + u[1], g[1] = u[3] + u[4], g[2] = u[1] + u[2];
  }
};

template <int kStride>
constexpr int kPoints = Transform<kStride>::kSide * Transform<kStride>::kSide;

struct Tiles {
  int64_t rows, columns, count; // per image, per image, of the batch
  explicit Tiles(const ConvShape& shape)
      : rows(ceil_div(shape.rows, 2)), columns(ceil_div(shape.columns, 2)),
        count(shape.batch * rows * columns) {}
};

// Goes from tile to tile.
struct TileAt {
  const Tiles& tiles;
  int64_t image, row, column; // of the tile's first result
  TileAt(const Tiles& all, int64_t tile)
      : tiles(all), image(tile / tiles.columns / tiles.rows),
        row(tile / tiles.columns % tiles.rows * 2), column(tile % tiles.columns * 2) {}
  // To the next one; whether it is in the same row.
  bool next() {
    column += 2;
    if (column < 2 * tiles.columns) return true;
    column = 0, row += 2;
    if (row == 2 * tiles.rows) row = 0, ++image;
    return false;
  }
};

// Channels come in groups of 32: first the even ones, then the odd ones, which are the upper and
// lower halves of 32-bit words and need no shuffle to become float32. Those after the last whole
// group stay in order.
enum class Channels { kEven, kOdd, kRest };

inline int64_t channel_of(int64_t index, int64_t channels) {
  const int64_t group = index / 32 * 32, i = index % 32;
  if (group + 32 > channels) return index;
  return group + (i < kLanes ? 2 * i : 2 * (i - kLanes) + 1);
}

// 16 channels as float32, zeros where `mask` is not set.
template <Channels kWhich>
RESFAST_BF16_INLINE __m512 load_channels(const uint16_t* from, __mmask16 mask) {
  if constexpr (kWhich == Channels::kRest) return load_bf16(mask, from);
  const __m512i pairs = _mm512_maskz_loadu_epi32(mask, from);
  return _mm512_castsi512_ps(
      kWhich == Channels::kEven ? _mm512_slli_epi32(pairs, 16)
                                : _mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
}

// Calls `store(tile, point, (B^T d B)[point])` for tiles from `first` on, counted from 0, where d are
// the values that a tile's results are made of, zeros outside the image: 16 channels of them, the
// first (or that of their group) at `channel`.
template <int kStride, Channels kWhich, class Store>
RESFAST_BF16_INLINE void transform_tiles(
    const ConvShape& shape, const Tiles& tiles, int64_t first, int64_t count, int64_t channel,
    Store store) {
  constexpr int kSide = Transform<kStride>::kSide, kShared = kSide - 2 * kStride;
  const __mmask16 mask = kWhich == Channels::kRest ? lane_mask(shape.channels - channel) : 0xFFFF;
  TileAt at(tiles, first);
  __m512 t[kSide][kSide]; // the columns transformed
  bool follows = false; // so that its first columns are the last ones of the tile before
  for (int64_t tile = 0; tile < count; ++tile) {
    const int64_t top = kStride * at.row - shape.padding_h;
    const int64_t left = kStride * at.column - shape.padding_w;
    const uint16_t* source =
        shape.x + ((at.image * shape.height + top) * shape.width + left) * shape.channels + channel;
#pragma GCC unroll 5
    for (int j = 0; j < kSide; ++j) {
      if (j < kShared && follows) {
#pragma GCC unroll 5
        for (int i = 0; i < kSide; ++i) t[i][j] = t[i][kSide - kShared + j];
        continue;
      }
      const bool inside = left + j >= 0 && left + j < shape.width;
      __m512 d[kSide], transformed[kSide];
#pragma GCC unroll 5
      for (int i = 0; i < kSide; ++i)
        d[i] = load_channels<kWhich>(
            source + (i * shape.width + j) * shape.channels,
            inside && top + i >= 0 && top + i < shape.height ? mask : __mmask16{0});
      Transform<kStride>::inputs(d, transformed);
#pragma GCC unroll 5
      for (int i = 0; i < kSide; ++i) t[i][j] = transformed[i];
    }
#pragma GCC unroll 5
    for (int i = 0; i < kSide; ++i) {
      __m512 row[kSide];
      Transform<kStride>::inputs(t[i], row);
#pragma GCC unroll 5
      for (int j = 0; j < kSide; ++j) store(tile, kSide * i + j, row[j]);
    }
    follows = at.next();
  }
}

} // namespace resfast

#endif
