// Runs csrc/cuda/basic_block/basic_block.cuh on the host.
//
//   basic_block CASES OUTPUTS       a case is kHeader int32 followed by x, weight1, weight2 and the
//                                   optional bias1 and bias2; outputs are written as raw values
//   basic_block CASES OUTPUTS 132 232448 8
//                                   writes for each case, without data, the number of candidates on
//                                   a GPU of 132 multiprocessors with 232448 bytes of shared memory
//                                   for a block and clusters of 8, and (tile, cluster) of each, as
//                                   int32
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <vector>

#include "../../csrc/cuda/basic_block/basic_block.cuh"

namespace resfast::basic_block {
namespace {

enum Field {
  kType, kTile, kCluster, kOrder, kActivation, kSlope, kHasBias, kBatch, kHeight, kWidth, kChannels,
  kShared, kHeader
};
using Header = int32_t[kHeader];

// Memory of exactly that many bytes, aligned like CUDA allocations (or deliberately misaligned).
struct Memory {
  explicit Memory(size_t bytes) : data(static_cast<char*>(std::malloc(bytes))), size(bytes) {
    device::require(device::aligned_to(data, 16), "malloc aligns to 16 bytes");
    std::memset(data, 0xFF, bytes);
  }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(data); }
  void read(std::ifstream& in) { in.read(data, static_cast<std::streamsize>(size)); }
  char* data;
  size_t size;
};

template <class Type>
void run(const Params& params, int tile, int cluster, unsigned order) {
#define RESFAST_RUN(index, unused)                                                              \
  if (tile == index) {                                                                          \
    using Tile = typename TileAt<index>::Type;                                                  \
    const Layout layout(                                                                        \
        params.channels, params.images * params.height * params.width,                          \
        Tile::kStages * Tile::kStageBytes);                                                     \
    for (int i = 0; i < ceil_div(params.batch, params.images); ++i)                             \
      device::run_cluster(                                                                      \
          static_cast<unsigned>(i * cluster), 0, cluster, Tile::kThreads,                       \
          static_cast<size_t>(layout.total), order + static_cast<unsigned>(i),                  \
          [&params] { basic_block<Type, Tile>(params); });                                      \
    return;                                                                                     \
  }
  RESFAST_BLOCK_TILES(RESFAST_RUN)
  device::broken("no such tile");
}

Problem problem_of(const Header& header) {
  return {header[kBatch], header[kHeight], header[kWidth], header[kChannels]};
}

void run_case(std::ifstream& in, std::ofstream& out, const Header& header) {
  const size_t channels = static_cast<size_t>(header[kChannels]);
  const size_t values = static_cast<size_t>(header[kBatch]) * header[kHeight] * header[kWidth] *
                        channels;
  Memory x(values * 2), result(values * 2);
  Memory weight1(channels * channels * 18), weight2(channels * channels * 18);
  Memory bias1(channels * 4), bias2(channels * 4);
  for (Memory* memory : {&x, &weight1, &weight2}) memory->read(in);
  const bool has_bias = header[kHasBias] != 0;
  if (has_bias)
    for (Memory* memory : {&bias1, &bias2}) memory->read(in);
  device::require(static_cast<bool>(in), "the file of cases is truncated");

  Params params{};
  params.x = x.data;
  params.weight[0] = weight1.data;
  params.weight[1] = weight2.data;
  params.bias[0] = has_bias ? reinterpret_cast<const float*>(bias1.data) : nullptr;
  params.bias[1] = has_bias ? reinterpret_cast<const float*>(bias2.data) : nullptr;
  params.out = result.data;
  params.batch = header[kBatch];
  params.height = header[kHeight];
  params.width = header[kWidth];
  params.channels = header[kChannels];
  params.images = images_per_cluster(problem_of(header), header[kTile], header[kShared]);
  params.activation = static_cast<Activation>(header[kActivation]);
  params.negative_slope = static_cast<float>(header[kSlope]) / 1000;
  device::require(params.images > 0, "the tile holds no image");
  device::require(divides(problem_of(header), header[kCluster]), "filters for each block");
  const unsigned order = static_cast<unsigned>(header[kOrder]);
  if (header[kType] == 0)
    run<conv::Bf16>(params, header[kTile], header[kCluster], order);
  else
    run<conv::Fp16>(params, header[kTile], header[kCluster], order);
  out.write(result.data, static_cast<std::streamsize>(result.size));
}

void write_candidates(std::ofstream& out, const Header& header, const Gpu& gpu) {
  std::vector<int32_t> written{0};
  for (const Candidate& one : candidates(problem_of(header), gpu)) {
    ++written[0];
    written.insert(written.end(), {one.tile, one.cluster});
  }
  out.write(
      reinterpret_cast<const char*>(written.data()),
      static_cast<std::streamsize>(written.size() * 4));
}

} // namespace
} // namespace resfast::basic_block

int main(int count, char** names) {
  using namespace resfast::basic_block;
  resfast::device::require(
      count == 3 || count == 6, "usage: basic_block CASES OUTPUTS [PROCESSORS SHARED CLUSTER]");
  std::ifstream in(names[1], std::ios::binary);
  std::ofstream out(names[2], std::ios::binary);
  Header header;
  while (in.read(reinterpret_cast<char*>(header), sizeof(header))) {
    if (count == 6)
      write_candidates(
          out, header, {std::atoi(names[3]), std::atoi(names[4]), std::atoi(names[5])});
    else
      run_case(in, out, header);
  }
  return out.flush() ? 0 : 1;
}
