// Winograd's minimal filtering for 3x3 kernels: its transforms and the iteration over tiles. For
// the algorithm see conv_winograd.cpp.
#pragma once

#if defined(__x86_64__)

#include "conv_bf16.h"

namespace resfast {

RESFAST_BF16_INLINE __m512 multiply_add(float factor, __m512 value, __m512 to) {
  return _mm512_fmadd_ps(_mm512_set1_ps(factor), value, to);
}

inline float multiply_add(float factor, float value, float to) { return factor * value + to; }

// A form has the one-dimensional transforms, in any arithmetic type: of inputs, of products to
// results, of kernels, and, transposed, of the results' gradients and to the kernel's gradient.

// Stride 1, tiles of 2x2 results.
struct Form2 {
  static constexpr int kResults = 2; // per tile
  static constexpr int kSide = 4; // products per tile
  static constexpr int kInputs = 4;
  static constexpr int kStep = 2; // inputs from tile to tile
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

// Stride 2, tiles of 2x2 results.
struct Form2Stride2 {
  static constexpr int kResults = 2;
  static constexpr int kSide = 5;
  static constexpr int kInputs = 5;
  static constexpr int kStep = 4;
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

// The input gradient for stride 2 and padding 1, from the result's gradient and the rotated kernel:
// tiles of 4x4, in each direction two by the middle tap alone and two by F(2, 2) of the outer taps.
// The kernel's transform is that of Form2Stride2.
struct Form2Transposed {
  static constexpr int kResults = 4;
  static constexpr int kSide = 5;
  static constexpr int kInputs = 3;
  static constexpr int kStep = 2;
  template <class V>
  RESFAST_BF16_INLINE static void inputs(const V* d, V* t) {
    t[0] = d[0] - d[1], t[1] = d[1], t[2] = d[2] - d[1], t[3] = d[0], t[4] = d[1];
  }
  template <class V>
  RESFAST_BF16_INLINE static void results(const V* m, V* y) {
    y[0] = m[3], y[1] = m[0] + m[1], y[2] = m[4], y[3] = m[1] + m[2];
  }
};

// Stride 1, tiles of 3x3 results: F(3x3, 3x3) at the points 0, +-3/4, -2 and infinity, for images
// that 4x4 tiles do not divide.
struct Form3 {
  static constexpr int kResults = 3;
  static constexpr int kSide = 5;
  static constexpr int kInputs = 5;
  static constexpr int kStep = 3;
  static constexpr float kA = 0.75f, kB = -2.0f, kA2 = kA * kA, kB2 = kB * kB;
  static constexpr float kOf0 = 1 / (kA2 * kB), kOfA = 1 / (2 * kA2 * (kA - kB));
  static constexpr float kOfMinusA = -1 / (2 * kA2 * (kA + kB)), kOfB = 1 / (kB * (kB2 - kA2));
  RESFAST_BF16_INLINE static void inputs(const __m512* d, __m512* t) {
    const __m512 even = multiply_add(-kA2, d[0], d[2]), odd = multiply_add(-kA2, d[1], d[3]);
    const __m512 far = multiply_add(-kB, d[2], d[3]), near = multiply_add(-kB, d[1], d[2]);
    t[0] = multiply_add(-kB, even, odd);
    t[1] = multiply_add(kA, near, far), t[2] = multiply_add(-kA, near, far);
    t[3] = odd;
    t[4] = multiply_add(-kB, odd, multiply_add(-kA2, d[2], d[4]));
  }
  RESFAST_BF16_INLINE static void results(const __m512* m, __m512* y) {
    const __m512 even = m[1] + m[2], odd = m[1] - m[2];
    y[0] = m[0] + even + m[3];
    y[1] = multiply_add(kA, odd, kB * m[3]);
    y[2] = multiply_add(kA2, even, multiply_add(kB2, m[3], m[4]));
  }
  template <class V>
  RESFAST_BF16_INLINE static void kernel(const V* g, V* u) {
    const V even = multiply_add(kA2, g[2], g[0]), odd = kA * g[1];
    u[0] = kOf0 * g[0], u[1] = kOfA * (even + odd), u[2] = kOfMinusA * (even - odd);
    u[3] = kOfB * multiply_add(kB2, g[2], multiply_add(kB, g[1], g[0])), u[4] = g[2];
  }
  RESFAST_BF16_INLINE static void gradients(const __m512* y, __m512* m) {
    const __m512 even = multiply_add(kA2, y[2], y[0]), odd = kA * y[1];
    m[0] = y[0], m[1] = even + odd, m[2] = even - odd;
    m[3] = multiply_add(kB2, y[2], multiply_add(kB, y[1], y[0])), m[4] = y[2];
  }
  RESFAST_BF16_INLINE static void kernel_gradient(const __m512* u, __m512* g) {
    const __m512 plus = kOfA * u[1], minus = kOfMinusA * u[2], other = kOfB * u[3];
    const __m512 even = plus + minus;
    g[0] = multiply_add(kOf0, u[0], even + other);
    g[1] = multiply_add(kA, plus - minus, kB * other);
    g[2] = multiply_add(kA2, even, multiply_add(kB2, other, u[4]));
  }
};

// Stride 1, tiles of 4x4 results: F(4x4, 3x3) at the points 0, +-2/3, +-3/2 and infinity, with half
// the rounding error of the usual 0, +-1, +-2 and infinity.
struct Form4 {
  static constexpr int kResults = 4;
  static constexpr int kSide = 6;
  static constexpr int kInputs = 6;
  static constexpr int kStep = 4;
  static constexpr float kA = 2.0f / 3, kB = 3.0f / 2, kA2 = kA * kA, kB2 = kB * kB;
  static constexpr float kA3 = kA2 * kA, kB3 = kB2 * kB, kSum = kA2 + kB2;
  static constexpr float kOfA = 1 / (2 * kA2 * (kA2 - kB2)), kOfB = 1 / (2 * kB2 * (kB2 - kA2));
  RESFAST_BF16_INLINE static void inputs(const __m512* d, __m512* t) {
    t[0] = multiply_add(-kSum, d[2], d[0] + d[4]);
    const __m512 even_a = multiply_add(-kB2, d[2], d[4]), odd_a = multiply_add(-kB2, d[1], d[3]);
    t[1] = multiply_add(kA, odd_a, even_a), t[2] = multiply_add(-kA, odd_a, even_a);
    const __m512 even_b = multiply_add(-kA2, d[2], d[4]), odd_b = multiply_add(-kA2, d[1], d[3]);
    t[3] = multiply_add(kB, odd_b, even_b), t[4] = multiply_add(-kB, odd_b, even_b);
    t[5] = multiply_add(-kSum, d[3], d[1] + d[5]);
  }
  RESFAST_BF16_INLINE static void results(const __m512* m, __m512* y) {
    const __m512 even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4];
    const __m512 odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b;
    y[1] = multiply_add(kA, odd_a, kB * odd_b);
    y[2] = multiply_add(kA2, even_a, kB2 * even_b);
    y[3] = multiply_add(kA3, odd_a, multiply_add(kB3, odd_b, m[5]));
  }
  template <class V>
  RESFAST_BF16_INLINE static void kernel(const V* g, V* u) {
    const V even_a = kOfA * multiply_add(kA2, g[2], g[0]), odd_a = (kOfA * kA) * g[1];
    const V even_b = kOfB * multiply_add(kB2, g[2], g[0]), odd_b = (kOfB * kB) * g[1];
    u[0] = g[0], u[1] = even_a + odd_a, u[2] = even_a - odd_a;
    u[3] = even_b + odd_b, u[4] = even_b - odd_b, u[5] = g[2];
  }
  RESFAST_BF16_INLINE static void gradients(const __m512* y, __m512* m) {
    const __m512 even_a = multiply_add(kA2, y[2], y[0]), odd_a = multiply_add(kA3, y[3], kA * y[1]);
    const __m512 even_b = multiply_add(kB2, y[2], y[0]), odd_b = multiply_add(kB3, y[3], kB * y[1]);
    m[0] = y[0], m[1] = even_a + odd_a, m[2] = even_a - odd_a;
    m[3] = even_b + odd_b, m[4] = even_b - odd_b, m[5] = y[3];
  }
  RESFAST_BF16_INLINE static void kernel_gradient(const __m512* u, __m512* g) {
    const __m512 even_a = kOfA * (u[1] + u[2]), odd_a = (kOfA * kA) * (u[1] - u[2]);
    const __m512 even_b = kOfB * (u[3] + u[4]), odd_b = (kOfB * kB) * (u[3] - u[4]);
    g[0] = u[0] + even_a + even_b, g[1] = odd_a + odd_b;
    g[2] = multiply_add(kA2, even_a, multiply_add(kB2, even_b, u[5]));
  }
};

inline void check_tile(int64_t tile, int64_t stride) {
  if (stride != 1 && stride != 2) fail("stride is ", stride, "; expected 1 or 2");
  if (tile != 2 && ((tile != 3 && tile != 4) || stride != 1))
    fail("tile is ", tile, "; expected 2, or 3 or 4 where the stride is 1");
}

// Calls `run(form)` with the form of a tile and a stride accepted by check_tile.
template <class Run>
auto with_form(int64_t tile, int64_t stride, Run run) {
  if (stride == 2) return run(Form2Stride2{});
  return tile == 4 ? run(Form4{}) : tile == 3 ? run(Form3{}) : run(Form2{});
}

template <class Form>
constexpr int kPoints = Form::kSide * Form::kSide;

// Weights of a panel: [point][pairs][outputs of the panel][2]. Points are not a multiple of 4096
// bytes apart, which would map to the same cache sets.
inline int64_t point_size(int64_t outputs, int64_t pairs) {
  return round_up(outputs, kLanes) * 2 * pairs + 2 * kLanes;
}

// Start of a panel's weights.
template <class Form>
int64_t panel_start(int64_t panel, int64_t pairs) {
  return panel * kPoints<Form> * point_size(kPanel, pairs);
}

template <class Form>
int64_t winograd_size(int64_t outputs, int64_t channels) {
  const int64_t pairs = ceil_div(channels, 2), rest = outputs % kPanel;
  const int64_t last = rest ? kPoints<Form> * point_size(rest, pairs) : 0;
  return panel_start<Form>(outputs / kPanel, pairs) + last;
}

// A map of results in tiles of `side` rows and columns.
struct Tiles {
  int64_t side, rows, columns, count; // per image, per image, of the batch
  Tiles(const ConvShape& shape, int64_t side)
      : side(side), rows(ceil_div(shape.rows, side)), columns(ceil_div(shape.columns, side)),
        count(shape.batch * rows * columns) {}
};

// Iterates over tiles.
struct TileAt {
  const Tiles& tiles;
  int64_t image, row, column; // of the tile's first result
  TileAt(const Tiles& all, int64_t tile)
      : tiles(all), image(tile / tiles.columns / tiles.rows),
        row(tile / tiles.columns % tiles.rows * tiles.side),
        column(tile % tiles.columns * tiles.side) {}
  void move_to(const TileAt& other) { image = other.image, row = other.row, column = other.column; }
  // Advances to the next tile; returns whether it is in the same row.
  bool next() {
    column += tiles.side;
    if (column < tiles.side * tiles.columns) return true;
    column = 0, row += tiles.side;
    if (row == tiles.side * tiles.rows) row = 0, ++image;
    return false;
  }
};

// Channels [begin, end) of a map's pixels [N, height, width, channels], in squares of `side` rows
// and columns, one for each tile.
struct Squares {
  const uint16_t* pixels;
  int64_t height, width, channels, begin, end, side;
};

// Prefetches the squares of tiles into L2, some cache lines at a time, during other computations.
template <bool kWrite>
class Prefetch {
 public:
  Prefetch(const Squares& squares, const Tiles& tiles, int64_t first, int64_t count)
      : squares_(squares), tile_(tiles, first), left_(squares.pixels ? count : 0) {
    if (left_ > 0) go_to_pixel();
  }

  // Number of cache lines; valid before the first is prefetched.
  int64_t lines() const {
    return left_ * squares_.side * squares_.side * ceil_div(squares_.end - squares_.begin, kLine);
  }

  void bring(int64_t lines) {
    for (; lines > 0 && left_ > 0; --lines) {
      if (inside_) __builtin_prefetch(pixel_ + channel_, kWrite, 2);
      channel_ += kLine;
      if (channel_ < squares_.end) continue;
      if (++column_ == squares_.side) column_ = 0, ++row_;
      if (row_ == squares_.side) row_ = 0, --left_, tile_.next();
      if (left_ > 0) go_to_pixel();
    }
  }

 private:
  static constexpr int64_t kLine = 32; // values

  void go_to_pixel() {
    const int64_t row = tile_.row / tile_.tiles.side * squares_.side + row_;
    const int64_t column = tile_.column / tile_.tiles.side * squares_.side + column_;
    inside_ = row < squares_.height && column < squares_.width;
    pixel_ = squares_.pixels +
        ((tile_.image * squares_.height + row) * squares_.width + column) * squares_.channels;
    channel_ = squares_.begin;
  }

  Squares squares_;
  TileAt tile_;
  int64_t left_, row_ = 0, column_ = 0, channel_ = 0; // left: tiles; the others: in the square
  const uint16_t* pixel_ = nullptr;
  bool inside_ = false; // the map
};

// The inputs that a tile reads but the tiles before it do not.
template <class Form>
Squares input_squares(const ConvShape& shape) {
  return {shape.x, shape.height, shape.width, shape.channels, 0, shape.channels, Form::kStep};
}

// Channels come in groups of 32: first the even ones, then the odd ones, which are the upper and
// lower halves of 32-bit words and need no shuffle to become float32. Those after the last whole
// group stay in order.
enum class Channels { kEven, kOdd, kRest };

inline int64_t channel_of(int64_t index, int64_t channels) {
  const int64_t group = index / 32 * 32, i = index % 32;
  if (group + 32 > channels) return index;
  return group + (i < kLanes ? 2 * i : 2 * (i - kLanes) + 1);
}

// 16 channels as float32, with zeros where `mask` is not set.
template <Channels kWhich>
RESFAST_BF16_INLINE __m512 load_channels(const uint16_t* from, __mmask16 mask) {
  if constexpr (kWhich == Channels::kRest) return load_bf16(mask, from);
  const __m512i pairs = _mm512_maskz_loadu_epi32(mask, from);
  return _mm512_castsi512_ps(
      kWhich == Channels::kEven ? _mm512_slli_epi32(pairs, 16)
                                : _mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
}

// Calls `store(tile, row, (B^T d B)[row])` for `count` tiles starting at `first`, counted from 0,
// where d are the inputs of a tile, zero outside the image: 16 channels, starting (themselves or
// their group) at `channel`.
template <class Form, Channels kWhich, class Store>
RESFAST_BF16_INLINE void transform_tiles(
    const ConvShape& shape, const Tiles& tiles, int64_t first, int64_t count, int64_t channel,
    Store store) {
  constexpr int kSide = Form::kSide, kInputs = Form::kInputs, kShared = kInputs - Form::kStep;
  const __mmask16 mask = kWhich == Channels::kRest ? lane_mask(shape.channels - channel) : 0xFFFF;
  TileAt at(tiles, first);
  __m512 t[kSide][kInputs]; // transformed columns
  bool follows = false; // the first columns are then the last ones of the previous tile
  for (int64_t tile = 0; tile < count; ++tile) {
    const int64_t top = at.row / Form::kResults * Form::kStep - shape.padding_h;
    const int64_t left = at.column / Form::kResults * Form::kStep - shape.padding_w;
    const uint16_t* source =
        shape.x + ((at.image * shape.height + top) * shape.width + left) * shape.channels + channel;
#pragma GCC unroll 6
    for (int j = 0; j < kInputs; ++j) {
      if (j < kShared && follows) {
#pragma GCC unroll 6
        for (int i = 0; i < kSide; ++i) t[i][j] = t[i][Form::kStep + j];
        continue;
      }
      const bool inside = left + j >= 0 && left + j < shape.width;
      __m512 d[kInputs], transformed[kSide];
#pragma GCC unroll 6
      for (int i = 0; i < kInputs; ++i)
        d[i] = load_channels<kWhich>(
            source + (i * shape.width + j) * shape.channels,
            inside && top + i >= 0 && top + i < shape.height ? mask : __mmask16{0});
      Form::inputs(d, transformed);
#pragma GCC unroll 6
      for (int i = 0; i < kSide; ++i) t[i][j] = transformed[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < kSide; ++i) {
      __m512 row[kSide];
      Form::inputs(t[i], row);
      store(tile, i, row);
    }
    follows = at.next();
  }
}

} // namespace resfast

#endif
