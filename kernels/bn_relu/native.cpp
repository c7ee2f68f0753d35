// BatchNorm + ReLU over a matrix of rows (pixels of all images) by channels, in two passes each way: statistics and
// their application; sums of the gradient and the gradient of the input.
//
// Rows are taken in periods: as many of them as fill whole pairs of vectors, so that each pair always has the same
// channels, whatever the number of channels. The last period may be short.

#include <torch/library.h>

#include <numeric>

#include "../cpu/rows.h"

namespace fastvitc {
namespace {

constexpr int64_t kBlock = 1 << 15;  // values, about, whose statistics are taken while they are in a core's cache

struct Matrix {
  explicit Matrix(const at::Tensor& x)  // channels-last
      : channels(x.size(1)), values(x.numel()) {}
  int64_t channels, values;
  int64_t period = std::lcm(channels, 8 * kLane);  // four pairs of sums take turns, so that none waits for its last addition
  int64_t periods = (values + period - 1) / period;

  // strip(i, j, count) for each pair of vectors of one period: `count` values at i, from column j of the period.
  template <typename Strip>
  void for_each_strip_of(int64_t index, const Strip& strip) const {
    const int64_t first = index * period;
    for_each_strip(std::min(period, values - first), [&](int64_t j, auto count) { strip(first + j, j, count); });
  }

  // The same for all periods, on all threads.
  template <typename Strip>
  void for_each_strip_in_parallel(const Strip& strip) const {
    at::parallel_for(0, periods, std::max<int64_t>(1, kBlock / period), [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) for_each_strip_of(index, strip);
    });
  }
};

// One vector per channel, repeated over a period.
class Repeated {
 public:
  Repeated(const float* vector, const Matrix& m) : values_(m.period) {
    for (int64_t i = 0; i < m.period; i += m.channels) std::copy_n(vector, m.channels, &values_[i]);
  }
  Pair operator[](int64_t column) const { return load_pair(&values_[column]); }

 private:
  std::vector<float> values_;
};

// The sums of each channel from those of each column of a period.
void fold(const float* columns, const Matrix& m, float* sums) {
  std::copy_n(columns, m.channels, sums);
  for (int64_t i = m.channels; i < m.period; i += m.channels) {
    for (int64_t c = 0; c < m.channels; ++c) sums[c] += columns[i + c];
  }
}

// What the ReLU clips; forward and backward must agree on its sign.
inline Vec normalized(const Vec& x, const Vec& scale, const Vec& shift) {
  return at::vec::fmadd(x, scale, shift);
}

// dy where the ReLU lets it through, else 0.
inline Vec masked(const Vec& dy, const Vec& x, const Vec& scale, const Vec& shift) {
  return dy & (normalized(x, scale, shift) > Vec(0));
}

// The sums of value(x - centre) of each channel over some periods.
template <typename T, typename Value>
void sum_deviations(
    const T* x, const Matrix& m, int64_t begin, int64_t end, const float* centre, const Value& value, float* sums) {
  const Repeated centres(centre, m);
  std::vector<float> columns(m.period);
  for (int64_t index = begin; index < end; ++index) {
    m.for_each_strip_of(index, [&](int64_t i, int64_t j, auto count) {
      const auto [x0, x1] = load_pair(x + i, count);
      const auto [centre0, centre1] = centres[j];
      const Vec d0 = Vec::set(Vec(0), x0 - centre0, count);
      const Vec d1 = Vec::set(Vec(0), x1 - centre1, std::max<int64_t>(count - kLane, 0));
      add_to(&columns[j], value(d0), value(d1));
    });
  }
  fold(columns.data(), m, sums);
}

// Rows, mean and sum of squared deviations of each channel in some periods, in two passes. The first is of deviations
// too, from the first row: the sum of the values themselves would round a mean that is large beside the deviation.
template <typename T>
float block_statistics(const T* x, const Matrix& m, int64_t begin, int64_t end, float* mean, float* m2) {
  const float rows = (std::min(end * m.period, m.values) - begin * m.period) / m.channels;
  convert(x + begin * m.period, mean, m.channels);
  sum_deviations(x, m, begin, end, mean, [](const Vec& d) { return d; }, m2);
  for (int64_t c = 0; c < m.channels; ++c) mean[c] += m2[c] / rows;
  sum_deviations(x, m, begin, end, mean, [](const Vec& d) { return d * d; }, m2);
  return rows;
}

// Mean and biased variance; blocks merge in order by Chan, Golub and LeVeque (1983), equation 2.1, in float64: a rounding
// of the mean for each block would add up.
template <typename T>
void statistics(const T* x, const Matrix& m, float* mean, float* var) {
  const int64_t size = std::max<int64_t>(1, kBlock / m.period), blocks = (m.periods + size - 1) / size;
  std::vector<float> rows(blocks), means(blocks * m.channels), squares(blocks * m.channels);
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t at = b * m.channels;
      rows[b] = block_statistics(x, m, b * size, std::min(m.periods, (b + 1) * size), &means[at], &squares[at]);
    }
  });
  for (int64_t c = 0; c < m.channels; ++c) {
    double count = 0, centre = 0, m2 = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const double delta = means[b * m.channels + c] - centre, share = rows[b] / (count + rows[b]);
      centre += delta * share;
      m2 += squares[b * m.channels + c] + delta * delta * count * share;
      count += rows[b];
    }
    mean[c] = centre;
    var[c] = m2 / count;
  }
}

void bn_relu_statistics(const at::Tensor& x, at::Tensor mean, at::Tensor var) {
  with_dtype(x, [&](auto* value) {
    using T = std::remove_pointer_t<decltype(value)>;
    statistics(x.const_data_ptr<T>(), Matrix(x), mean.mutable_data_ptr<float>(), var.mutable_data_ptr<float>());
  });
}

// y = relu(scale * x + shift)
void bn_relu_normalize(const at::Tensor& x, const at::Tensor& vectors, at::Tensor y) {
  const Matrix m(x);
  const float* rows = vectors.const_data_ptr<float>();
  const Repeated scales(rows + 2 * m.channels, m), shifts(rows + 3 * m.channels, m);
  with_dtype(x, [&](auto* value) {
    using T = std::remove_pointer_t<decltype(value)>;
    const T* in = x.const_data_ptr<T>();
    T* out = y.mutable_data_ptr<T>();
    m.for_each_strip_in_parallel([&](int64_t i, int64_t j, auto count) {
      const auto [x0, x1] = load_pair(in + i, count);
      const Pair scale = scales[j], shift = shifts[j];
      const Vec y0 = normalized(x0, scale.lo, shift.lo), y1 = normalized(x1, scale.hi, shift.hi);
      store_pair(out + i, at::vec::clamp_min(y0, Vec(0)), at::vec::clamp_min(y1, Vec(0)), count);
    });
  });
}

// For each channel the sums of dy' * (x - mean) and of dy', the rows of `sums`.
void bn_relu_gradient_sums(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& vectors, at::Tensor sums) {
  const Matrix m(x);
  const float* rows = vectors.const_data_ptr<float>();
  const Repeated means(rows, m), scales(rows + 2 * m.channels, m), shifts(rows + 3 * m.channels, m);
  std::vector<float> columns(2 * m.period);
  with_dtype(x, [&](auto* value) {
    using T = std::remove_pointer_t<decltype(value)>;
    const T *gradient = dy.const_data_ptr<T>(), *in = x.const_data_ptr<T>();
    sum_over_rows(m.periods, m.period, 2, columns.data(), [&](int64_t index, float* to) {
      m.for_each_strip_of(index, [&](int64_t i, int64_t j, auto count) {
        const auto [x0, x1] = load_pair(in + i, count);
        const auto [dy0, dy1] = load_pair(gradient + i, count);
        const Pair mean = means[j], scale = scales[j], shift = shifts[j];
        const Vec g0 = masked(dy0, x0, scale.lo, shift.lo), g1 = masked(dy1, x1, scale.hi, shift.hi);
        add_to(to + j, g0 * (x0 - mean.lo), g1 * (x1 - mean.hi));
        add_to(to + m.period + j, g0, g1);
      });
    });
  });
  float* out = sums.mutable_data_ptr<float>();
  fold(columns.data(), m, out);
  fold(columns.data() + m.period, m, out + m.channels);
}

// dx = scale * dy' + (slope * x + constant); the last two are rows of `coefficients`.
void bn_relu_input_gradient(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& vectors, const at::Tensor& coefficients,
    at::Tensor dx) {
  const Matrix m(x);
  const float *rows = vectors.const_data_ptr<float>(), *of_x = coefficients.const_data_ptr<float>();
  const Repeated scales(rows + 2 * m.channels, m), shifts(rows + 3 * m.channels, m);
  const Repeated slopes(of_x + m.channels, m), constants(of_x + 2 * m.channels, m);
  with_dtype(x, [&](auto* value) {
    using T = std::remove_pointer_t<decltype(value)>;
    const T *gradient = dy.const_data_ptr<T>(), *in = x.const_data_ptr<T>();
    T* out = dx.mutable_data_ptr<T>();
    m.for_each_strip_in_parallel([&](int64_t i, int64_t j, auto count) {
      const auto [x0, x1] = load_pair(in + i, count);
      const auto [dy0, dy1] = load_pair(gradient + i, count);
      const Pair scale = scales[j], shift = shifts[j], slope = slopes[j], constant = constants[j];
      const Vec g0 = masked(dy0, x0, scale.lo, shift.lo), g1 = masked(dy1, x1, scale.hi, shift.hi);
      const Vec rest0 = at::vec::fmadd(slope.lo, x0, constant.lo), rest1 = at::vec::fmadd(slope.hi, x1, constant.hi);
      store_pair(out + i, at::vec::fmadd(scale.lo, g0, rest0), at::vec::fmadd(scale.hi, g1, rest1), count);
    });
  });
}

TORCH_LIBRARY_FRAGMENT(fastvitc_native, library) {
  library.def("bn_relu_statistics(Tensor x, Tensor(a!) mean, Tensor(b!) var) -> ()", &bn_relu_statistics);
  library.def("bn_relu_normalize(Tensor x, Tensor vectors, Tensor(a!) y) -> ()", &bn_relu_normalize);
  library.def("bn_relu_gradient_sums(Tensor dy, Tensor x, Tensor vectors, Tensor(a!) sums) -> ()",
              &bn_relu_gradient_sums);
  library.def("bn_relu_input_gradient(Tensor dy, Tensor x, Tensor vectors, Tensor coefficients, Tensor(a!) dx) -> ()",
              &bn_relu_input_gradient);
}

}  // namespace
}  // namespace fastvitc
