// BatchNorm + ReLU over a matrix of rows (pixels of all images) by channels, in two passes each way: statistics and
// their application; sums of the gradient and the gradient of the input.
//
// Rows are taken in periods: the fewest rows that fill whole pairs of vectors, so that a pair of columns of periods has
// the same channels all the way down, whatever the number of channels. Blocks of periods have a fixed size and their
// partial results merge in order: the threads change nothing in a result.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <numeric>

#include "../native.h"

namespace fastvitc {
namespace {

constexpr int64_t kPair = 2 * kLane;
constexpr int64_t kBlock = 1 << 15;  // values of a block, about: it stays in a core's cache

struct Matrix {
  explicit Matrix(const at::Tensor& x)  // channels-last
      : channels(x.size(1)), values(x.numel()) {}
  int64_t channels, values;
  int64_t period = std::lcm(channels, 4 * kPair);  // the sum of a column is touched again four pairs later
  int64_t block = std::max<int64_t>(1, kBlock / period) * period;
  int64_t blocks = (values + block - 1) / block;
};

// One vector per channel, repeated over a period.
class Repeated {
 public:
  Repeated(const float* vector, const Matrix& m) : values_(m.period) {
    for (int64_t i = 0; i < m.period; i += m.channels) std::copy_n(vector, m.channels, values_ + i);
  }
  Pair operator[](int64_t column) const { return load_pair(values_ + column); }

 private:
  mutable Scratch<float> values_;
};

// body(number, begin, end) for each block of values, on all threads.
template <typename Body>
void for_each_block(const Matrix& m, const Body& body) {
  at::parallel_for(0, m.blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) body(b, b * m.block, std::min((b + 1) * m.block, m.values));
  });
}

// body(i, j, count) for each pair of vectors of a block: values [i, i + count), in columns [j, j + count) of a period.
template <typename Body>
inline void for_each_pair(const Matrix& m, int64_t begin, int64_t end, const Body& body) {
  for (int64_t first = begin; first < end; first += m.period) {
    const int64_t columns = std::min(m.period, end - first);
    int64_t j = 0;
    for (; j + kPair <= columns; j += kPair) body(first + j, j, std::integral_constant<int64_t, kPair>());
    if (j < columns) body(first + j, j, columns - j);
  }
}

template <typename T>
inline Pair load(const T* from, int64_t count) {
  return count == kPair ? load_pair(from) : load_pair(from, count);
}

template <typename T>
inline void store(T* to, const Vec& lo, const Vec& hi, int64_t count) {
  count == kPair ? store_pair(to, lo, hi) : store_pair(to, lo, hi, count);
}

inline void add(float* to, const Vec& lo, const Vec& hi) {
  (Vec::loadu(to) + lo).store(to);
  (Vec::loadu(to + kLane) + hi).store(to + kLane);
}

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

// Mean and sum of squared deviations of each channel in a block, in two passes.
template <typename T>
void block_statistics(const T* x, const Matrix& m, int64_t begin, int64_t end, float* mean, float* m2) {
  Scratch<float> sums(m.period), squares(m.period);
  for_each_pair(m, begin, end, [&](int64_t i, int64_t j, auto count) {
    const auto [x0, x1] = load(x + i, count);
    add(sums + j, x0, x1);
  });
  fold(sums, m, mean);
  const float rows = (end - begin) / m.channels;
  for (int64_t c = 0; c < m.channels; ++c) mean[c] /= rows;
  const Repeated means(mean, m);
  for_each_pair(m, begin, end, [&](int64_t i, int64_t j, auto count) {
    const auto [x0, x1] = load(x + i, count);
    const auto [mean0, mean1] = means[j];
    const Vec d0 = Vec::set(Vec(0), x0 - mean0, count);
    const Vec d1 = Vec::set(Vec(0), x1 - mean1, std::max<int64_t>(count - kLane, 0));
    add(squares + j, d0 * d0, d1 * d1);
  });
  fold(squares, m, m2);
}

// Mean and biased variance; blocks merge by Chan, Golub and LeVeque (1983), equation 2.1.
template <typename T>
void statistics(const T* x, const Matrix& m, float* mean, float* var) {
  Scratch<float> partial(m.blocks * 2 * m.channels);
  for_each_block(m, [&](int64_t b, int64_t begin, int64_t end) {
    float* part = partial + b * 2 * m.channels;
    block_statistics(x, m, begin, end, part, part + m.channels);
  });
  std::fill_n(mean, m.channels, 0.0f);
  std::fill_n(var, m.channels, 0.0f);
  for (int64_t b = 0; b < m.blocks; ++b) {
    const float* part = partial + b * 2 * m.channels;
    const float before = b * m.block / m.channels;
    const float rows = std::min(m.block, m.values - b * m.block) / m.channels;
    const float share = rows / (before + rows);
    for (int64_t c = 0; c < m.channels; ++c) {
      const float delta = part[c] - mean[c];
      mean[c] += delta * share;
      var[c] += part[m.channels + c] + delta * delta * before * share;
    }
  }
  for (int64_t c = 0; c < m.channels; ++c) var[c] /= static_cast<float>(m.values / m.channels);
}

// y = relu(scale * x + shift)
template <typename T>
void normalize(const T* x, const Matrix& m, const float* vectors, T* y) {
  const Repeated scales(vectors + 2 * m.channels, m), shifts(vectors + 3 * m.channels, m);
  for_each_block(m, [&](int64_t, int64_t begin, int64_t end) {
    for_each_pair(m, begin, end, [&](int64_t i, int64_t j, auto count) {
      const auto [x0, x1] = load(x + i, count);
      const Pair scale = scales[j], shift = shifts[j];
      const Vec y0 = normalized(x0, scale.lo, shift.lo), y1 = normalized(x1, scale.hi, shift.hi);
      store(y + i, at::vec::clamp_min(y0, Vec(0)), at::vec::clamp_min(y1, Vec(0)), count);
    });
  });
}

// For each channel the sums of dy' * (x - mean) and of dy'.
template <typename T>
void gradient_sums(const T* dy, const T* x, const Matrix& m, const float* vectors, float* sums) {
  const Repeated means(vectors, m), scales(vectors + 2 * m.channels, m), shifts(vectors + 3 * m.channels, m);
  Scratch<float> partial(m.blocks * 2 * m.channels);
  for_each_block(m, [&](int64_t b, int64_t begin, int64_t end) {
    Scratch<float> products(m.period), plain(m.period);
    for_each_pair(m, begin, end, [&](int64_t i, int64_t j, auto count) {
      const auto [x0, x1] = load(x + i, count);
      const auto [dy0, dy1] = load(dy + i, count);
      const Pair mean = means[j], scale = scales[j], shift = shifts[j];
      const Vec g0 = masked(dy0, x0, scale.lo, shift.lo), g1 = masked(dy1, x1, scale.hi, shift.hi);
      add(products + j, g0 * (x0 - mean.lo), g1 * (x1 - mean.hi));
      add(plain + j, g0, g1);
    });
    float* part = partial + b * 2 * m.channels;
    fold(products, m, part);
    fold(plain, m, part + m.channels);
  });
  std::fill_n(sums, 2 * m.channels, 0.0f);
  for (int64_t b = 0; b < m.blocks; ++b) {
    for (int64_t c = 0; c < 2 * m.channels; ++c) sums[c] += partial[b * 2 * m.channels + c];
  }
}

// dx = scale * dy' + (slope * x + constant)
template <typename T>
void input_gradient(
    const T* dy, const T* x, const Matrix& m, const float* vectors, const float* coefficients, T* dx) {
  const Repeated scales(vectors + 2 * m.channels, m), shifts(vectors + 3 * m.channels, m);
  const Repeated slopes(coefficients + m.channels, m), constants(coefficients + 2 * m.channels, m);
  for_each_block(m, [&](int64_t, int64_t begin, int64_t end) {
    for_each_pair(m, begin, end, [&](int64_t i, int64_t j, auto count) {
      const auto [x0, x1] = load(x + i, count);
      const auto [dy0, dy1] = load(dy + i, count);
      const Pair scale = scales[j], shift = shifts[j], slope = slopes[j], constant = constants[j];
      const Vec g0 = masked(dy0, x0, scale.lo, shift.lo), g1 = masked(dy1, x1, scale.hi, shift.hi);
      const Vec rest0 = at::vec::fmadd(slope.lo, x0, constant.lo), rest1 = at::vec::fmadd(slope.hi, x1, constant.hi);
      store(dx + i, at::vec::fmadd(scale.lo, g0, rest0), at::vec::fmadd(scale.hi, g1, rest1), count);
    });
  });
}

// `run` with a null pointer of the tensor's dtype.
template <typename Run>
void dispatch(const at::Tensor& tensor, const Run& run) {
  AT_DISPATCH_SWITCH(
      tensor.scalar_type(), "fastvitc",
      AT_DISPATCH_CASE(at::kFloat, [&] { run(static_cast<float*>(nullptr)); })
      AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES([&] { run(static_cast<scalar_t*>(nullptr)); }));
}

void bn_relu_statistics(const at::Tensor& x, at::Tensor mean, at::Tensor var) {
  dispatch(x, [&](auto* value) {
    using T = std::remove_pointer_t<decltype(value)>;
    statistics(x.const_data_ptr<T>(), Matrix(x), mean.mutable_data_ptr<float>(), var.mutable_data_ptr<float>());
  });
}

void bn_relu_normalize(const at::Tensor& x, const at::Tensor& vectors, at::Tensor y) {
  dispatch(x, [&](auto* value) {
    using T = std::remove_pointer_t<decltype(value)>;
    normalize(x.const_data_ptr<T>(), Matrix(x), vectors.const_data_ptr<float>(), y.mutable_data_ptr<T>());
  });
}

void bn_relu_gradient_sums(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& vectors, at::Tensor sums) {
  dispatch(x, [&](auto* value) {
    using T = std::remove_pointer_t<decltype(value)>;
    gradient_sums(dy.const_data_ptr<T>(), x.const_data_ptr<T>(), Matrix(x), vectors.const_data_ptr<float>(),
                  sums.mutable_data_ptr<float>());
  });
}

void bn_relu_input_gradient(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& vectors, const at::Tensor& coefficients,
    at::Tensor dx) {
  dispatch(x, [&](auto* value) {
    using T = std::remove_pointer_t<decltype(value)>;
    input_gradient(dy.const_data_ptr<T>(), x.const_data_ptr<T>(), Matrix(x), vectors.const_data_ptr<float>(),
                   coefficients.const_data_ptr<float>(), dx.mutable_data_ptr<T>());
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
