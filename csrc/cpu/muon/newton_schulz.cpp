// resfast::newton_schulz_product on x86-64 with AVX-512; schema and documentation:
// resfast/ops/muon/op.py.
//
// All matrices are polynomials of one symmetric matrix, so they and their products are symmetric:
// half of a product is computed and mirrored. Matrices are stored in panels of 32 columns, [n /
// 32][n][32], padded with zeros to a multiple of 32. By symmetry the panels of both factors are
// read along k, contiguously, without packing.

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../../common/check.h"
#include "../common/isa.h"
#include "../common/share.h"

namespace resfast {
namespace {

constexpr int64_t kPanel = 32, kRows = 8, kVector = 16;
constexpr double kLeastNorm = 1e-7;

// A square matrix of `panels * 32` rows.
struct Panels {
  int64_t panels;
  std::vector<float> values;

  explicit Panels(int64_t panels_) : panels(panels_), values(panels_ * panels_ * kPanel * kPanel) {}
  int64_t rows() const { return panels * kPanel; }
  float* panel(int64_t index) { return values.data() + index * rows() * kPanel; }
  const float* panel(int64_t index) const { return values.data() + index * rows() * kPanel; }
};

// result = product * left right + same * left + diagonal * I
struct Epilogue {
  float product = 1, same = 0, diagonal = 0;
};

// Rows 8 * part to 8 * part + 7 of a 32x32 block, from the panels of its rows and columns.
RESFAST_AVX512 void block_part(
    const float* rows, const float* columns, int64_t count, __m512 (&sum)[kRows][2]) {
  for (auto& row : sum) row[0] = row[1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; ++k) {
    const __m512 first = _mm512_loadu_ps(columns + k * kPanel);
    const __m512 second = _mm512_loadu_ps(columns + k * kPanel + kVector);
    for (int row = 0; row < kRows; ++row) {
      const __m512 value = _mm512_set1_ps(rows[k * kPanel + row]);
      sum[row][0] = _mm512_fmadd_ps(value, first, sum[row][0]);
      sum[row][1] = _mm512_fmadd_ps(value, second, sum[row][1]);
    }
  }
}

RESFAST_AVX512 void block(
    const Panels& left, const Panels& right, Panels& result, int64_t row_panel,
    int64_t column_panel, const Epilogue& epilogue) {
  const float* rows = left.panel(row_panel);
  const float* columns = right.panel(column_panel);
  const float* same = left.panel(column_panel) + row_panel * kPanel * kPanel;
  float* out = result.panel(column_panel) + row_panel * kPanel * kPanel;
  const __m512 factor = _mm512_set1_ps(epilogue.product), keep = _mm512_set1_ps(epilogue.same);
  for (int64_t part = 0; part < kPanel; part += kRows) {
    __m512 sum[kRows][2];
    block_part(rows + part, columns, left.rows(), sum);
    for (int64_t row = 0; row < kRows; ++row)
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t at = (part + row) * kPanel + half * kVector;
        const __m512 kept = _mm512_mul_ps(keep, _mm512_loadu_ps(same + at));
        _mm512_storeu_ps(out + at, _mm512_fmadd_ps(factor, sum[row][half], kept));
      }
  }
  if (row_panel == column_panel) {
    for (int64_t row = 0; row < kPanel; ++row) {
      out[row * kPanel + row] += epilogue.diagonal;
      for (int64_t column = 0; column < row; ++column) // asymmetry from rounding would grow
        out[row * kPanel + column] = out[column * kPanel + row];
    }
    return;
  }
  float* mirrored = result.panel(row_panel) + column_panel * kPanel * kPanel;
  for (int64_t row = 0; row < kPanel; ++row)
    for (int64_t column = 0; column < kPanel; ++column)
      mirrored[column * kPanel + row] = out[row * kPanel + column];
}

// `result` must not alias a factor.
void multiply(const Panels& left, const Panels& right, Panels& result, const Epilogue& epilogue) {
  const int64_t blocks = left.panels * (left.panels + 1) / 2;
  share_all(blocks, [&](int64_t begin, int64_t end) {
    int64_t column = 0, first = 0; // blocks up to the diagonal, column by column
    while (first + column + 1 <= begin) first += ++column;
    for (int64_t index = begin; index < end; ++index) {
      if (index - first > column) first += ++column;
      block(left, right, result, index - first, column, epilogue);
    }
  });
}

// Frobenius norm of X, the square root of the trace of `gram` = X X^T.
double norm_of_factor(const Panels& gram) {
  double trace = 0;
  for (int64_t row = 0; row < gram.rows(); ++row)
    trace += gram.panel(row / kPanel)[row * kPanel + row % kPanel];
  return std::max(std::sqrt(trace), kLeastNorm);
}

Tensor newton_schulz_product(
    const Tensor& gram, int64_t steps, bool normalize, double a, double b, double c) {
  if (detect_isa() != Isa::avx512) fail("newton_schulz_product needs AVX-512");
  if (!gram.is_cpu()) fail("gram is not on the CPU");
  if (gram.scalar_type() != ScalarType::Float)
    fail("gram is ", dtype_name(gram.scalar_type()), "; expected torch.float32");
  if (gram.dim() != 2 || gram.size(0) != gram.size(1) || !gram.is_contiguous())
    fail("gram is ", shape_name(gram.sizes()), "; expected a contiguous square matrix");
  if (steps < 1) fail("steps is ", steps, "; expected at least 1");

  const int64_t size = gram.size(0), panels = (size + kPanel - 1) / kPanel;
  const Epilogue quintic{
      static_cast<float>(c), static_cast<float>(b), static_cast<float>(a)};
  Panels current(panels), factor(panels), product(panels), spare(panels);
  const auto* values = static_cast<const float*>(gram.const_data_ptr());
  for (int64_t row = 0; row < size; ++row)
    for (int64_t column = 0; column < size; column += kPanel)
      std::copy_n(
          values + row * size + column, std::min(kPanel, size - column),
          current.panel(column / kPanel) + row * kPanel);
  const double norm = normalize ? norm_of_factor(current) : 1;
  if (normalize) {
    const float scale = static_cast<float>(1 / (norm * norm));
    for (float& value : current.values) value *= scale;
  }

  for (int64_t step = 0; step < steps; ++step) {
    multiply(current, current, factor, quintic);
    if (step == 0) {
      product.values = factor.values;
    } else {
      multiply(factor, product, spare, {});
      std::swap(product.values, spare.values);
    }
    if (step + 1 < steps) {
      multiply(factor, current, spare, {});
      multiply(factor, spare, current, {});
    }
  }

  Tensor result = torch::stable::empty_like(gram);
  auto* out = static_cast<float*>(result.mutable_data_ptr());
  const float scale = static_cast<float>(1 / norm);
  for (int64_t row = 0; row < size; ++row)
    for (int64_t column = 0; column < size; ++column)
      out[row * size + column] =
          scale * product.panel(column / kPanel)[row * kPanel + column % kPanel];
  return result;
}

bool newton_schulz_supported() { return detect_isa() == Isa::avx512; }

} // namespace
} // namespace resfast

STABLE_TORCH_LIBRARY_FRAGMENT(resfast, m) {
  m.def("newton_schulz_supported() -> bool");
  m.def(
      "newton_schulz_product(Tensor gram, int steps, bool normalize, float a, float b, float c) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("newton_schulz_product", TORCH_BOX(&resfast::newton_schulz_product));
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CompositeExplicitAutograd, m) {
  m.impl("newton_schulz_supported", TORCH_BOX(&resfast::newton_schulz_supported));
}

#endif
