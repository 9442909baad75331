// A plan of a network, or of a part of one, as resfast/ops/network/plan.py writes it: a header and
// steps of int64, tables of int32, constants, and an arena that holds what goes from step to step.
//
// Maps in the arena are lines of 64 bytes: a block of channels of one pixel of one image, 32 of bfloat16
// or 16 of float32. The lines of a block follow each other, so that a tile of 16 of them is read
// without gaps:
//
//   [block of channels][group of images][phase][row][column][image of the group]
//
// A row ends with columns of zeros, and a plane with rows of zeros, which are the padding on both
// sides. A map that is read with stride 2 is stored as its four phases: even and odd rows and columns.
#pragma once

#include <cstdint>

namespace resfast::network {

constexpr int64_t kLine = 64; // bytes
constexpr int64_t kBlock = 32; // channels of bfloat16 in a line
constexpr int64_t kTile = 16; // lines of bfloat16 that are multiplied together; outputs in a panel
constexpr int64_t kRows = 6; // pixels of float32 that are multiplied together
constexpr int64_t kMagic = 0x7265736e6574'0005;

enum Kind : int64_t {
  kConv, kPatches, kEnter, kMaxPool, kMean, kHead, kWinograd, kDepthwise, kPointwise, kAveragePool,
  kGathered
};

struct Header {
  int64_t magic;
  int64_t steps;
  int64_t together; // 1: threads share the steps of one item; 0: each takes whole items
  int64_t tasks; // of an item, where threads share it
  int64_t images; // of an item
  int64_t arena_lines; // of an item
  int64_t channels, height, width; // of the input
  int64_t out_channels, out_height, out_width; // of the result
  int64_t head; // channels that a linear layer at the end reads; 0: none, the result is a map
  int64_t wide; // 1: lines of float32, 0: of bfloat16
  int64_t wide_result; // likewise, of a map
};

// Where the lines of a map are.
struct Map {
  int64_t line; // its first one in the arena, -1 for the plan's own input or result
  int64_t block_lines; // from one block of channels to the next
  int64_t lead; // lines of zeros before the first group
  int64_t group; // images
  int64_t pitch, rows; // of a plane, margins included: columns, rows
  int64_t phases; // in each direction
};

struct Step {
  int64_t kind;
  int64_t first_task, tile_parts, panel_parts; // how threads share it
  Map from, to, residual, gate; // line -1 of the last two: none
  int64_t blocks; // of channels of `from`
  int64_t outputs; // channels of `to`
  int64_t tiles, tile_count, tiles_at_once; // first in the tables; how many; that share the caches
  int64_t taps, tap_count; // first in the tables
  int64_t weights, bias; // lines in the constants; of kPointwise: scale (-1: none) and shift
  int64_t activation, negative_slope; // as in conv_bf16.h; the bits of a float
  int64_t images, first_image; // of the item
  int64_t channels, height, width, out_height, out_width; // of `from` and `to`
  int64_t kernel_h, kernel_w, stride, padding_h, padding_w;
  int64_t side, transformed; // of kWinograd: results of a tile in each direction; lines of weights
  int64_t one_gate; // of kPointwise: the gate is one pixel for a whole image
  int64_t part, lane; // 1: lanes of `to` before and after belong to others; the first lane
};

// A tile of bfloat16 in the tables: the lines of its first row, from the start of each map. Where the rows of the
// result do not follow each other, or some are outside of the map, `rows` is the place in the tables
// of 16 pairs: the lines of result (-1: outside) and residual.
struct Tile {
  int32_t from, to, residual, rows;
};

// A pixel in the tables, of tiles of kRows pixels of float32 or of kGathered: its lines, from the start of each map;
// `to` is -1 where a tile is not full.
struct Pixel {
  int32_t from, to, residual;
};

} // namespace resfast::network
