// Gradients of the activations of conv_bf16.h.
#pragma once

#if defined(__x86_64__)

#include <type_traits>

#include "conv_bf16.h"

namespace resfast {

template <int64_t kValue>
using Constant = std::integral_constant<int64_t, kValue>;

// Minimax polynomial in z^2 on [-kGeluReach, kGeluReach]: the derivative of gelu to 1.3e-5.
constexpr float kGeluSlope[] = {
    -2.072038318e-02f, 4.651469854e-02f, -2.772115937e-02f, 2.122805554e-02f,
    -6.844837841e-02f, 9.511999262e-02f, -8.535531297e-02f, 7.708937859e-02f,
    -7.154195469e-02f, 6.682617828e-02f, -7.512277932e-02f, 1.421305808e-01f};

RESFAST_BF16_INLINE __m512 sigmoid(__m512 z) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), z))));
}

// grad times the derivative at z; for relu and leaky_relu, z can be the result.
template <int64_t kActivation>
RESFAST_BF16_INLINE __m512 act_gradient(__m512 grad, __m512 z, float negative_slope) {
  const __m512 zero = _mm512_setzero_ps();
  if constexpr (kActivation == kRelu)
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z, zero, _CMP_NLE_UQ), grad);
  if constexpr (kActivation == kLeakyRelu)
    return _mm512_mask_mul_ps(
        grad, _mm512_cmp_ps_mask(z, zero, _CMP_LE_OQ), grad, _mm512_set1_ps(negative_slope));
  if constexpr (kActivation == kSilu) {
    const __m512 s = sigmoid(z), one = _mm512_set1_ps(1.0f);
    return _mm512_mul_ps(
        grad, _mm512_mul_ps(s, _mm512_fmadd_ps(z, _mm512_sub_ps(one, s), one)));
  }
  if constexpr (kActivation == kGelu)
    return _mm512_mul_ps(grad, odd_polynomial(most(least(z)), kGeluSlope));
  return grad;
}

// Calls `run` with the activation as a Constant.
template <class Run>
inline void with_activation(int64_t activation, Run run) {
  switch (activation) {
    case kNone: return run(Constant<kNone>{});
    case kRelu: return run(Constant<kRelu>{});
    case kLeakyRelu: return run(Constant<kLeakyRelu>{});
    case kSilu: return run(Constant<kSilu>{});
    default: return run(Constant<kGelu>{});
  }
}

} // namespace resfast

#endif
