// The kernels on lines of float32 for AVX-512. With RESFAST_AVX512_EMULATED they are compiled for AVX2
// from vectors of 16 floats that the compiler splits, so that the tests run on processors without it.

#if defined(__x86_64__)

#include "kernels.h"

#if defined(RESFAST_AVX512_EMULATED)
#define RESFAST_F32 __attribute__((target("avx2,fma")))
#else
#define RESFAST_F32 RESFAST_AVX512
#endif
#define RESFAST_F32_NAMESPACE f32_avx512
#define RESFAST_F32_INLINE inline RESFAST_F32 __attribute__((always_inline))

namespace resfast::network::f32_avx512 {
namespace {

constexpr int kVectors = 1; // in a line
constexpr int kMostPanels = 4; // multiplied with the same pixels: 24 of 32 registers hold sums
constexpr int kUnrolled = 4; // channels of the innermost loop

#if defined(RESFAST_AVX512_EMULATED)

struct Vector {
  float lane[kTile];
};

template <class Make>
RESFAST_F32_INLINE Vector each(Make make) {
  Vector value;
  for (int i = 0; i < kTile; ++i) value.lane[i] = make(i);
  return value;
}
RESFAST_F32_INLINE Vector load_first(const float* from, int64_t count) {
  return each([&](int i) RESFAST_F32 { return i < count ? from[i] : 0.0f; });
}
RESFAST_F32_INLINE void store_first(float* to, Vector value, int64_t count) {
  for (int i = 0; i < kTile && i < count; ++i) to[i] = value.lane[i];
}
RESFAST_F32_INLINE Vector load(const float* from) { return load_first(from, kTile); }
RESFAST_F32_INLINE void store(float* to, Vector value) { store_first(to, value, kTile); }
RESFAST_F32_INLINE Vector splat(float value) {
  return each([&](int) RESFAST_F32 { return value; });
}
RESFAST_F32_INLINE Vector operator+(Vector a, Vector b) {
  return each([&](int i) RESFAST_F32 { return a.lane[i] + b.lane[i]; });
}
RESFAST_F32_INLINE Vector operator-(Vector a, Vector b) {
  return each([&](int i) RESFAST_F32 { return a.lane[i] - b.lane[i]; });
}
RESFAST_F32_INLINE Vector operator*(Vector a, Vector b) {
  return each([&](int i) RESFAST_F32 { return a.lane[i] * b.lane[i]; });
}
RESFAST_F32_INLINE Vector operator/(Vector a, Vector b) {
  return each([&](int i) RESFAST_F32 { return a.lane[i] / b.lane[i]; });
}
RESFAST_F32_INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
  return each([&](int i) RESFAST_F32 { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
}
RESFAST_F32_INLINE Vector maximum(Vector a, Vector b) {
  return each([&](int i) RESFAST_F32 { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
RESFAST_F32_INLINE Vector minimum(Vector a, Vector b) {
  return each([&](int i) RESFAST_F32 { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
RESFAST_F32_INLINE Vector where_less(Vector a, Vector b, Vector yes, Vector no) {
  return each([&](int i) RESFAST_F32 { return a.lane[i] < b.lane[i] ? yes.lane[i] : no.lane[i]; });
}
RESFAST_F32_INLINE Vector where_nan(Vector value, Vector yes, Vector no) {
  return each([&](int i) RESFAST_F32 {
    return value.lane[i] != value.lane[i] ? yes.lane[i] : no.lane[i];
  });
}
RESFAST_F32_INLINE bool any_nan(Vector value) {
  bool found = false;
  for (float lane : value.lane) found |= lane != lane;
  return found;
}
RESFAST_F32_INLINE Vector rounded(Vector value) {
  return each([&](int i) RESFAST_F32 { return __builtin_rintf(value.lane[i]); });
}
RESFAST_F32_INLINE Vector power_of_two(Vector n) {
  return each([&](int i) RESFAST_F32 {
    const int exponent = n.lane[i] == n.lane[i] ? static_cast<int>(n.lane[i]) + 127 : 0;
    return bits_to<float>(static_cast<uint32_t>(exponent) << 23);
  });
}

#else

using Vector = __m512;

// The first `count` values, which may be negative or larger than a vector; the others are 0.
RESFAST_F32_INLINE __mmask16 lanes_below(int64_t count) {
  return count <= 0 ? __mmask16{0} : lane_mask(count);
}
RESFAST_F32_INLINE Vector load(const float* from) { return _mm512_loadu_ps(from); }
RESFAST_F32_INLINE void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
RESFAST_F32_INLINE Vector load_first(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(lanes_below(count), from);
}
RESFAST_F32_INLINE void store_first(float* to, Vector value, int64_t count) {
  _mm512_mask_storeu_ps(to, lanes_below(count), value);
}
RESFAST_F32_INLINE Vector splat(float value) { return _mm512_set1_ps(value); }
RESFAST_F32_INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
  return _mm512_fmadd_ps(a, b, c);
}
// The second value where either is NaN.
RESFAST_F32_INLINE Vector maximum(Vector a, Vector b) { return _mm512_max_ps(a, b); }
RESFAST_F32_INLINE Vector minimum(Vector a, Vector b) { return _mm512_min_ps(a, b); }
// `yes` where a < b, otherwise `no`, also where either is NaN.
RESFAST_F32_INLINE Vector where_less(Vector a, Vector b, Vector yes, Vector no) {
  return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), yes);
}
RESFAST_F32_INLINE Vector where_nan(Vector value, Vector yes, Vector no) {
  return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), yes);
}
RESFAST_F32_INLINE bool any_nan(Vector value) {
  return _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q) != 0;
}
RESFAST_F32_INLINE Vector rounded(Vector value) {
  return _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// 2^n for whole numbers n from -126 to 127.
RESFAST_F32_INLINE Vector power_of_two(Vector n) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}

#endif

} // namespace
} // namespace resfast::network::f32_avx512

#include "f32.h"

namespace resfast::network {
const Kernels kF32Avx512 = f32_avx512::kKernels;
} // namespace resfast::network

#endif
