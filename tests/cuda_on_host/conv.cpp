// Runs csrc/cuda/conv/conv.cuh on the host.
//
//   conv CASES OUTPUTS        a case is kHeader int32 followed by x, weight and the optional bias and
//                             residual; outputs are written as raw values. If the tile is -1, x is
//                             the result of another convolution, and only the epilogue runs
//   conv CASES OUTPUTS 132    writes for each case, without data, the number of candidates that a
//                             GPU of 132 multiprocessors has and (tile, splits) of each, as int32
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <vector>

#include "../../csrc/cuda/conv/conv.cuh"

namespace resfast::conv {
namespace {

enum Field {
  kType, kTile, kSplits, kAligned, kOrder, kActivation, kThousandthsOfSlope, kHasBias, kHasResidual,
  kBatch, kHeight, kWidth, kChannels, kFilters, kKernelH, kKernelW,
  kStrideH, kStrideW, kPaddingH, kPaddingW, kOutHeight, kOutWidth, kHeader
};
using Header = int32_t[kHeader];

// Memory of exactly that many bytes, aligned like CUDA allocations (or deliberately misaligned).
struct Memory {
  explicit Memory(size_t bytes) : data(static_cast<char*>(std::malloc(bytes))) {
    device::require(device::aligned_to(data, 16), "malloc aligns to 16 bytes");
    std::memset(data, 0xFF, bytes);
  }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(data); }
  char* data;
};

template <class Type, int kIndex, bool kVectors>
void run(const Params& params, unsigned order) {
  using Tile = typename TileAt<kIndex>::Type;
  const unsigned tiles =
      static_cast<unsigned>(ceil_div(params.pixels, Tile::kM)) * params.filter_tiles.divisor;
  for (int split = 0; split < params.splits; ++split)
    for (unsigned tile = 0; tile < tiles; ++tile)
      device::run_block(
          tile, static_cast<unsigned>(split), Tile::kThreads, Tile::kSharedBytes, order + tile,
          [&params] { convolve<Type, Tile, kVectors>(params); });
}

template <class Type>
void run_type(const Params& params, int tile, bool aligned, unsigned order) {
  constexpr int kBytes = sizeof(typename Type::Value);
  bool found = tile == kEpilogueOnly;
#define RESFAST_RUN(index, unused)                                               \
  if constexpr (has_tile(index, kBytes, true))                                   \
    if (tile == index && aligned) found = true, run<Type, index, true>(params, order);   \
  if constexpr (has_tile(index, kBytes, false))                                  \
    if (tile == index && !aligned) found = true, run<Type, index, false>(params, order);
  RESFAST_CONV_TILES(RESFAST_RUN)
  device::require(found, "no such tile");
  if (params.splits == 1) return;
  const int64_t items = int64_t{params.pixels} * (params.partial_pitch * kBytes / 16);
  for (int64_t i = 0; i < ceil_div(items, kReduceThreads); ++i)
    device::run_block(
        static_cast<unsigned>(i), 0, kReduceThreads, 16, order,
        [&params] { reduce<Type>(params); });
}

Problem problem_of(const Header& header) {
  return {
      header[kBatch], header[kHeight], header[kWidth], header[kChannels], header[kFilters],
      header[kKernelH], header[kKernelW], header[kStrideH], header[kStrideW], header[kPaddingH],
      header[kPaddingW], header[kOutHeight], header[kOutWidth]};
}

int bytes_of(const Header& header) { return header[kType] < 2 ? 2 : 4; }

void write_candidates(std::ofstream& out, const Header& header, int multiprocessors) {
  std::vector<int32_t> written{0};
  for (const Candidate& one : candidates(
           problem_of(header), bytes_of(header), header[kAligned] != 0, multiprocessors)) {
    ++written[0];
    written.insert(written.end(), {one.tile, one.splits});
  }
  out.write(
      reinterpret_cast<const char*>(written.data()),
      static_cast<std::streamsize>(written.size() * 4));
}

void check_divider() {
  const uint32_t most = (uint32_t{1} << 31) - 1;
  uint32_t state = 1;
  for (int i = 0; i < 200000; ++i) {
    state = state * 1664525 + 1013904223;
    const uint32_t divisor = i < 2000 ? static_cast<uint32_t>(i) + 1 : (state >> (1 + i % 31)) | 1;
    state = state * 1664525 + 1013904223;
    const Divider by(divisor);
    for (uint32_t n : {state >> 1, most, divisor - 1, divisor, most / divisor * divisor,
                       most / divisor * divisor - 1, uint32_t{0}})
      device::require(
          n > most || divide(static_cast<int>(n), by) == static_cast<int>(n / divisor),
          "division by multiplication is wrong");
  }
}

void run_case(std::ifstream& in, std::ofstream& out, const Header& header) {
  const Problem problem = problem_of(header);
  const int bytes = bytes_of(header);
  const size_t filters = static_cast<size_t>(problem.filters);
  const size_t outputs = static_cast<size_t>(problem.pixels()) * filters;
  Memory x(static_cast<size_t>(problem.batch) * problem.height * problem.width *
           problem.channels * bytes);
  Memory weight(filters * static_cast<size_t>(problem.depth()) * bytes);
  Memory bias(filters * 4), residual(outputs * bytes), result(outputs * bytes);
  auto read = [&in](Memory& memory, size_t size) {
    in.read(memory.data, static_cast<std::streamsize>(size));
  };
  read(x, static_cast<size_t>(problem.batch) * problem.height * problem.width *
              problem.channels * bytes);
  read(weight, filters * static_cast<size_t>(problem.depth()) * bytes);
  if (header[kHasBias]) read(bias, filters * 4);
  if (header[kHasResidual]) read(residual, outputs * bytes);
  device::require(static_cast<bool>(in), "the file of cases is truncated");

  Params params = make_params(
      problem, header[kTile], header[kSplits], bytes,
      static_cast<Activation>(header[kActivation]), static_cast<float>(header[kThousandthsOfSlope]) / 1000,
      problem.filters % (16 / bytes) == 0);
  device::require(params.splits == header[kSplits], "as many splits as asked for");
  Memory partial(
      params.splits <= 1
          ? 1
          : size_t{4} * params.splits * params.pixels * params.partial_pitch);
  if (header[kTile] == kEpilogueOnly) std::memcpy(result.data, x.data, outputs * bytes);
  params.x = x.data;
  params.weight = weight.data;
  params.bias = header[kHasBias] ? reinterpret_cast<const float*>(bias.data) : nullptr;
  params.residual = header[kHasResidual] ? residual.data : nullptr;
  params.out = result.data;
  params.partial = params.splits <= 1 ? nullptr : reinterpret_cast<float*>(partial.data);
  const bool aligned = header[kAligned] != 0;
  const unsigned order = static_cast<unsigned>(header[kOrder]);
  switch (header[kType]) {
    case 0: run_type<Bf16>(params, header[kTile], aligned, order); break;
    case 1: run_type<Fp16>(params, header[kTile], aligned, order); break;
    case 2: run_type<Fp32>(params, header[kTile], aligned, order); break;
    case 3: run_type<Tf32>(params, header[kTile], aligned, order); break;
    default: device::broken("no such type");
  }
  out.write(result.data, static_cast<std::streamsize>(outputs * bytes));
}

} // namespace
} // namespace resfast::conv

int main(int count, char** names) {
  using namespace resfast::conv;
  resfast::device::require(count == 3 || count == 4, "usage: conv CASES OUTPUTS [PROCESSORS]");
  check_divider();
  std::ifstream in(names[1], std::ios::binary);
  std::ofstream out(names[2], std::ios::binary);
  Header header;
  while (in.read(reinterpret_cast<char*>(header), sizeof(header))) {
    if (count == 4)
      write_candidates(out, header, std::atoi(names[3]));
    else
      run_case(in, out, header);
  }
  return out.flush() ? 0 : 1;
}
