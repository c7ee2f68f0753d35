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
constexpr int64_t kBlock = 1 << 14;  // values of a block, about: it stays in a core's cache

struct Matrix {
  explicit Matrix(const at::Tensor& x)  // channels-last
      : channels(x.size(1)), values(x.numel()) {}
  int64_t channels, values;
  int64_t period = std::lcm(channels, kPair);
  int64_t block = std::max<int64_t>(1, kBlock / period) * period;
  int64_t blocks = (values + block - 1) / block;
};

// One vector per channel, repeated over a period.
class Repeated {
 public:
  Repeated(const float* vector, const Matrix& m) : values_(m.period) {
    for (int64_t i = 0; i < m.period; i += m.channels) std::copy_n(vector, m.channels, values_ + i);
  }
  Pair operator[](int64_t column) { return load_pair(values_ + column); }

 private:
  Scratch<float> values_;
};

// body(number, begin, end) for each block of values, on all threads.
template <typename Body>
void for_each_block(const Matrix& m, const Body& body) {
  at::parallel_for(0, m.blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) body(b, b * m.block, std::min((b + 1) * m.block, m.values));
  });
}

// body(i, count) down a pair of columns: the first `count` of a pair of vectors at i are in the matrix.
template <typename Body>
inline void down(int64_t begin, int64_t end, int64_t period, const Body& body) {
  int64_t i = begin;
  for (; i + kPair <= end; i += period) body(i, std::integral_constant<int64_t, kPair>());
  if (i < end) body(i, end - i);
}

template <typename T>
inline Pair load(const T* from, int64_t count) {
  return count == kPair ? load_pair(from) : load_pair(from, count);
}

template <typename T>
inline void store(T* to, const Vec& lo, const Vec& hi, int64_t count) {
  count == kPair ? store_pair(to, lo, hi) : store_pair(to, lo, hi, count);
}

// The sums of each channel from those of each column of a period.
void fold(const float* columns, const Matrix& m, float* sums) {
  std::copy_n(columns, m.channels, sums);
  for (int64_t i = m.channels; i < m.period; ++i) sums[i % m.channels] += columns[i];
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
  Scratch<float> columns(m.period);
  for (int64_t j = 0; j < m.period; j += kPair) {
    Vec lo(0), hi(0);
    down(begin + j, end, m.period, [&](int64_t i, auto count) {
      const auto [x0, x1] = load(x + i, count);
      lo = lo + x0;
      hi = hi + x1;
    });
    store_pair(columns + j, lo, hi);
  }
  fold(columns, m, mean);
  const float rows = (end - begin) / m.channels;
  for (int64_t c = 0; c < m.channels; ++c) mean[c] /= rows;
  Repeated means(mean, m);
  for (int64_t j = 0; j < m.period; j += kPair) {
    const auto [mean0, mean1] = means[j];
    Vec lo(0), hi(0);
    down(begin + j, end, m.period, [&](int64_t i, auto count) {
      const auto [x0, x1] = load(x + i, count);
      const Vec d0 = Vec::set(Vec(0), x0 - mean0, count);
      const Vec d1 = Vec::set(Vec(0), x1 - mean1, std::max<int64_t>(count - kLane, 0));
      lo = at::vec::fmadd(d0, d0, lo);
      hi = at::vec::fmadd(d1, d1, hi);
    });
    store_pair(columns + j, lo, hi);
  }
  fold(columns, m, m2);
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
  Repeated scales(vectors + 2 * m.channels, m), shifts(vectors + 3 * m.channels, m);
  for_each_block(m, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t j = 0; j < m.period; j += kPair) {
      const Pair scale = scales[j], shift = shifts[j];
      down(begin + j, end, m.period, [&](int64_t i, auto count) {
        const auto [x0, x1] = load(x + i, count);
        const Vec y0 = normalized(x0, scale.lo, shift.lo), y1 = normalized(x1, scale.hi, shift.hi);
        store(y + i, at::vec::clamp_min(y0, Vec(0)), at::vec::clamp_min(y1, Vec(0)), count);
      });
    }
  });
}

// For each channel the sums of dy' * (x - mean) and of dy'.
template <typename T>
void gradient_sums(const T* dy, const T* x, const Matrix& m, const float* vectors, float* sums) {
  Repeated means(vectors, m), scales(vectors + 2 * m.channels, m), shifts(vectors + 3 * m.channels, m);
  Scratch<float> partial(m.blocks * 2 * m.channels);
  for_each_block(m, [&](int64_t b, int64_t begin, int64_t end) {
    Scratch<float> products(m.period), plain(m.period);
    for (int64_t j = 0; j < m.period; j += kPair) {
      const Pair mean = means[j], scale = scales[j], shift = shifts[j];
      Vec product0(0), product1(0), plain0(0), plain1(0);
      down(begin + j, end, m.period, [&](int64_t i, auto count) {
        const auto [x0, x1] = load(x + i, count);
        const auto [dy0, dy1] = load(dy + i, count);
        const Vec g0 = masked(dy0, x0, scale.lo, shift.lo), g1 = masked(dy1, x1, scale.hi, shift.hi);
        product0 = at::vec::fmadd(g0, x0 - mean.lo, product0);
        product1 = at::vec::fmadd(g1, x1 - mean.hi, product1);
        plain0 = plain0 + g0;
        plain1 = plain1 + g1;
      });
      store_pair(products + j, product0, product1);
      store_pair(plain + j, plain0, plain1);
    }
    float* part = partial + b * 2 * m.channels;
    fold(products, m, part);
    fold(plain, m, part + m.channels);
  });
  std::fill_n(sums, 2 * m.channels, 0.0f);
  for (int64_t b = 0; b < m.blocks; ++b) {
    for (int64_t c = 0; c < 2 * m.channels; ++c) sums[c] += partial[b * 2 * m.channels + c];
  }
}

// dx = a * dy' + (slope * x + constant), a = scale
template <typename T>
void input_gradient(
    const T* dy, const T* x, const Matrix& m, const float* vectors, const float* coefficients, T* dx) {
  Repeated scales(vectors + 2 * m.channels, m), shifts(vectors + 3 * m.channels, m);
  Repeated slopes(coefficients + m.channels, m), constants(coefficients + 2 * m.channels, m);
  for_each_block(m, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t j = 0; j < m.period; j += kPair) {
      const Pair scale = scales[j], shift = shifts[j], slope = slopes[j], constant = constants[j];
      down(begin + j, end, m.period, [&](int64_t i, auto count) {
        const auto [x0, x1] = load(x + i, count);
        const auto [dy0, dy1] = load(dy + i, count);
        const Vec g0 = masked(dy0, x0, scale.lo, shift.lo), g1 = masked(dy1, x1, scale.hi, shift.hi);
        const Vec rest0 = at::vec::fmadd(slope.lo, x0, constant.lo), rest1 = at::vec::fmadd(slope.hi, x1, constant.hi);
        store(dx + i, at::vec::fmadd(scale.lo, g0, rest0), at::vec::fmadd(scale.hi, g1, rest1), count);
      });
    }
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
