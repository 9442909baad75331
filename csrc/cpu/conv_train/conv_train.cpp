// Winograd training, in addition to conv_winograd.cpp, which computes the result and the input
// gradient: packing of the weight, once per step, and the weight gradient,
//
//   dw = G^T [ sum over tiles of (A dy A^T) (B^T d B) ] G,
//
// one matrix product over the tiles for each point, with the transposed output transforms.

#if defined(__x86_64__)

#include <type_traits>

#include "../conv/weight_lanes.h"
#include "../conv/winograd.h"

namespace resfast {
namespace {

// -- the weight ------------------------------------------------------------------------------------

// G g G^T of one channel's kernels, for 16 outputs.
template <class Form, class Lanes>
RESFAST_BF16 void transform_weight(
    const Lanes& from, int64_t output, int64_t channel, __m512* points) {
  constexpr int kSide = Form::kSide;
  __m512 columns[kSide][3];
  for (int j = 0; j < 3; ++j) {
    __m512 g[3], u[kSide];
    for (int i = 0; i < 3; ++i) g[i] = from.load(output, channel, 3 * i + j);
    Form::kernel(g, u);
    for (int i = 0; i < kSide; ++i) columns[i][j] = u[i];
  }
  for (int i = 0; i < kSide; ++i) Form::kernel(columns[i], points + kSide * i);
}

template <class Form, class Lanes>
RESFAST_BF16 void pack_pair(
    const Lanes& from, int64_t output, int64_t pair, int64_t channels, uint16_t* to,
    int64_t point_stride) {
  __m512 even[kPoints<Form>], odd[kPoints<Form>];
  transform_weight<Form>(from, output, channel_of(2 * pair, channels), even);
  const bool both = 2 * pair + 1 < channels;
  if (both) transform_weight<Form>(from, output, channel_of(2 * pair + 1, channels), odd);
  for (int point = 0; point < kPoints<Form>; ++point) {
    __m512i value = words(even[point]);
    if (both) value = _mm512_or_si512(value, _mm512_slli_epi32(words(odd[point]), 16));
    _mm512_storeu_si512(to + point * point_stride, value);
  }
}

template <class Form, class Lanes>
Tensor pack(const Weight& weight) {
  const Lanes shape{weight};
  const int64_t outputs = shape.outputs(), channels = shape.channels();
  const int64_t pairs = ceil_div(channels, 2), blocks = ceil_div(outputs, kLanes);
  constexpr int64_t kPairs = PlainLanes::kGroup / 2;
  Tensor packed =
      torch::stable::empty({winograd_size<Form>(outputs, channels)}, ScalarType::BFloat16);
  auto* to = static_cast<uint16_t*>(packed.mutable_data_ptr());
  share_all(pairs, kPairs, [&](int64_t begin, int64_t end) {
    Lanes from{weight};
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t output = block * kLanes, panel = output / kPanel;
      const int64_t width = panel_blocks(outputs, panel) * kLanes;
      uint16_t* base = to + panel_start<Form>(panel, pairs) + output % kPanel * 2;
      for (int64_t pair = begin; pair < end; ++pair) {
        if (pair == begin || pair % kPairs == 0) from.go_to(output, pair / kPairs);
        pack_pair<Form>(
            from, output, pair, channels, base + pair * width * 2, point_size(width, pairs));
      }
    }
  });
  return packed;
}

Tensor conv_train_pack(const Tensor& weight, int64_t stride, bool transposed, int64_t tile) {
  if (!bf16_supported()) fail("this processor has no AVX512-BF16");
  check_tile(tile, stride);
  const Weight from = check_train_weight(weight);
  return with_form(tile, stride, [&](auto form) {
    using Form = decltype(form);
    return transposed ? pack<Form, TransposedLanes>(from) : pack<Form, PlainLanes>(from);
  });
}

// -- the weight gradient ---------------------------------------------------------------------------

// Bytes of a chunk of tiles at all points: at least what fits L2 per thread, at most what fits L3.
// In between it is twice the size of the sums, which every chunk reads and writes.
constexpr int64_t kLeastBytes = 512 * 1024, kMostBytes = 20 * 1024 * 1024;
constexpr int64_t kLeastChunk = 128, kMostChunk = 8192; // tiles

// Tiles are distributed over lanes with their own sums, which are added at the end: a thread with
// its own lanes reads nothing that another thread wrote, which is slow between cores that share no
// cache. The number of lanes depends only on the shape, so results do not depend on the number of
// threads.
constexpr int64_t kMostLanes = 8, kLeastLane = 512; // lanes; tiles per lane
constexpr int64_t kLaneSumsBytes = 16 * 1024 * 1024, kLaneBytes = 5 * 1024 * 1024; // of all lanes

inline int64_t count_lanes(int64_t tiles, int64_t sums_bytes) {
  const int64_t most = std::min({kMostLanes, tiles / kLeastLane, kLaneSumsBytes / sums_bytes});
  int64_t lanes = 1;
  while (2 * lanes <= most) lanes *= 2;
  return lanes;
}

constexpr int64_t kGathered = 16; // tiles (even) transformed channel by channel

// Two tiles make a pair: [tiles / 2][channels][2]. The even one comes first.
struct Operand {
  uint16_t* values; // [point][tiles / 2][width][2]
  int64_t width, point_stride;
};

// Writes 16 channels of consecutive tiles, row by row of their points. The values of an even tile
// wait for those of the odd one.
template <class Form>
struct PairStore {
  static constexpr int kSide = Form::kSide;
  const Operand& to;
  __m512 waiting[kPoints<Form>];

  RESFAST_BF16_INLINE void row(int64_t channel, int64_t tile, int row, const __m512* values) {
#pragma GCC unroll 6
    for (int i = 0; i < kSide; ++i) {
      const int point = kSide * row + i;
      if (tile % 2) {
        write(channel, tile, point, waiting[point], values[i]);
      } else {
        waiting[point] = values[i];
        __builtin_prefetch(place(channel, tile, point), 1);
      }
    }
  }
  // For an even tile without a successor.
  RESFAST_BF16 void alone(int64_t channel, int64_t tile) {
    for (int point = 0; point < kPoints<Form>; ++point)
      write(channel, tile, point, waiting[point], _mm512_setzero_ps());
  }

 private:
  RESFAST_BF16_INLINE uint16_t* place(int64_t channel, int64_t tile, int point) const {
    return to.values + point * to.point_stride + (tile / 2 * to.width + channel) * 2;
  }
  RESFAST_BF16_INLINE void write(
      int64_t channel, int64_t tile, int point, __m512 even, __m512 odd) const {
    alignas(64) static constexpr uint16_t kOrder[2 * kLanes] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    _mm512_storeu_si512(
        place(channel, tile, point),
        _mm512_permutexvar_epi16(
            _mm512_load_si512(kOrder), (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
  }
};

// B^T d B of the input's tiles [begin, end) of the chunk; `begin` is even.
template <class Form>
RESFAST_BF16 void gather_inputs(
    const ConvShape& shape, const Tiles& tiles, int64_t first, int64_t begin, int64_t end,
    const Operand& to) {
  PairStore<Form> store{to, {}};
  for (int64_t block = begin; block < end; block += kGathered) {
    const int64_t count = std::min(kGathered, end - block), next = block + count;
    Prefetch<false> following(
        input_squares<Form>(shape), tiles, first + next, std::min(kGathered, end - next));
    const int64_t lines = ceil_div(following.lines(), count * (to.width / kLanes));
    for (int64_t channel = 0; channel < to.width; channel += kLanes) {
      transform_tiles<Form, Channels::kRest>(
          shape, tiles, first + block, count, channel,
          [&](int64_t i, int row, const __m512* values) RESFAST_BF16 {
            if (row == 0) following.bring(lines);
            store.row(channel, block + i, row, values);
          });
      if (next % 2) store.alone(channel, next - 1);
    }
  }
}

// A dy A^T of the tiles [begin, end) of the chunk; `begin` is even.
template <class Form>
RESFAST_BF16 void gather_gradients(
    const ConvShape& shape, const Tiles& tiles, int64_t first, int64_t begin, int64_t end,
    const uint16_t* grad, const Operand& to) {
  constexpr int kSide = Form::kSide, kResults = Form::kResults;
  PairStore<Form> store{to, {}};
  TileAt pair(tiles, first + begin);
  Prefetch<false> following(
      {grad, shape.rows, shape.columns, shape.outputs, 0, shape.outputs, kResults}, tiles,
      first + begin, end - begin);
  const int64_t groups = to.width / kLanes;
  const int64_t lines = ceil_div(following.lines(), ceil_div(end - begin, 2) * groups);
  following.bring(2 * groups * lines); // two pairs ahead
  for (int64_t even = begin; even < end; even += 2) {
    TileAt at = pair;
    for (int64_t output = 0; output < to.width; output += kLanes) {
      const __mmask16 mask = lane_mask(shape.outputs - output);
      at.move_to(pair);
      following.bring(lines);
      for (int64_t tile = even; tile < std::min(even + 2, end); ++tile, at.next()) {
        const uint16_t* source = grad + output +
            ((at.image * shape.rows + at.row) * shape.columns + at.column) * shape.outputs;
        __m512 t[kSide][kResults];
#pragma GCC unroll 4
        for (int j = 0; j < kResults; ++j) {
          __m512 y[kResults], transformed[kSide];
#pragma GCC unroll 4
          for (int i = 0; i < kResults; ++i)
            y[i] = load_bf16(
                at.row + i < shape.rows && at.column + j < shape.columns ? mask : __mmask16{0},
                source + (i * shape.columns + j) * shape.outputs);
          Form::gradients(y, transformed);
#pragma GCC unroll 6
          for (int i = 0; i < kSide; ++i) t[i][j] = transformed[i];
        }
#pragma GCC unroll 6
        for (int i = 0; i < kSide; ++i) {
          __m512 row[kSide];
          Form::gradients(t[i], row);
          store.row(output, tile, i, row);
        }
      }
      if (even + 1 == end) store.alone(output, even);
    }
    pair.move_to(at);
  }
}

// sums[output][channel] (+)= over pairs of tiles, for a panel of up to 64 channels.
template <int Rows, int Blocks>
RESFAST_BF16 void multiply_rows(
    const Operand& grads, const Operand& inputs, const uint16_t* grad, const uint16_t* input,
    int64_t& row, int64_t rows, int64_t pairs, float* sums, bool add) {
  for (; row + Rows <= rows; row += Rows)
    product_tile<Rows, Blocks>(
        grad + 2 * row, 2, 2 * grads.width, input, 2 * inputs.width, pairs,
        sums + row * inputs.width, inputs.width, add);
}

template <int Blocks>
RESFAST_BF16 void multiply(
    const Operand& grads, const Operand& inputs, int64_t point, int64_t channel, int64_t rows,
    int64_t pairs, float* sums, bool add) {
  constexpr int kTall = Blocks > 2 ? 6 : 12;
  for (int64_t first = 0; first < pairs; first += kPairBlock) {
    const int64_t count = std::min(kPairBlock, pairs - first);
    const uint16_t* grad = grads.values + point * grads.point_stride + first * 2 * grads.width;
    const uint16_t* input =
        inputs.values + point * inputs.point_stride + (first * inputs.width + channel) * 2;
    int64_t row = 0;
    multiply_rows<kTall, Blocks>(grads, inputs, grad, input, row, rows, count, sums, add || first);
    multiply_rows<2, Blocks>(grads, inputs, grad, input, row, rows, count, sums, add || first);
    multiply_rows<1, Blocks>(grads, inputs, grad, input, row, rows, count, sums, add || first);
  }
}

// sums[point][output][channel] of each lane.
struct Sums {
  float* values;
  int64_t width, point_stride, lane_stride, lanes;
};

// dw [K, 3, 3, C] = G^T sums G, for some outputs.
template <class Form, bool kSeveralLanes>
RESFAST_BF16 void transform_sums(
    const ConvShape& shape, const Sums& sums, int64_t begin, int64_t end, float* to) {
  constexpr int kSide = Form::kSide;
  for (int64_t output = begin; output < end; ++output)
    for (int64_t channel = 0; channel < shape.channels; channel += kLanes) {
      const __mmask16 mask = lane_mask(shape.channels - channel);
      const float* from = sums.values + output * sums.width + channel;
      __m512 half[3][kSide];
#pragma GCC unroll 6
      for (int j = 0; j < kSide; ++j) {
        __m512 u[kSide], g[3];
#pragma GCC unroll 6
        for (int i = 0; i < kSide; ++i) {
          const float* point = from + (kSide * i + j) * sums.point_stride;
          u[i] = _mm512_load_ps(point);
          for (int64_t lane = 1; kSeveralLanes && lane < sums.lanes; ++lane)
            u[i] += _mm512_load_ps(point + lane * sums.lane_stride);
        }
        Form::kernel_gradient(u, g);
        for (int i = 0; i < 3; ++i) half[i][j] = g[i];
      }
      for (int i = 0; i < 3; ++i) {
        __m512 g[3];
        Form::kernel_gradient(half[i], g);
        for (int j = 0; j < 3; ++j)
          _mm512_mask_storeu_ps(
              to + ((output * 3 + i) * 3 + j) * shape.channels + channel, mask, g[j]);
      }
    }
}

// Adds tiles [begin, end) to the sums; `begin` is even. `share(count, unit, part)` calls
// part(first, last) for all of `count`, on one or more threads.
template <class Form, class Share>
void add_tiles(
    const ConvShape& shape, const Tiles& tiles, int64_t begin, int64_t end, const uint16_t* grad,
    const Sums& sums, float* to, int64_t bytes, Share share) {
  const int64_t rows = round_up(shape.outputs, kLanes);
  const int64_t per_tile = kPoints<Form> * 2 * (sums.width + rows); // bytes
  // Tiles are added in order, so the result does not depend on the chunks.
  const int64_t most = std::min(std::clamp(bytes / per_tile, kLeastChunk, kMostChunk), end - begin);
  const int64_t chunk = round_up(most, 2);
  thread_local Workspace<uint16_t> inputs_memory, grads_memory;
  // Not a multiple of 4096 bytes apart, as in conv_winograd.cpp.
  auto operand = [&](Workspace<uint16_t>& memory, int64_t size) {
    const int64_t point_stride = chunk * size + 2 * kLanes;
    return Operand{memory.get(kPoints<Form> * point_stride), size, point_stride};
  };
  const Operand inputs = operand(inputs_memory, sums.width), grads = operand(grads_memory, rows);
  for (int64_t first = begin; first < end; first += chunk) {
    const int64_t count = std::min(chunk, end - first), pairs = ceil_div(count, 2);
    share(pairs, kGathered / 2, [&](int64_t from, int64_t until) {
      const int64_t last = std::min(count, 2 * until);
      gather_inputs<Form>(shape, tiles, first, 2 * from, last, inputs);
      gather_gradients<Form>(shape, tiles, first, 2 * from, last, grad, grads);
    });
    const int64_t panels = ceil_div(sums.width, kPanel);
    share(kPoints<Form> * panels, 1, [&](int64_t from, int64_t until) {
      for (int64_t part = from; part < until; ++part) {
        const int64_t point = part / panels, channel = part % panels * kPanel;
        float* out = to + point * sums.point_stride + channel;
        auto run = [&](auto blocks) {
          multiply<decltype(blocks)::value>(
              grads, inputs, point, channel, shape.outputs, pairs, out, first > begin);
        };
        switch (panel_blocks(sums.width, channel / kPanel)) {
          case 1: run(std::integral_constant<int, 1>{}); break;
          case 2: run(std::integral_constant<int, 2>{}); break;
          case 3: run(std::integral_constant<int, 3>{}); break;
          default: run(std::integral_constant<int, 4>{});
        }
      }
    });
  }
}

template <class Form>
void weight_gradient(const ConvShape& shape, const uint16_t* grad, float* to) {
  const Tiles tiles(shape, Form::kResults);
  const int64_t threads = torch::stable::get_num_threads();
  Sums sums{};
  sums.width = round_up(shape.channels, kLanes);
  sums.point_stride = shape.outputs * sums.width + kLanes;
  sums.lane_stride = kPoints<Form> * sums.point_stride;
  const int64_t sums_bytes = sums.lane_stride * int64_t{sizeof(float)};
  sums.lanes = count_lanes(tiles.count, sums_bytes);
  thread_local Workspace<float> memory;
  sums.values = memory.get(sums.lanes * sums.lane_stride);
  const int64_t lane_tiles = round_up(ceil_div(tiles.count, sums.lanes), 2);
  const int64_t together = sums.lanes < threads ? threads : 1; // threads per lane
  const int64_t least = std::min(kLeastBytes * together, kMostBytes);
  const int64_t most = sums.lanes == 1 ? kMostBytes : kLaneBytes * together / threads;
  const int64_t bytes = std::clamp(2 * sums_bytes, least, std::max(least, most));
  deal_lanes(sums.lanes, [&](int64_t lane, auto share) {
    add_tiles<Form>(
        shape, tiles, lane * lane_tiles, std::min(tiles.count, (lane + 1) * lane_tiles), grad, sums,
        sums.values + lane * sums.lane_stride, bytes, share);
  });
  share_all(shape.outputs, [&](int64_t begin, int64_t end) {
    if (sums.lanes == 1) transform_sums<Form, false>(shape, sums, begin, end, to);
    else transform_sums<Form, true>(shape, sums, begin, end, to);
  });
}

Tensor conv_train_weight_gradient(
    const Tensor& x, const Tensor& grad, int64_t stride, int64_t padding, int64_t tile) {
  if (!bf16_supported()) fail("this processor has no AVX512-BF16");
  check_tile(tile, stride);
  const ConvShape shape = weight_gradient_shape(x, grad, stride, padding);
  Tensor result = new_weight_gradient(shape);
  with_form(tile, stride, [&](auto form) {
    weight_gradient<decltype(form)>(
        shape, static_cast<const uint16_t*>(grad.const_data_ptr()),
        static_cast<float*>(result.mutable_data_ptr()));
  });
  return result;
}

} // namespace
} // namespace resfast

STABLE_TORCH_LIBRARY_FRAGMENT(resfast, m) {
  m.def("conv_train_pack(Tensor weight, int stride, bool transposed, int tile=2) -> Tensor");
  m.def(
      "conv_train_weight_gradient(Tensor x, Tensor grad, int stride, int padding, int tile=2) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("conv_train_pack", TORCH_BOX(&resfast::conv_train_pack));
  m.impl("conv_train_weight_gradient", TORCH_BOX(&resfast::conv_train_weight_gradient));
}

#endif
