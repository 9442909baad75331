// The kernels on lines of float32 for AVX2 with FMA.

#if defined(__x86_64__)

#include "kernels.h"

#define RESFAST_F32 __attribute__((target("avx2,fma")))
#define RESFAST_F32_NAMESPACE f32_avx2
#define RESFAST_F32_INLINE inline RESFAST_F32 __attribute__((always_inline))

namespace resfast::network::f32_avx2 {
namespace {

using Vector = __m256;
constexpr int kVectors = 2; // in a line
constexpr int kMostPanels = 1; // multiplied with the same pixels: 12 of 16 registers hold sums
constexpr int kUnrolled = 16; // channels of the innermost loop

RESFAST_F32_INLINE __m256i lanes_below(int64_t count) {
  return _mm256_cmpgt_epi32(
      _mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

RESFAST_F32_INLINE Vector load(const float* from) { return _mm256_loadu_ps(from); }
RESFAST_F32_INLINE void store(float* to, Vector value) { _mm256_storeu_ps(to, value); }
// The first `count` values, which may be negative or larger than a vector; the others are 0.
RESFAST_F32_INLINE Vector load_first(const float* from, int64_t count) {
  return _mm256_maskload_ps(from, lanes_below(count));
}
RESFAST_F32_INLINE void store_first(float* to, Vector value, int64_t count) {
  _mm256_maskstore_ps(to, lanes_below(count), value);
}
RESFAST_F32_INLINE Vector splat(float value) { return _mm256_set1_ps(value); }
RESFAST_F32_INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
  return _mm256_fmadd_ps(a, b, c);
}
// The second value where either is NaN.
RESFAST_F32_INLINE Vector maximum(Vector a, Vector b) { return _mm256_max_ps(a, b); }
RESFAST_F32_INLINE Vector minimum(Vector a, Vector b) { return _mm256_min_ps(a, b); }
// `yes` where a < b, otherwise `no`, also where either is NaN.
RESFAST_F32_INLINE Vector where_less(Vector a, Vector b, Vector yes, Vector no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
RESFAST_F32_INLINE Vector where_nan(Vector value, Vector yes, Vector no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
}
RESFAST_F32_INLINE bool any_nan(Vector value) {
  return _mm256_movemask_ps(_mm256_cmp_ps(value, value, _CMP_UNORD_Q)) != 0;
}
RESFAST_F32_INLINE Vector rounded(Vector value) {
  return _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// 2^n for whole numbers n from -126 to 127.
RESFAST_F32_INLINE Vector power_of_two(Vector n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

} // namespace
} // namespace resfast::network::f32_avx2

#include "f32.h"

namespace resfast::network {
const Kernels kF32Avx2 = f32_avx2::kKernels;
} // namespace resfast::network

#endif
