// Tiles of AMX, Intel's matrix unit ("Intel Architecture Instruction Set Extensions", chapter 3),
// for the bfloat16 convolutions. With RESFAST_AMX_EMULATED they are emulated in plain C++, so that
// the tests run on processors without AMX; RESFAST_WITHOUT_AMX leaves them out.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(RESFAST_AMX_EMULATED)
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../common/dtype.h"
#elif !defined(RESFAST_WITHOUT_AMX) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define RESFAST_AMX_COMPILED
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(RESFAST_AMX_COMPILED)
#define RESFAST_AMX __attribute__((target("amx-tile,amx-bf16,xsave")))
#else
#define RESFAST_AMX
#endif
#define RESFAST_AMX_INLINE inline RESFAST_AMX __attribute__((always_inline))

namespace resfast::amx {

constexpr int64_t kRows = 16; // rows per tile
constexpr int64_t kPairs = 16; // pairs of bfloat16 in a row of 64 bytes

// The shape of each tile, in the format of ldtilecfg.
struct Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {}; // per row
  uint8_t rows[16] = {};
};
static_assert(sizeof(Config) == 64);

// Tiles 0 to 3 hold sums, 4 and 5 rows of `pairs` pairs, 6 and 7 `pairs` rows of 16 outputs.
inline Config config_for(int64_t pairs) {
  Config config;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = kRows;
  for (int i = 4; i < 6; ++i) config.bytes[i] = static_cast<uint16_t>(4 * pairs);
  for (int i = 6; i < 8; ++i) config.rows[i] = static_cast<uint8_t>(pairs);
  return config;
}

#if defined(RESFAST_AMX_EMULATED)

inline bool supported() { return true; }

struct State {
  Config config{};
  bool configured = false;
  unsigned char tiles[8][16][64];
};
inline State& state() {
  static thread_local State state;
  return state;
}
inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "AMX: %s\n", what);
  std::abort();
}
inline void configure(int64_t pairs) {
  require(pairs >= 1 && pairs <= kPairs, "a tile with 0 or more than 16 pairs");
  state().config = config_for(pairs);
  state().configured = true;
  std::memset(state().tiles, 0, sizeof(state().tiles));
}
inline void release() { state().configured = false; }

template <int kTile>
void load(const void* from, int64_t stride) {
  State& s = state();
  require(s.configured, "a load without a configuration");
  std::memset(s.tiles[kTile], 0, sizeof(s.tiles[kTile]));
  for (int row = 0; row < s.config.rows[kTile]; ++row)
    std::memcpy(
        s.tiles[kTile][row], static_cast<const char*>(from) + row * stride, s.config.bytes[kTile]);
}
template <int kTile>
void store(void* to, int64_t stride) {
  State& s = state();
  require(s.configured, "a store without a configuration");
  for (int row = 0; row < s.config.rows[kTile]; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, s.tiles[kTile][row], s.config.bytes[kTile]);
}
template <int kTile>
void zero() {
  require(state().configured, "a tile without a configuration");
  std::memset(state().tiles[kTile], 0, sizeof(state().tiles[kTile]));
}
template <int kSum, int kA, int kB>
void multiply() {
  State& s = state();
  require(s.configured, "a product without a configuration");
  require(s.config.bytes[kA] == 4 * s.config.rows[kB], "tiles of incompatible shapes");
  float sums[16][16];
  uint16_t a[16][32], b[16][32];
  std::memcpy(sums, s.tiles[kSum], sizeof(sums));
  std::memcpy(a, s.tiles[kA], sizeof(a));
  std::memcpy(b, s.tiles[kB], sizeof(b));
  for (int row = 0; row < s.config.rows[kA]; ++row)
    for (int pair = 0; pair < s.config.rows[kB]; ++pair)
      for (int output = 0; output < 16; ++output)
        for (int i = 0; i < 2; ++i)
          sums[row][output] +=
              from_bfloat16(a[row][2 * pair + i]) * from_bfloat16(b[pair][2 * output + i]);
  std::memcpy(s.tiles[kSum], sums, sizeof(sums));
}

#elif defined(RESFAST_AMX_COMPILED)

// Whether the processor has AMX for bfloat16 and the operating system lets this process use it.
inline bool supported() {
  static const bool known = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    constexpr long kAskForState = 0x1023, kTileData = 18; // ARCH_REQ_XCOMP_PERM of Linux
    return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
  }();
  return known;
}

RESFAST_AMX_INLINE void configure(int64_t pairs) {
  const Config config = config_for(pairs);
  asm volatile("" : : "r"(&config) : "memory"); // GCC assumes ldtilecfg reads only 8 bytes of 64
  _tile_loadconfig(&config);
}
RESFAST_AMX_INLINE void release() { _tile_release(); }

// The intrinsics need the tile number as a literal.
#define RESFAST_AMX_TILE(operation, ...)                      \
  if constexpr (kTile == 0) operation(0, ##__VA_ARGS__);      \
  else if constexpr (kTile == 1) operation(1, ##__VA_ARGS__); \
  else if constexpr (kTile == 2) operation(2, ##__VA_ARGS__); \
  else if constexpr (kTile == 3) operation(3, ##__VA_ARGS__); \
  else if constexpr (kTile == 4) operation(4, ##__VA_ARGS__); \
  else if constexpr (kTile == 5) operation(5, ##__VA_ARGS__); \
  else if constexpr (kTile == 6) operation(6, ##__VA_ARGS__); \
  else operation(7, ##__VA_ARGS__)

template <int kTile>
RESFAST_AMX_INLINE void load(const void* from, int64_t stride) {
  RESFAST_AMX_TILE(_tile_loadd, from, stride);
}
template <int kTile>
RESFAST_AMX_INLINE void store(void* to, int64_t stride) {
  RESFAST_AMX_TILE(_tile_stored, to, stride);
}
template <int kTile>
RESFAST_AMX_INLINE void zero() {
  RESFAST_AMX_TILE(_tile_zero);
}
#undef RESFAST_AMX_TILE

// Adds to tile kSum (0 to 3) the products of tiles kA (4 or 5) and kB (6 or 7).
template <int kSum, int kA, int kB>
RESFAST_AMX_INLINE void multiply() {
  static_assert(kSum >= 0 && kSum < 4 && kA / 2 == 2 && kB / 2 == 3);
  constexpr int kWhich = 4 * kSum + 2 * (kA - 4) + (kB - 6);
  if constexpr (kWhich == 0) _tile_dpbf16ps(0, 4, 6);
  else if constexpr (kWhich == 1) _tile_dpbf16ps(0, 4, 7);
  else if constexpr (kWhich == 2) _tile_dpbf16ps(0, 5, 6);
  else if constexpr (kWhich == 3) _tile_dpbf16ps(0, 5, 7);
  else if constexpr (kWhich == 4) _tile_dpbf16ps(1, 4, 6);
  else if constexpr (kWhich == 5) _tile_dpbf16ps(1, 4, 7);
  else if constexpr (kWhich == 6) _tile_dpbf16ps(1, 5, 6);
  else if constexpr (kWhich == 7) _tile_dpbf16ps(1, 5, 7);
  else if constexpr (kWhich == 8) _tile_dpbf16ps(2, 4, 6);
  else if constexpr (kWhich == 9) _tile_dpbf16ps(2, 4, 7);
  else if constexpr (kWhich == 10) _tile_dpbf16ps(2, 5, 6);
  else if constexpr (kWhich == 11) _tile_dpbf16ps(2, 5, 7);
  else if constexpr (kWhich == 12) _tile_dpbf16ps(3, 4, 6);
  else if constexpr (kWhich == 13) _tile_dpbf16ps(3, 4, 7);
  else if constexpr (kWhich == 14) _tile_dpbf16ps(3, 5, 6);
  else _tile_dpbf16ps(3, 5, 7);
}

#else

inline bool supported() { return false; }
inline void configure(int64_t) {}
inline void release() {}
template <int kTile>
void load(const void*, int64_t) {}
template <int kTile>
void store(void*, int64_t) {}
template <int kTile>
void zero() {}
template <int kSum, int kA, int kB>
void multiply() {}

#endif

// Configures the tiles of this thread for its lifetime, with rows of 16 pairs.
class Tiles {
 public:
  explicit Tiles(bool used) : used_(used) {
    if (used_) begin();
  }
  ~Tiles() {
    if (used_) end();
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  RESFAST_AMX static void begin() { configure(kPairs); }
  RESFAST_AMX static void end() { release(); }
  bool used_;
};

// Sums of kRowTiles * 16 rows by kOutputTiles * 16 outputs, in tiles 0 to 3. Strides are in bytes.
template <int kRowTiles, int kOutputTiles>
struct Sums {
  static constexpr bool kWide = kOutputTiles == 2, kTall = kRowTiles == 2;

  static RESFAST_AMX_INLINE void clear() {
    zero<0>();
    if constexpr (kWide) zero<1>();
    if constexpr (kTall) zero<2>();
    if constexpr (kWide && kTall) zero<3>();
  }
  static RESFAST_AMX_INLINE void read(const float* sums, int64_t stride) {
    const float* lower = sums + kRows * stride / 4;
    load<0>(sums, stride);
    if constexpr (kWide) load<1>(sums + 16, stride);
    if constexpr (kTall) load<2>(lower, stride);
    if constexpr (kWide && kTall) load<3>(lower + 16, stride);
  }
  // Adds the products of 16 pairs of rows `a` (the second 16 rows at `lower`) and outputs `b`.
  static RESFAST_AMX_INLINE void add(
      const uint16_t* a, const uint16_t* lower, int64_t a_stride, const uint16_t* b,
      int64_t b_stride) {
    load<6>(b, b_stride);
    load<4>(a, a_stride);
    multiply<0, 4, 6>();
    if constexpr (kWide) {
      load<7>(b + 32, b_stride);
      multiply<1, 4, 7>();
    }
    if constexpr (kTall) {
      load<5>(lower, a_stride);
      multiply<2, 5, 6>();
      if constexpr (kWide) multiply<3, 5, 7>();
    }
  }
  static RESFAST_AMX_INLINE void write(float* sums, int64_t stride) {
    float* lower = sums + kRows * stride / 4;
    store<0>(sums, stride);
    if constexpr (kWide) store<1>(sums + 16, stride);
    if constexpr (kTall) store<2>(lower, stride);
    if constexpr (kWide && kTall) store<3>(lower + 16, stride);
  }
};

// sums[i][j] (+)= sum over pairs of a[i][pair] * b[pair][j], for kRowTiles * 16 rows i and
// kOutputTiles * 16 outputs j. Strides are in bytes.
template <int kRowTiles, int kOutputTiles>
RESFAST_AMX_INLINE void product_tiles(
    const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t b_stride, int64_t pairs,
    float* sums, int64_t sums_stride, bool add) {
  using Block = Sums<kRowTiles, kOutputTiles>;
  if (add) Block::read(sums, sums_stride);
  else Block::clear();
  for (int64_t pair = 0; pair < pairs; pair += kPairs) {
    const uint16_t* rows = a + 2 * pair;
    Block::add(
        rows, rows + kRows * a_stride / 2, a_stride, b + pair * b_stride / 2, b_stride);
  }
  Block::write(sums, sums_stride);
}

template <int kRowTiles>
RESFAST_AMX_INLINE void product_rows(
    const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t pairs, int64_t blocks,
    float* sums, bool add) {
  const int64_t stride = 64 * blocks; // of b and of the sums
  int64_t block = 0;
  for (; block + 2 <= blocks; block += 2)
    product_tiles<kRowTiles, 2>(
        a, a_stride, b + 32 * block, stride, pairs, sums + 16 * block, stride, add);
  if (block < blocks)
    product_tiles<kRowTiles, 1>(
        a, a_stride, b + 32 * block, stride, pairs, sums + 16 * block, stride, add);
}

// sums [rows, blocks * 16] = a [rows, row_stride] times a panel b [pairs, blocks * 16, 2]; rows
// must be a multiple of 16. A `Tiles` must be alive.
RESFAST_AMX inline void product(
    const uint16_t* a, int64_t row_stride, int64_t rows, const uint16_t* b, int64_t pairs,
    int64_t blocks, int64_t pairs_at_once, float* sums) {
  asm volatile("" ::: "memory"); // GCC does not know that a tile's load reads memory
  const int64_t whole = pairs / kPairs * kPairs;
  auto block_of = [&](int64_t first, int64_t count) RESFAST_AMX {
    const uint16_t* outputs = b + first * blocks * 32;
    int64_t row = 0;
    for (; row + 2 * kRows <= rows; row += 2 * kRows)
      product_rows<2>(
          a + row * row_stride + 2 * first, 2 * row_stride, outputs, count, blocks,
          sums + row * blocks * 16, first > 0);
    if (row < rows)
      product_rows<1>(
          a + row * row_stride + 2 * first, 2 * row_stride, outputs, count, blocks,
          sums + row * blocks * 16, first > 0);
  };
  for (int64_t first = 0; first < whole; first += pairs_at_once)
    block_of(first, std::min(pairs_at_once, whole - first));
  if (whole < pairs) {
    configure(pairs - whole);
    block_of(whole, pairs - whole);
    configure(kPairs);
  }
}

} // namespace resfast::amx
