// Conversion between float32 and the 16-bit formats by bit operations, which compilers vectorize.

#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace resfast {
namespace {

template <class To, class From>
RESFAST_INLINE To bits_to(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

RESFAST_INLINE float from_bfloat16(uint16_t value) {
  return bits_to<float>(static_cast<uint32_t>(value) << 16);
}

// Rounds to nearest even, as does to_float16.
RESFAST_INLINE uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_to<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7FC0);
}

RESFAST_INLINE float from_float16(uint16_t value) {
  // Changes the exponent bias from 15 to 127 by multiplication, which handles subnormals too.
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16;
  const uint32_t size = static_cast<uint32_t>(value & 0x7FFF) << 13;
  const uint32_t finite = bits_to<uint32_t>(bits_to<float>(size) * 0x1p112f);
  return bits_to<float>(sign | (size < (31u << 23) ? finite : size | 0x7F800000));
}

RESFAST_INLINE uint16_t to_float16(float value) {
  const uint32_t bits = bits_to<uint32_t>(value), sign = bits & 0x80000000, size = bits ^ sign;
  // Exponent bias from 127 to 15, mantissa from 23 bits to 10.
  const uint32_t normal = (size - (112u << 23) + 0xFFF + ((size >> 13) & 1)) >> 13;
  // Below 2^-14, adding 1/2 leaves the rounded 10 bits of a subnormal in the low bits.
  const float half = bits_to<float>(size) + 0.5f;
  const uint32_t subnormal = bits_to<uint32_t>(half) - bits_to<uint32_t>(0.5f);
  uint32_t result = size < (113u << 23) ? subnormal : normal;
  result = size >= (143u << 23) ? 0x7C00 : result; // from 2^16: infinity
  result = size > (255u << 23) ? 0x7E00 : result; // NaN
  return static_cast<uint16_t>(result | (sign >> 16));
}

// Tensor dtypes: storage type, conversion to float32 and, rounding to nearest even, from float32.
struct Float32 {
  using Stored = float;
  static RESFAST_INLINE float load(float value) { return value; }
  static RESFAST_INLINE float store(float value) { return value; }
};

struct BFloat16 {
  using Stored = uint16_t;
  static RESFAST_INLINE float load(uint16_t value) { return from_bfloat16(value); }
  static RESFAST_INLINE uint16_t store(float value) { return to_bfloat16(value); }
};

struct Float16 {
  using Stored = uint16_t;
  static RESFAST_INLINE float load(uint16_t value) { return from_float16(value); }
  static RESFAST_INLINE uint16_t store(float value) { return to_float16(value); }
};

} // namespace
} // namespace resfast
