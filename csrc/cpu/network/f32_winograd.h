// 3x3 convolutions with stride 1 by Winograd's algorithm (Lavin and Gray, arXiv:1509.09308); part of
// f32.h.
//
// Some tiles of the map at a time: the inputs of each tile are transformed to points, at each point the
// tiles are multiplied with the panels of weights, and the products are transformed back.
//
// Weights: [panel of 16 outputs][point][block of 16 channels][channel][output].
//
// NaN and infinity spread over a tile, and so does what overflows in a transform. They also reach the
// results before the activation, so a tile where one is not finite is computed again without it.
#pragma once

namespace resfast::network::RESFAST_F32_NAMESPACE {
namespace {

// F(2x2, 3x3) at the points 0, +-1 and infinity.
struct Form2 {
  static constexpr int kSide = 2, kPoints = 4; // results and inputs of a tile, in each direction
  RESFAST_F32_INLINE static void inputs(const Vector* d, Vector* t) {
    t[0] = d[0] - d[2], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[1] - d[3];
  }
  RESFAST_F32_INLINE static void results(const Vector* m, Vector* y) {
    y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
  }
};

// F(4x4, 3x3) at the points 0, +-2/3, +-3/2 and infinity, with half the rounding error of the usual
// 0, +-1, +-2 and infinity.
struct Form4 {
  static constexpr int kSide = 4, kPoints = 6;
  static constexpr float kA = 2.0f / 3, kB = 3.0f / 2, kA2 = kA * kA, kB2 = kB * kB;
  static constexpr float kA3 = kA2 * kA, kB3 = kB2 * kB, kSum = kA2 + kB2;
  RESFAST_F32_INLINE static void inputs(const Vector* d, Vector* t) {
    const Vector a = splat(kA), b = splat(kB), a2 = splat(-kA2), b2 = splat(-kB2);
    const Vector sum = splat(-kSum);
    t[0] = multiply_add(sum, d[2], d[0] + d[4]);
    const Vector even_a = multiply_add(b2, d[2], d[4]);
    const Vector odd_a = a * multiply_add(b2, d[1], d[3]);
    t[1] = even_a + odd_a, t[2] = even_a - odd_a;
    const Vector even_b = multiply_add(a2, d[2], d[4]);
    const Vector odd_b = b * multiply_add(a2, d[1], d[3]);
    t[3] = even_b + odd_b, t[4] = even_b - odd_b;
    t[5] = multiply_add(sum, d[3], d[1] + d[5]);
  }
  RESFAST_F32_INLINE static void results(const Vector* m, Vector* y) {
    const Vector even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const Vector even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b;
    y[1] = multiply_add(splat(kA), odd_a, splat(kB) * odd_b);
    y[2] = multiply_add(splat(kA2), even_a, splat(kB2) * even_b);
    y[3] = multiply_add(splat(kA3), odd_a, multiply_add(splat(kB3), odd_b, m[5]));
  }
};

// A tile of the result, and the lines of its first pixel.
struct WinogradTile {
  int64_t rows, columns; // results that there are
  int64_t from, to, residual;
  int64_t top, left; // of the inputs
};

// A step by tiles of a form, with the buffers of a thread: lines of transformed inputs
// [point][group of tiles][block][tile of the group] and of products [point][group][panel][tile].
template <class Form>
class Winograd {
 public:
  static constexpr int kSide = Form::kSide, kInputs = Form::kPoints;
  static constexpr int64_t kPoints = kInputs * kInputs, kSomePanels = 4;

  Winograd(const Step& step, const Memory& memory)
      : step_(step), memory_(memory), most_(round_up(step.tiles_at_once, kRows)),
        // Points are not a multiple of 4096 bytes apart, which would map to the same cache sets.
        input_values_((step.blocks * most_ + 1) * kLanes),
        product_values_((kSomePanels * most_ + 1) * kLanes),
        from_(lines_of(memory, step.from, 0)), direct_(operand_of(step, memory)) {
    for (int64_t i = 0; i < kSide * kSide; ++i) {
      const int64_t row = i / kSide, column = i % kSide;
      to_[i] = step.to.line < 0 ? row * step.out_width + column : offset(step.to, row, column);
      residual_[i] = step.residual.line < 0 ? 0 : offset(step.residual, row, column);
    }
    thread_local LargeWorkspace workspace;
    inputs_ = workspace.get(
        kPoints * (input_values_ + product_values_) + kInputs * kInputs * kLanes);
    products_ = inputs_ + kPoints * input_values_;
    edge_ = products_ + kPoints * product_values_;
  }

  int64_t tiles_of_image() const {
    return ceil_div(step_.out_height, kSide) * ceil_div(step_.out_width, kSide);
  }

  // Tiles from `first` on, at most tiles_at_once.
  void run(int64_t first, int64_t count, int64_t first_panel, int64_t last_panel) {
    thread_local std::vector<WinogradTile> tiles;
    tiles.clear();
    for (int64_t i = 0; i < count; ++i) tiles.push_back(tile_at(first + i));
    const int64_t groups = ceil_div(count, kRows);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = first_of(group, count), end = first_of(group + 1, count);
      float* to = inputs_ + group * step_.blocks * kRows * kLanes;
      for (int64_t i = begin; i < end; ++i, to += kLanes) transform(tiles[i], to);
    }
    for (int64_t panel = first_panel; panel < last_panel; panel += kSomePanels) {
      const int64_t panels = std::min(kSomePanels, last_panel - panel);
      Epilogue epilogues[kSomePanels];
      for (int64_t j = 0; j < panels; ++j) epilogues[j] = epilogue_of(step_, memory_, panel + j);
      multiply_points(count, panel, panels);
      finish_tiles(tiles, epilogues, panel, panels);
    }
  }

 private:
  // Lines from the first pixel of a tile to another one. Tiles begin in even rows and columns.
  static int64_t offset(const Map& map, int64_t row, int64_t column) {
    return line_of(map, 0, row, column) - line_of(map, 0, 0, 0);
  }

  WinogradTile tile_at(int64_t index) const {
    const int64_t columns = ceil_div(step_.out_width, kSide);
    const int64_t rows = ceil_div(step_.out_height, kSide);
    const int64_t column = index % columns * kSide, row = index / columns % rows * kSide;
    const int64_t image = index / columns / rows;
    WinogradTile tile{};
    tile.rows = std::min<int64_t>(kSide, step_.out_height - row);
    tile.columns = std::min<int64_t>(kSide, step_.out_width - column);
    tile.top = row - step_.padding_h, tile.left = column - step_.padding_w;
    tile.from = line_of(step_.from, image, row, column);
    tile.to = step_.to.line < 0 ? (image * step_.out_height + row) * step_.out_width + column
                                : line_of(step_.to, image, row, column);
    tile.residual =
        step_.residual.line < 0 ? 0 : line_of(step_.residual, image, row, column);
    return tile;
  }

  // The first tile of a group of up to kRows of `count` tiles, which are about equally many.
  static int64_t first_of(int64_t group, int64_t count) {
    return count * group / ceil_div(count, kRows);
  }

  // The inputs of a tile, all channels.
  RESFAST_F32 void transform(const WinogradTile& tile, float* to) {
    const int64_t pitch = step_.from.pitch;
    const float* corner = from_ +
        (tile.from - step_.padding_h * pitch - step_.padding_w) * kLanes;
    const bool whole = tile.rows == kSide && tile.columns == kSide;
    for (int64_t block = 0; block < step_.blocks; ++block, to += kRows * kLanes) {
      const float* from = corner + block * step_.from.block_lines * kLanes;
      // Those of whole tiles are pixels of the map or of its margins.
      if (whole) transform_block(from, pitch * kLanes, to);
      else transform_block(edge(tile, from), kInputs * kLanes, to);
    }
  }

  RESFAST_F32 void transform_block(const float* from, int64_t row_values, float* to) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v, from += kVector, to += kVector) {
      Vector columns[kInputs][kInputs];
#pragma GCC unroll 6
      for (int j = 0; j < kInputs; ++j) {
        Vector d[kInputs], t[kInputs];
#pragma GCC unroll 6
        for (int i = 0; i < kInputs; ++i) d[i] = load(from + i * row_values + j * kLanes);
        Form::inputs(d, t);
#pragma GCC unroll 6
        for (int i = 0; i < kInputs; ++i) columns[i][j] = t[i];
      }
      float* point = to;
#pragma GCC unroll 6
      for (int i = 0; i < kInputs; ++i) {
        Vector t[kInputs];
        Form::inputs(columns[i], t);
#pragma GCC unroll 6
        for (int j = 0; j < kInputs; ++j, point += input_values_) store(point, t[j]);
      }
    }
  }

  // A copy of a tile's inputs with zeros outside of the map.
  RESFAST_F32 const float* edge(const WinogradTile& tile, const float* from) {
    float* to = edge_;
    for (int64_t i = 0; i < kInputs; ++i)
      for (int64_t j = 0; j < kInputs; ++j, to += kLanes) {
        const int64_t y = tile.top + i, x = tile.left + j;
        const bool inside = y >= 0 && y < step_.height && x >= 0 && x < step_.width;
        const float* pixel = from + (i * step_.from.pitch + j) * kLanes;
        store_line(to, inside ? load_line(pixel) : splat_line(0.0f));
      }
    return edge_;
  }

  // The products of the tiles with some panels at all points.
  void multiply_points(int64_t count, int64_t panel, int64_t panels) {
    static constexpr int32_t kHere = 0;
    const int64_t point_values = step_.blocks * kLanes * kTile;
    static constexpr Pixel kFirst[kRows] = {{0, 0, 0}, {1, 0, 0}, {2, 0, 0},
                                            {3, 0, 0}, {4, 0, 0}, {5, 0, 0}};
    const int64_t group_values = step_.blocks * kRows * kLanes;
    Operand operand{nullptr, kRows * kLanes, step_.blocks, 1, &kHere, nullptr,
                    kPoints * point_values};
    const auto* weights =
        reinterpret_cast<const float*>(memory_.constants + step_.transformed * kLine);
    const int64_t groups = ceil_div(count, kRows);
    for (int64_t point = 0; point < kPoints; ++point)
      for (int64_t j = 0; j < panels; j += kMostPanels) {
        const int64_t some = std::min<int64_t>(kMostPanels, panels - j);
        operand.weights = weights + (panel + j) * operand.panel_values + point * point_values;
        for (int64_t group = 0; group < groups; ++group) {
          operand.from = inputs_ + point * input_values_ + group * group_values;
          float* to = products_ + point * product_values_ + (group * panels + j) * kRows * kTile;
          const int64_t tiles = first_of(group + 1, count) - first_of(group, count);
          multiply(operand, kFirst, tiles, some, to);
        }
      }
  }

  // Writes the results of all tiles.
  RESFAST_F32 void finish_tiles(
      const std::vector<WinogradTile>& tiles, const Epilogue* epilogues, int64_t panel,
      int64_t panels) {
    const int64_t count = static_cast<int64_t>(tiles.size()), groups = ceil_div(count, kRows);
    alignas(kLine) float values[kSide * kSide * kLanes];
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = first_of(group, count), last = first_of(group + 1, count);
      for (int64_t j = 0; j < panels; ++j) {
        const Line bias = load_line(epilogues[j].bias);
        for (int64_t i = first; i < last; ++i) {
          const WinogradTile& tile = tiles[i];
          const float* products =
              products_ + ((group * panels + j) * kRows + i - first) * kTile;
          if (!results(products, values)) {
            again(tile, epilogues[j], panel + j);
            continue;
          }
          for (int64_t row = 0; row < tile.rows; ++row)
            for (int64_t column = 0; column < tile.columns; ++column) {
              const int64_t place = row * kSide + column;
              finish(epilogues[j], bias, load_line(values + place * kLanes), tile.to + to_[place],
                     tile.residual + residual_[place]);
            }
        }
      }
    }
  }

  // Computes values [row][column] of a tile; returns whether all are finite.
  RESFAST_F32_INLINE bool results(const float* products, float* values) {
    Vector zero = splat(0.0f); // NaN where a value is not finite
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v, products += kVector, values += kVector) {
      Vector columns[kSide][kInputs];
#pragma GCC unroll 6
      for (int j = 0; j < kInputs; ++j) {
        Vector m[kInputs], y[kSide];
#pragma GCC unroll 6
        for (int i = 0; i < kInputs; ++i)
          m[i] = load(products + (i * kInputs + j) * product_values_);
        Form::results(m, y);
#pragma GCC unroll 4
        for (int i = 0; i < kSide; ++i) columns[i][j] = y[i];
      }
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i) {
        Vector y[kSide];
        Form::results(columns[i], y);
#pragma GCC unroll 4
        for (int j = 0; j < kSide; ++j) {
          zero = multiply_add(y[j], splat(0.0f), zero);
          store(values + (i * kSide + j) * kLanes, y[j]);
        }
      }
    }
    return !any_nan(zero);
  }

  // The results of a tile without the algorithm.
  void again(const WinogradTile& tile, const Epilogue& epilogue, int64_t panel) const {
    Operand operand = direct_;
    operand.weights += panel * direct_.panel_values;
    const int64_t count = tile.rows * tile.columns;
    for (int64_t first = 0; first < count; first += kRows) {
      Pixel pixels[kRows];
      for (int64_t i = 0; i < kRows; ++i) {
        const int64_t index = std::min(first + i, count - 1);
        const int64_t row = index / tile.columns, column = index % tile.columns;
        const int64_t place = row * kSide + column;
        const int64_t to = first + i < count ? tile.to + to_[place] : -1;
        pixels[i] = {static_cast<int32_t>(tile.from + row * step_.from.pitch + column),
                     static_cast<int32_t>(to),
                     static_cast<int32_t>(tile.residual + residual_[place])};
      }
      conv_tile(operand, &epilogue, pixels, 1);
    }
  }

  const Step& step_;
  const Memory& memory_;
  const int64_t most_; // tiles
  const int64_t input_values_, product_values_; // from one point to the next
  const float* from_;
  const Operand direct_;
  int64_t to_[kSide * kSide], residual_[kSide * kSide]; // lines from a tile's first pixel
  float *inputs_, *products_, *edge_;
};

template <class Form>
void winograd_by(
    const Step& step, const Memory& memory, int64_t begin, int64_t end, int64_t first_panel,
    int64_t last_panel) {
  Winograd<Form> winograd(step, memory);
  end = std::min(end, images_here(step, memory) * winograd.tiles_of_image());
  for (int64_t first = begin; first < end; first += step.tiles_at_once)
    winograd.run(first, std::min(step.tiles_at_once, end - first), first_panel, last_panel);
}

inline void winograd(
    const Step& step, const Memory& memory, int64_t begin, int64_t end, int64_t first_panel,
    int64_t last_panel) {
  const auto run = step.side == 4 ? winograd_by<Form4> : winograd_by<Form2>;
  run(step, memory, begin, end, first_panel, last_panel);
}

} // namespace
} // namespace resfast::network::RESFAST_F32_NAMESPACE
