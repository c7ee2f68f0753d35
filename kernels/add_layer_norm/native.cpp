// Residual sum and LayerNorm, a row at a time; the row stays in the first cache between its passes.
//
// R rows, C columns. X is the dtype of the stream and of the sum, B of the branch, Y of the normalised output;
// arithmetic is float32. Statistics are those of the sum as it is stored.

#include <torch/library.h>

#include <cmath>
#include <optional>

#include "../cpu/rows.h"

namespace fastvitc {
namespace {

// 0 in the lanes from `count` on.
inline Pair first_lanes(const Vec& lo, const Vec& hi, int64_t count) {
  if (count == 2 * kLane) return {lo, hi};
  return {Vec::set(Vec(0), lo, std::min(count, kLane)), Vec::set(Vec(0), hi, std::max<int64_t>(count - kLane, 0))};
}

struct Moments {
  float mean, rstd;
};

template <typename X>
Moments moments(const X* row, int64_t columns, float eps) {
  Vec total(0), squares(0);
  for_each_strip(columns, [&](int64_t i, int64_t count) {
    const auto [lo, hi] = load_pair(row + i, count);
    total = total + (lo + hi);
  });
  const float mean = sum(total) / columns;
  for_each_strip(columns, [&](int64_t i, int64_t count) {
    const auto [x0, x1] = load_pair(row + i, count);
    const auto [lo, hi] = first_lanes(x0 - Vec(mean), x1 - Vec(mean), count);
    squares = at::vec::fmadd(lo, lo, at::vec::fmadd(hi, hi, squares));
  });
  return {mean, 1 / std::sqrt(sum(squares) / columns + eps)};
}

template <typename X, typename B, typename Y>
void forward(
    int64_t rows, int64_t columns, const X* x, const B* branch, const float* weight, const float* bias, float eps,
    X* total, Y* y, Moments* saved) {
  at::parallel_for(0, rows, kChunkRows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * columns;
      if (branch != nullptr) {
        for_each_strip(columns, [&](int64_t i, int64_t count) {
          const auto [x0, x1] = load_pair(x + at + i, count);
          const auto [b0, b1] = load_pair(branch + at + i, count);
          store_pair(total + at + i, x0 + b0, x1 + b1, count);
        });
      }
      const X* in = (branch == nullptr ? x : total) + at;
      const Moments m = saved[row] = moments(in, columns, eps);
      for_each_strip(columns, [&](int64_t i, int64_t count) {
        const auto [x0, x1] = load_pair(in + i, count);
        const auto [w0, w1] = load_pair(weight + i, count);
        const auto [b0, b1] = load_pair(bias + i, count);
        const Vec mean(m.mean), rstd(m.rstd);
        store_pair(y + at + i, at::vec::fmadd((x0 - mean) * rstd, w0, b0), at::vec::fmadd((x1 - mean) * rstd, w1, b1),
                   count);
      });
    }
  });
}

template <typename X, typename B, typename Y>
void backward(
    int64_t rows, int64_t columns, const X* dtotal, const Y* dy, const X* total, const Moments* saved,
    const float* weight, X* dx, B* dbranch, float* dvectors) {
  sum_over_rows(rows, columns, 2, dvectors, [&](int64_t row, float* sums) {
    float *dweight = sums, *dbias = sums + round_up(columns, 2 * kLane);
    const int64_t at = row * columns;
    const Vec mean(saved[row].mean), rstd(saved[row].rstd);
    Vec gradient(0), slope(0);
    for_each_strip(columns, [&](int64_t i, int64_t count) {
      const auto [x0, x1] = load_pair(total + at + i, count);
      const auto [g0, g1] = load_pair(dy + at + i, count);
      const auto [w0, w1] = load_pair(weight + i, count);
      const Vec n0 = (x0 - mean) * rstd, n1 = (x1 - mean) * rstd;
      add_to(dweight + i, g0 * n0, g1 * n1);
      add_to(dbias + i, g0, g1);
      gradient = at::vec::fmadd(g0, w0, at::vec::fmadd(g1, w1, gradient));
      slope = at::vec::fmadd(g0 * w0, n0, at::vec::fmadd(g1 * w1, n1, slope));
    });
    const Vec mean_gradient(sum(gradient) / columns), mean_slope(sum(slope) / columns);
    for_each_strip(columns, [&](int64_t i, int64_t count) {
      const auto [x0, x1] = load_pair(total + at + i, count);
      const auto [g0, g1] = load_pair(dy + at + i, count);
      const auto [w0, w1] = load_pair(weight + i, count);
      Vec d0 = rstd * (g0 * w0 - mean_gradient - (x0 - mean) * rstd * mean_slope);
      Vec d1 = rstd * (g1 * w1 - mean_gradient - (x1 - mean) * rstd * mean_slope);
      if (dtotal != nullptr) {
        const auto [t0, t1] = load_pair(dtotal + at + i, count);
        d0 = d0 + t0;
        d1 = d1 + t1;
      }
      store_pair(dx + at + i, d0, d1, count);
      if (dbranch != nullptr) store_pair(dbranch + at + i, d0, d1, count);
    });
  });
}

template <typename T>
T* pointer(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->mutable_data_ptr<T>() : nullptr;
}

// `run` with null pointers of the dtypes X, B and Y; B is X or Y, and Y is X where that has 16 bits.
template <typename Run>
void dispatch(const at::Tensor& x, const std::optional<at::Tensor>& branch, const at::Tensor& y, const Run& run) {
  with_dtype(x, [&](auto* stream) {
    using X = std::remove_pointer_t<decltype(stream)>;
    with_dtype(y, [&](auto* normed) {
      using Y = std::remove_pointer_t<decltype(normed)>;
      if constexpr (std::is_same_v<X, float> || std::is_same_v<X, Y>) {
        if (branch.has_value() && branch->scalar_type() == y.scalar_type()) return run(stream, normed, normed);
        TORCH_CHECK_TYPE(!branch.has_value() || branch->scalar_type() == x.scalar_type(),
                         "fastvitc: no native kernel for a branch of ", branch->scalar_type());
        run(stream, stream, normed);
      } else {
        TORCH_CHECK_TYPE(false, "fastvitc: no native kernel from ", x.scalar_type(), " to ", y.scalar_type());
      }
    });
  });
}

// total is written where there is a branch.
void add_layer_norm_forward(
    const at::Tensor& x, const std::optional<at::Tensor>& branch, const at::Tensor& weight, const at::Tensor& bias,
    double eps, const std::optional<at::Tensor>& total, at::Tensor y, at::Tensor saved) {
  const int64_t columns = x.size(-1), rows = x.numel() / std::max<int64_t>(columns, 1);
  dispatch(x, branch, y, [&](auto* stream, auto* other, auto* normed) {
    using X = std::remove_pointer_t<decltype(stream)>;
    using B = std::remove_pointer_t<decltype(other)>;
    using Y = std::remove_pointer_t<decltype(normed)>;
    forward(rows, columns, x.const_data_ptr<X>(), pointer<B>(branch), weight.const_data_ptr<float>(),
            bias.const_data_ptr<float>(), static_cast<float>(eps), pointer<X>(total), y.mutable_data_ptr<Y>(),
            reinterpret_cast<Moments*>(saved.mutable_data_ptr<float>()));
  });
}

// dbranch is written where it is wanted and of another dtype than dx. dvectors (2, C): of the weight and the bias.
void add_layer_norm_backward(
    const std::optional<at::Tensor>& dtotal, const at::Tensor& dy, const at::Tensor& total, const at::Tensor& saved,
    const at::Tensor& weight, at::Tensor dx, const std::optional<at::Tensor>& dbranch, at::Tensor dvectors) {
  const int64_t columns = dx.size(-1), rows = dx.numel() / std::max<int64_t>(columns, 1);
  dispatch(dx, dbranch, dy, [&](auto* stream, auto* other, auto* normed) {
    using X = std::remove_pointer_t<decltype(stream)>;
    using B = std::remove_pointer_t<decltype(other)>;
    using Y = std::remove_pointer_t<decltype(normed)>;
    backward(rows, columns, pointer<X>(dtotal), dy.const_data_ptr<Y>(), total.const_data_ptr<X>(),
             reinterpret_cast<const Moments*>(saved.const_data_ptr<float>()), weight.const_data_ptr<float>(),
             dx.mutable_data_ptr<X>(), pointer<B>(dbranch), dvectors.mutable_data_ptr<float>());
  });
}

TORCH_LIBRARY_FRAGMENT(fastvitc_native, library) {
  library.def("add_layer_norm_forward(Tensor x, Tensor? branch, Tensor weight, Tensor bias, float eps, "
              "Tensor(a!)? total, Tensor(b!) y, Tensor(c!) saved) -> ()",
              &add_layer_norm_forward);
  library.def("add_layer_norm_backward(Tensor? dtotal, Tensor dy, Tensor total, Tensor saved, Tensor weight, "
              "Tensor(a!) dx, Tensor(b!)? dbranch, Tensor(c!) dvectors) -> ()",
              &add_layer_norm_backward);
}

}  // namespace
}  // namespace fastvitc
