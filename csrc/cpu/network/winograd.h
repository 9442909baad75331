// 3x3 convolutions with stride 1 by Winograd's F(2x2, 3x3) (Lavin and Gray, arXiv:1509.09308), on lines
// of bfloat16 with AVX512-BF16.
//
// Some squares of 2x2 results at a time: the inputs of each are transformed to 16 points, at each point
// the squares are multiplied with the panels of weights, and the products are transformed back. Inputs
// and weights are rounded to bfloat16 at the points.
//
// Weights: [panel of 16 outputs][point][block of 32 channels][pair][output][2], the even channels of a
// block before the odd ones.
//
// NaN and infinity spread over a square, and so does what overflows in a transform. They also reach the
// results before the activation, so a square where one is not finite is computed again without it.
#pragma once

#include <vector>

#include "lines.h"

namespace resfast::network {

// A square of the result, and the lines of its first pixel.
struct Square {
  int64_t rows, columns; // results that there are
  int64_t from, to, residual;
  int64_t top, left; // of the inputs
};

// A step with the buffers of a thread: lines of transformed inputs [point][group of 16 squares][block]
// [square of the group], and sums [point][group][panel of a line][square][output].
class Winograd {
 public:
  static constexpr int64_t kSide = 2, kInputs = 4, kPoints = 16;

  Winograd(const Step& step, const Memory& memory)
      : step_(step), memory_(memory), most_(round_up(step.tiles_at_once, kTile)),
        // Points are not a multiple of 4096 bytes apart, which would map to the same cache sets.
        input_values_((step.blocks * most_ + 1) * kBlock),
        product_values_((2 * most_ + 1) * kTile),
        column_values_(step.from.group * kBlock),
        row_values_(step.from.pitch * column_values_),
        direct_(operand_of(step, memory)) {
    for (int64_t i = 0; i < kSide * kSide; ++i) {
      const int64_t row = i / kSide, column = i % kSide;
      to_[i] = step.to.line < 0 ? row * step.out_width + column : offset(step.to, row, column);
      residual_[i] = step.residual.line < 0 ? 0 : offset(step.residual, row, column);
      from_[i] = offset(step.from, row, column);
    }
    thread_local LargeWorkspace workspace;
    products_ = workspace.get(
        kPoints * product_values_ + (kPoints * input_values_ + kPoints * kBlock) / 2);
    inputs_ = reinterpret_cast<uint16_t*>(products_ + kPoints * product_values_);
    edge_ = inputs_ + kPoints * input_values_;
  }

  int64_t squares_of_image() const {
    return ceil_div(step_.out_height, kSide) * ceil_div(step_.out_width, kSide);
  }

  // Squares from `first` on, at most tiles_at_once, and panels, of which the first is even.
  void run(int64_t first, int64_t count, int64_t first_panel, int64_t last_panel) {
    thread_local std::vector<Square> squares;
    squares.clear();
    for (int64_t i = 0; i < count; ++i) squares.push_back(square_at(first + i));
    for (int64_t block = 0; block < step_.blocks; ++block) transform(squares, block);
    for (int64_t panel = first_panel; panel < last_panel; panel += 2) {
      const int64_t panels = std::min<int64_t>(2, last_panel - panel);
      multiply_points(count, panel, panels);
      const LineEpilogue epilogue = line_epilogue_of(step_, memory_, panel);
      with_activation(step_.activation, [&](auto activation) {
        epilogue.residual ? finish<true, activation.value>(squares, epilogue, panel, panels)
                          : finish<false, activation.value>(squares, epilogue, panel, panels);
      });
    }
  }

 private:
  // Lines from the first pixel of a square to another one. Squares begin in even rows and columns.
  static int64_t offset(const Map& map, int64_t row, int64_t column) {
    return line_of(map, 0, row, column) - line_of(map, 0, 0, 0);
  }

  Square square_at(int64_t index) const {
    const int64_t columns = ceil_div(step_.out_width, kSide);
    const int64_t rows = ceil_div(step_.out_height, kSide);
    const int64_t column = index % columns * kSide, row = index / columns % rows * kSide;
    const int64_t image = index / columns / rows;
    Square square{};
    square.rows = std::min(kSide, step_.out_height - row);
    square.columns = std::min(kSide, step_.out_width - column);
    square.top = row - step_.padding_h, square.left = column - step_.padding_w;
    square.from = line_of(step_.from, image, row, column);
    square.to = step_.to.line < 0 ? (image * step_.out_height + row) * step_.out_width + column
                                  : line_of(step_.to, image, row, column);
    square.residual =
        step_.residual.line < 0 ? 0 : line_of(step_.residual, image, row, column);
    return square;
  }

  // The inputs of all squares, for a block of channels.
  RESFAST_BF16 void transform(const std::vector<Square>& squares, int64_t block) {
    const uint16_t* map = reinterpret_cast<const uint16_t*>(
        memory_.line(step_.from.line + block * step_.from.block_lines));
    const int64_t corner = step_.padding_h * row_values_ + step_.padding_w * column_values_;
    // Inputs after the first transform, even and odd channels. Those of the last two columns are the
    // first two of the next square.
    __m512 even[kInputs][kInputs], odd[kInputs][kInputs];
    int64_t next = -1; // the square that follows
    for (int64_t index = 0; index < static_cast<int64_t>(squares.size()); ++index) {
      const Square& square = squares[index];
      const int64_t group = index / kTile, place = index % kTile;
      uint16_t* to = inputs_ + ((group * step_.blocks + block) * kTile + place) * kBlock;
      const uint16_t* from = map + square.from * kBlock - corner;
      if (square.rows == kSide && square.columns == kSide) {
        // Pixels of the map or of its margins.
        if (square.from == next) {
#pragma GCC unroll 4
          for (int i = 0; i < kInputs; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < kSide; ++j)
              even[i][j] = even[i][kSide + j], odd[i][j] = odd[i][kSide + j];
          columns_of<kSide>(from, row_values_, column_values_, even, odd);
        } else {
          columns_of<0>(from, row_values_, column_values_, even, odd);
        }
        next = square.from + kSide * step_.from.group;
      } else {
        columns_of<0>(edge(square, from), kInputs * kBlock, kBlock, even, odd);
        next = -1;
      }
      points_of(even, odd, to);
    }
  }

  // The transform of the columns from kFirst on.
  template <int kFirst>
  RESFAST_BF16_INLINE static void columns_of(
      const uint16_t* from, int64_t row_values, int64_t column_values, __m512 (*even)[kInputs],
      __m512 (*odd)[kInputs]) {
    const __m512i upper = _mm512_set1_epi32(-0x10000);
#pragma GCC unroll 4
    for (int j = kFirst; j < kInputs; ++j) {
      __m512 a[kInputs], b[kInputs];
#pragma GCC unroll 4
      for (int i = 0; i < kInputs; ++i) {
        const __m512i line = _mm512_loadu_si512(from + i * row_values + j * column_values);
        a[i] = _mm512_castsi512_ps(_mm512_slli_epi32(line, 16));
        b[i] = _mm512_castsi512_ps(_mm512_and_si512(line, upper));
      }
      even[0][j] = a[0] - a[2], even[1][j] = a[1] + a[2];
      even[2][j] = a[2] - a[1], even[3][j] = a[1] - a[3];
      odd[0][j] = b[0] - b[2], odd[1][j] = b[1] + b[2];
      odd[2][j] = b[2] - b[1], odd[3][j] = b[1] - b[3];
    }
  }

  // The transform of the rows, rounded.
  RESFAST_BF16_INLINE void points_of(
      const __m512 (*even)[kInputs], const __m512 (*odd)[kInputs], uint16_t* to) const {
#pragma GCC unroll 4
    for (int i = 0; i < kInputs; ++i) {
      const __m512 *a = even[i], *b = odd[i];
      const __m512 first[kInputs] = {a[0] - a[2], a[1] + a[2], a[2] - a[1], a[1] - a[3]};
      const __m512 second[kInputs] = {b[0] - b[2], b[1] + b[2], b[2] - b[1], b[1] - b[3]};
#pragma GCC unroll 4
      for (int j = 0; j < kInputs; ++j, to += input_values_)
        _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second[j], first[j]));
    }
  }

  // A copy of a square's inputs with zeros outside of the map.
  RESFAST_BF16 const uint16_t* edge(const Square& square, const uint16_t* from) {
    uint16_t* to = edge_;
    for (int64_t i = 0; i < kInputs; ++i)
      for (int64_t j = 0; j < kInputs; ++j, to += kBlock) {
        const int64_t y = square.top + i, x = square.left + j;
        const bool inside = y >= 0 && y < step_.height && x >= 0 && x < step_.width;
        const __m512i zero = _mm512_setzero_si512();
        _mm512_store_si512(
            to, inside ? _mm512_load_si512(from + i * row_values_ + j * column_values_) : zero);
      }
    return edge_;
  }

  // The products of the squares with the panels of a line at all points.
  void multiply_points(int64_t count, int64_t panel, int64_t panels) {
    static constexpr int32_t kHere = 0;
    static constexpr Tile kFirst{0, 0, 0, -1};
    const int64_t point_values = step_.blocks * kWeights;
    const auto* weights =
        reinterpret_cast<const uint16_t*>(memory_.constants + step_.transformed * kLine);
    Operand operand{nullptr, kTile * kBlock, step_.blocks, 1, &kHere, nullptr, step_.blocks, 0};
    for (int64_t point = 0; point < kPoints; ++point)
      for (int64_t half = 0; half < panels; ++half) {
        operand.weights = weights + ((panel + half) * kPoints + point) * point_values;
        for (int64_t group = 0; group < ceil_div(count, kTile); ++group) {
          operand.from = inputs_ + point * input_values_ + group * step_.blocks * kTile * kBlock;
          multiply_avx512(
              operand, kFirst, products_ + point * product_values_ + (2 * group + half) * kSums);
        }
      }
  }

  // The results [row][column] of a square from its products; returns whether all are finite.
  RESFAST_BF16_INLINE bool results(const float* products, __m512 (*y)[kSide]) const {
    __m512 rows[kSide][kInputs];
#pragma GCC unroll 4
    for (int j = 0; j < kInputs; ++j) {
      __m512 m[kInputs];
#pragma GCC unroll 4
      for (int i = 0; i < kInputs; ++i)
        m[i] = _mm512_load_ps(products + (i * kInputs + j) * product_values_);
      rows[0][j] = m[0] + m[1] + m[2], rows[1][j] = m[1] - m[2] - m[3];
    }
    __m512 zero = _mm512_setzero_ps(); // NaN where a value is not finite
#pragma GCC unroll 2
    for (int i = 0; i < kSide; ++i) {
      const __m512* m = rows[i];
      y[i][0] = m[0] + m[1] + m[2], y[i][1] = m[1] - m[2] - m[3];
      zero = _mm512_fmadd_ps(y[i][0], _mm512_setzero_ps(), zero);
      zero = _mm512_fmadd_ps(y[i][1], _mm512_setzero_ps(), zero);
    }
    return _mm512_cmp_ps_mask(zero, zero, _CMP_UNORD_Q) == 0;
  }

  template <bool kResidual, int64_t kActivation>
  RESFAST_BF16 void finish(
      const std::vector<Square>& squares, const LineEpilogue& e, int64_t panel, int64_t panels) {
    for (int64_t index = 0; index < static_cast<int64_t>(squares.size()); ++index) {
      const Square& square = squares[index];
      const float* products =
          products_ + index / kTile * 2 * kSums + index % kTile * kTile;
      __m512 low[kSide][kSide], high[kSide][kSide];
      bool finite = results(products, low);
      if (panels == 2) {
        finite &= results(products + kSums, high);
      } else {
#pragma GCC unroll 2
        for (int i = 0; i < kSide; ++i)
#pragma GCC unroll 2
          for (int j = 0; j < kSide; ++j) high[i][j] = _mm512_setzero_ps();
      }
#pragma GCC unroll 2
      for (int i = 0; i < kSide; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < kSide; ++j) {
          if (i >= square.rows || j >= square.columns) continue;
          const int64_t place = i * kSide + j;
          const int64_t to = square.to + to_[place], residual = square.residual + residual_[place];
          if (to >= e.last) continue;
          if (!finite) again<kResidual, kActivation>(
              e, square.from + from_[place], panel, panels, to, residual);
          else finish_values<kResidual, kActivation>(e, low[i][j], high[i][j], to, residual);
        }
    }
  }

  // The result of a pixel without the algorithm.
  template <bool kResidual, int64_t kActivation>
  RESFAST_BF16 __attribute__((noinline)) void again(
      const LineEpilogue& e, int64_t from, int64_t panel, int64_t panels, int64_t to,
      int64_t residual) const {
    alignas(kLine) float sums[2 * kSums] = {};
    const Tile tile{static_cast<int32_t>(from), 0, 0, -1};
    for (int64_t half = 0; half < panels; ++half) {
      Operand operand = direct_;
      operand.weights = weights_of(step_, memory_) +
          (panel + half) * step_.blocks * step_.tap_count * kWeights;
      multiply_avx512(operand, tile, sums + half * kSums);
    }
    finish_line<kResidual, kActivation>(e, sums, to, residual);
  }

  const Step& step_;
  const Memory& memory_;
  const int64_t most_; // squares
  const int64_t input_values_, product_values_; // from one point to the next
  const int64_t column_values_, row_values_; // from one pixel of the inputs to the next
  const Operand direct_;
  int64_t from_[kSide * kSide], to_[kSide * kSide], residual_[kSide * kSide]; // lines
  float* products_;
  uint16_t *inputs_, *edge_;
};

inline void winograd(
    const Step& step, const Memory& memory, int64_t begin, int64_t end, int64_t first_panel,
    int64_t last_panel) {
  Winograd part(step, memory);
  const int64_t images = std::min(step.images, memory.images - step.first_image);
  end = std::min(end, images * part.squares_of_image());
  for (int64_t first = begin; first < end; first += step.tiles_at_once)
    part.run(first, std::min(step.tiles_at_once, end - first), first_panel, last_panel);
}

} // namespace resfast::network
