// The Hopper convolution (csrc/cuda/conv_hopper/hopper.cuh) without a GPU. Tensor maps, coordinates
// and shared memory layouts are those of the kernels; the copy engine is emulated as described in
// the PTX ISA and the driver API ("im2col mode", cuTensorMapEncodeIm2col). wgmma, the epilogue's
// own copies and all synchronization are not run.

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <cuda.h>
#include <cuda_runtime.h>

// What CUTLASS's device code names. A C++ compiler parses that code, and nothing here calls it.
extern const dim3 threadIdx, blockIdx, blockDim, gridDim;
void __syncthreads();
void __threadfence();
void __syncwarp(unsigned = 0xffffffff);
int __dp4a(int, int, int);
unsigned __byte_perm(unsigned, unsigned, unsigned);
struct __half2 __hfma2(struct __half2, struct __half2, struct __half2);
namespace cutlass::arch {
int LaneId();
int SmId();
} // namespace cutlass::arch
#include <cutlass/arch/wmma.h> // left out without a version of nvcc
#define __CUDACC_VER_MAJOR__ 13 // but CUTLASS makes tensor maps only with one
#define __CUDACC_VER_MINOR__ 0

namespace {

// The parameters of a tensor map, in the order of its modes, of which the first is contiguous.
struct TensorMap {
  char* base;
  int rank;
  std::array<int64_t, 5> size, stride; // stride in bytes
  std::array<int64_t, 5> box;          // of a tiled map
  std::array<int64_t, 5> step;         // of an im2col map, between pixels
  std::array<int64_t, 3> lower, upper; // corners of the box of first pixels, W and H
  int64_t channels, pixels;
  bool swizzled;                       // in units of 128 bytes
};

std::vector<TensorMap> maps; // a CUtensorMap holds an index into this

// The requirements of both encoders.
bool acceptable(const TensorMap& map) {
  if (reinterpret_cast<uintptr_t>(map.base) % 16 != 0 || map.base == nullptr) return false;
  for (int i = 0; i < map.rank; ++i)
    if (map.size[i] < 1 || map.size[i] > int64_t{1} << 32) return false;
  for (int i = 1; i < map.rank; ++i)
    if (map.stride[i] % 16 != 0 || map.stride[i] >= int64_t{1} << 40) return false;
  return true;
}

TensorMap described(
    CUtensorMapDataType type, uint32_t rank, void* base, const uint64_t* size,
    const uint64_t* stride, CUtensorMapSwizzle swizzle) {
  TensorMap map{};
  map.base = static_cast<char*>(base);
  map.rank = static_cast<int>(rank);
  map.stride[0] = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  for (uint32_t i = 0; i < rank; ++i) map.size[i] = static_cast<int64_t>(size[i]);
  for (uint32_t i = 1; i < rank; ++i) map.stride[i] = static_cast<int64_t>(stride[i - 1]);
  map.swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  return map;
}

CUresult keep(CUtensorMap* encoded, const TensorMap& map, bool allowed) {
  if (!allowed || !acceptable(map)) return CUDA_ERROR_INVALID_VALUE;
  const uint64_t index = maps.size();
  std::memcpy(encoded, &index, sizeof index);
  maps.push_back(map);
  return CUDA_SUCCESS;
}

CUresult encode_cuTensorMapEncodeIm2col(
    CUtensorMap* encoded, CUtensorMapDataType type, uint32_t rank, void* base,
    const uint64_t* size, const uint64_t* stride, const int* lower, const int* upper,
    uint32_t channels, uint32_t pixels, const uint32_t* steps, CUtensorMapInterleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  TensorMap map = described(type, rank, base, size, stride, swizzle);
  map.channels = channels;
  map.pixels = pixels;
  bool allowed = rank == 4 && channels <= 256 && pixels <= 1024 && map.swizzled &&
                 channels * 2 <= 128;
  for (uint32_t i = 0; i < rank; ++i) {
    map.step[i] = steps[i];
    allowed = allowed && steps[i] >= 1 && steps[i] <= 8;
  }
  for (int i = 0; i < 2; ++i) { // with two dimensions corners have 8 bits each
    map.lower[i] = lower[i];
    map.upper[i] = upper[i];
    allowed = allowed && lower[i] >= -128 && lower[i] <= 127 && upper[i] >= -128 && upper[i] <= 127;
  }
  return keep(encoded, map, allowed);
}

CUresult encode_cuTensorMapEncodeTiled(
    CUtensorMap* encoded, CUtensorMapDataType type, uint32_t rank, void* base,
    const uint64_t* size, const uint64_t* stride, const uint32_t* box, const uint32_t* steps,
    CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
    CUtensorMapFloatOOBfill) {
  TensorMap map = described(type, rank, base, size, stride, swizzle);
  bool allowed = rank >= 1 && rank <= 5 && (!map.swizzled || box[0] * map.stride[0] <= 128);
  for (uint32_t i = 0; i < rank; ++i) {
    map.box[i] = box[i];
    allowed = allowed && box[i] >= 1 && box[i] <= 256 && steps[i] == 1;
  }
  return keep(encoded, map, allowed);
}

} // namespace

#define RESFAST_ENCODER(function) &encode_##function
#include "../../csrc/cuda/conv_hopper/hopper.cuh"

namespace {

using namespace resfast::hopper;
using cute::_;

// -- the copy engine ------------------------------------------------------------------------------

const TensorMap& map_of(const void* encoded) {
  uint64_t index;
  std::memcpy(&index, encoded, sizeof index);
  return maps.at(index);
}

using Coordinates = std::array<int64_t, 6>;

// The value at a position of a map, zero outside it.
uint16_t value_at(const TensorMap& map, const Coordinates& at) {
  int64_t offset = 0;
  for (int i = 0; i < map.rank; ++i) {
    if (at[i] < 0 || at[i] >= map.size[i]) return 0;
    offset += at[i] * map.stride[i];
  }
  uint16_t value;
  std::memcpy(&value, map.base + offset, sizeof value);
  return value;
}

// The swizzle XORs bits 4 to 6 of a shared memory address with bits 7 to 9.
void store(char* shared, uint16_t value, bool swizzled) {
  uintptr_t address = reinterpret_cast<uintptr_t>(shared);
  if (swizzled) address ^= (address >> 3) & 0x70;
  std::memcpy(reinterpret_cast<void*>(address), &value, sizeof value);
}

// `at`: channel, W, H, image, and the offsets in W and H that select a position of the kernel.
void load_im2col(const TensorMap& map, const Coordinates& at, char* shared) {
  int64_t w = at[1], h = at[2], image = at[3];
  for (int64_t pixel = 0; pixel < map.pixels; ++pixel) {
    for (int64_t c = 0; c < map.channels; ++c, shared += 2)
      store(shared, value_at(map, {at[0] + c, w + at[4], h + at[5], image}), map.swizzled);
    w += map.step[1];
    if (w < map.size[1] + map.upper[0]) continue;
    w = map.lower[0];
    h += map.step[2];
    if (h < map.size[2] + map.upper[1]) continue;
    h = map.lower[1];
    ++image;
  }
}

void load_tiled(const TensorMap& map, const Coordinates& at, char* shared) {
  int64_t count = 1;
  for (int i = 0; i < map.rank; ++i) count *= map.box[i];
  for (int64_t index = 0; index < count; ++index, shared += 2) {
    Coordinates position = at;
    for (int64_t i = 0, rest = index; i < map.rank; rest /= map.box[i], ++i)
      position[i] += rest % map.box[i];
    store(shared, value_at(map, position), map.swizzled);
  }
}

// Every copy of one step, from the partitioned coordinates to the partitioned shared memory.
template <class Source, class Target, class Load>
void copy(const TensorMap& map, const Source& source, const Target& target, Load load) {
  for (int i = 0; i < cute::size<1>(source); ++i)
    for (int j = 0; j < cute::size<2>(source); ++j) {
      Coordinates at{};
      int mode = 0;
      cute::for_each(
          cute::flatten(source(_, i, j)(_0{})), [&](auto value) { at[mode++] = int64_t(value); });
      load(map, at, reinterpret_cast<char*>(cute::raw_pointer_cast(target(_, i, j).data())));
    }
}

// -- one convolution ------------------------------------------------------------------------------

// The sums of one tile over the whole reduction, [m, n].
template <class Gemm>
std::vector<float> tile_sums(
    const typename Gemm::Params& params, int row, int column, int64_t expected_steps) {
  using Mainloop = typename Gemm::CollectiveMainloop;
  using Tile = typename Gemm::TileShape;
  using Element = typename Gemm::ElementA;
  constexpr int kM = cute::size<0>(Tile{}), kN = cute::size<1>(Tile{});
  constexpr int kDepth = cute::size<2>(Tile{});
  const auto& load_a = params.mainloop.tma_load_a;
  const auto& load_b = params.mainloop.tma_load_b;

  // The same as Mainloop::load_init and load, which are device code.
  const auto [m, n, k, l] = params.problem_shape;
  using X = cute::Underscore;
  const auto all_a = Mainloop::with_batch(cute::local_tile(
      load_a.get_tma_tensor(cute::make_shape(m, k)), Tile{}, cute::make_coord(_, _, _),
      cute::Step<_1, X, _1>{}));
  const auto all_b = Mainloop::with_batch(cute::local_tile(
      load_b.get_tma_tensor(cute::make_shape(n, k)), Tile{}, cute::make_coord(_, _, _),
      cute::Step<X, _1, _1>{}));
  const auto a = all_a(_, _, cute::idx2crd(row, cute::shape<2>(all_a)), _, _0{});
  const auto b = all_b(_, _, cute::idx2crd(column, cute::shape<2>(all_b)), _, _0{});

  struct alignas(1024) Shared {
    Element a[cute::cosize_v<typename Mainloop::SmemLayoutA>];
    Element b[cute::cosize_v<typename Mainloop::SmemLayoutB>];
  };
  const auto shared = std::make_unique<Shared>();
  const auto shared_a =
      cute::make_tensor(cute::make_smem_ptr(shared->a), typename Mainloop::SmemLayoutA{});
  const auto shared_b =
      cute::make_tensor(cute::make_smem_ptr(shared->b), typename Mainloop::SmemLayoutB{});

  std::vector<float> sums(kM * kN);
  std::vector<float> left(kM * kDepth), right(kN * kDepth);
  const auto extents = cute::shape<3>(all_a);
  const int count = cute::size<3>(all_a);
  if (count != expected_steps || count != cute::size(cute::ceil_div(k, cute::get<2>(Tile{}))))
    throw std::runtime_error(std::to_string(count) + " steps of the reduction");
  auto step = cute::make_coord_iterator(extents);
  for (int done = 0; done < count; ++done, ++step) {
    if (cute::idx2crd(done, extents) != *step) // where stream-K lets another block continue
      throw std::runtime_error("the steps of the reduction are in different orders");
    std::memset(static_cast<void*>(shared.get()), 0xff, sizeof(Shared)); // NaN where nothing loads
    const auto slice_a = load_a.get_slice(0);
    copy(
        map_of(load_a.get_tma_descriptor()), slice_a.partition_S(a)(_, _, _, *step),
        slice_a.partition_D(shared_a)(_, _, _, 0), load_im2col);
    for (int block = 0; block < cute::size<0>(typename Gemm::ClusterShape{}); ++block) {
      const auto slice_b = load_b.get_slice(block); // each block of a cluster loads a part
      copy(
          map_of(load_b.get_tma_descriptor()), slice_b.partition_S(b)(_, _, _, *step),
          slice_b.partition_D(shared_b)(_, _, _, 0), load_tiled);
    }
    for (int i = 0; i < kM; ++i)
      for (int j = 0; j < kDepth; ++j) left[i * kDepth + j] = float(Element(shared_a(i, j, 0)));
    for (int i = 0; i < kN; ++i)
      for (int j = 0; j < kDepth; ++j) right[i * kDepth + j] = float(Element(shared_b(i, j, 0)));
    for (int i = 0; i < kM; ++i)
      for (int j = 0; j < kN; ++j) {
        float sum = 0;
        for (int d = 0; d < kDepth; ++d) sum += left[i * kDepth + d] * right[j * kDepth + d];
        sums[i * kN + j] += sum;
      }
  }
  return sums;
}

template <int kConfig>
void convolve(const Call& call) {
  using Gemm = typename Kernel<cutlass::bfloat16_t, kConfig>::Gemm;
  using Element = typename Gemm::ElementA;
  const auto arguments = gemm_arguments<Gemm>(call);
  if (!Gemm::can_implement(arguments)) throw std::runtime_error("CUTLASS refuses it");
  std::vector<char> workspace(Gemm::get_workspace_size(arguments));
  const auto params = Gemm::to_underlying_arguments(arguments, workspace.data());
  static_assert(Gemm::SharedStorageSize <= 227 * 1024, "more than a thread block can have");

  constexpr int kM = kConfigs[kConfig].m, kN = kConfigs[kConfig].n;
  const dim3 tiles = Gemm::TileScheduler::get_tiled_cta_shape_mnl(
      params.problem_shape, typename Gemm::TileShape{}, typename Gemm::ClusterShape{});
  const TensorMap& out = map_of(params.epilogue.tma_store_d.get_tma_descriptor());
  const TensorMap& residual = map_of(params.epilogue.tma_load_c.get_tma_descriptor());
  const auto& epilogue = arguments.epilogue.thread;
  for (unsigned row = 0; row < tiles.x; ++row)
    for (unsigned column = 0; column < tiles.y; ++column) {
      const std::vector<float> sums =
          tile_sums<Gemm>(params, row, column, steps(call.problem));
      for (int i = 0; i < kM; ++i)
        for (int j = 0; j < kN; ++j) {
          const int64_t pixel = int64_t{row} * kM + i, filter = int64_t{column} * kN + j;
          if (pixel >= out.size[1] || filter >= out.size[0]) continue; // as in TMA stores
          cutlass::Array<float, 1> value;
          value[0] = epilogue.alpha * sums[i * kN + j];
          if (epilogue.bias_ptr) value[0] += epilogue.bias_ptr[filter];
          if (epilogue.beta != 0)
            value[0] += epilogue.beta *
                        float(Element::bitcast(value_at(residual, {filter, pixel})));
          value = Activate<decltype(value)>{}(value, epilogue.activation);
          const Element rounded(value[0]);
          std::memcpy(
              out.base + filter * out.stride[0] + pixel * out.stride[1], &rounded, sizeof rounded);
        }
    }
}

} // namespace

// Convolves bfloat16 on the host. `sizes`: batch, height, width, channels, filters, the kernel's
// height and width, stride and padding in both directions. Returns null or an error message.
extern "C" __attribute__((visibility("default"))) const char* convolve_on_host(
    int config, const int* sizes, const void* x, const void* weight, const float* bias,
    const void* residual, void* out, int activation, float negative_slope) {
  static std::string message;
  Problem p{};
  p.batch = sizes[0], p.height = sizes[1], p.width = sizes[2], p.channels = sizes[3];
  p.filters = sizes[4], p.kernel_h = sizes[5], p.kernel_w = sizes[6];
  p.stride_h = sizes[7], p.stride_w = sizes[8], p.padding_h = sizes[9], p.padding_w = sizes[10];
  p.out_height = (p.height + 2 * p.padding_h - p.kernel_h) / p.stride_h + 1;
  p.out_width = (p.width + 2 * p.padding_w - p.kernel_w) / p.stride_w + 1;
  Call call{};
  call.problem = p;
  call.x = x, call.weight = weight, call.bias = bias, call.residual = residual, call.out = out;
  call.activation = static_cast<Activation>(activation);
  call.negative_slope = negative_slope;
  call.multiprocessors = 132;
  maps.clear();
  try {
#define RESFAST_CONVOLVE(index, m, n, cluster, schedule) \
  if (config == index) return convolve<index>(call), nullptr;
    RESFAST_HOPPER_CONFIGS(RESFAST_CONVOLVE)
#undef RESFAST_CONVOLVE
    message = "no such configuration";
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
