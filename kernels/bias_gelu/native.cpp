// Bias and exact GELU, forward and backward in one pass each; backward also sums the bias's gradient.

#include <torch/library.h>

#include "../cpu/rows.h"

namespace fastvitc {
namespace {

// The standard normal distribution up to x, and its density there.
struct Normal {
  Vec cdf, density;
};

// Abramowitz & Stegun 1964, 7.1.26: erfc(z) = (a1 t + ... + a5 t^5) exp(-z^2), t = 1/(1 + p z), within 1.5e-7; here with
// z = |x|/sqrt(2) for the smaller tail, so that a tail keeps its leading digits.
inline Normal normal(const Vec& x) {
  constexpr float kInverseSqrtTwoPi = 0.3989422804f, kLog2E = 1.442695041f;
  const Vec gauss = exp2(x * x * Vec(-0.5f * kLog2E));
  const Vec t = reciprocal(at::vec::fmadd(Vec(0.3275911f * 0.7071067812f), clamp_max(x.abs(), Vec(1e4f)), Vec(1.0f)));
  Vec sum(1.061405429f);
  for (const float a : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) {
    sum = at::vec::fmadd(sum, t, Vec(a));
  }
  const Vec tail = Vec(0.5f) * sum * t * gauss;
  return {Vec::blendv(tail, Vec(1.0f) - tail, x > Vec(0.0f)), Vec(kInverseSqrtTwoPi) * gauss};
}

inline Vec gelu(const Vec& x) {
  return x * normal(x).cdf;
}

inline Vec gelu_slope(const Vec& x) {
  const auto [cdf, density] = normal(x);
  return at::vec::fmadd(x, density, cdf);
}

void bias_gelu_forward(const at::Tensor& x, const at::Tensor& bias, at::Tensor y) {
  const int64_t columns = x.size(-1), rows = x.numel() / std::max<int64_t>(columns, 1);
  with_dtype(x, [&](auto* value) {
    using T = std::remove_pointer_t<decltype(value)>;
    const T* in = x.const_data_ptr<T>();
    const float* shift = bias.const_data_ptr<float>();
    T* out = y.mutable_data_ptr<T>();
    at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin * columns; at < end * columns; at += columns) {
        for_each_strip(columns, [&](int64_t i, int64_t count) {
          const auto [x0, x1] = load_pair(in + at + i, count);
          const auto [b0, b1] = load_pair(shift + i, count);
          store_pair(out + at + i, gelu(x0 + b0), gelu(x1 + b1), count);
        });
      }
    });
  });
}

void bias_gelu_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& bias, at::Tensor dx, at::Tensor dbias) {
  const int64_t columns = x.size(-1), rows = x.numel() / std::max<int64_t>(columns, 1);
  with_dtype(x, [&](auto* value) {
    using T = std::remove_pointer_t<decltype(value)>;
    const T *gradient = dy.const_data_ptr<T>(), *in = x.const_data_ptr<T>();
    const float* shift = bias.const_data_ptr<float>();
    T* out = dx.mutable_data_ptr<T>();
    sum_over_rows(rows, columns, 1, dbias.mutable_data_ptr<float>(), [&](int64_t row, float* sums) {
      const int64_t at = row * columns;
      for_each_strip(columns, [&](int64_t i, int64_t count) {
        const auto [x0, x1] = load_pair(in + at + i, count);
        const auto [b0, b1] = load_pair(shift + i, count);
        const auto [g0, g1] = load_pair(gradient + at + i, count);
        const Vec d0 = g0 * gelu_slope(x0 + b0), d1 = g1 * gelu_slope(x1 + b1);
        store_pair(out + at + i, d0, d1, count);
        add_to(sums + i, d0, d1);
      });
    });
  });
}

TORCH_LIBRARY_FRAGMENT(fastvitc_native, library) {
  library.def("bias_gelu_forward(Tensor x, Tensor bias, Tensor(a!) y) -> ()", &bias_gelu_forward);
  library.def("bias_gelu_backward(Tensor dy, Tensor x, Tensor bias, Tensor(a!) dx, Tensor(b!) dbias) -> ()",
              &bias_gelu_backward);
}

}  // namespace
}  // namespace fastvitc
