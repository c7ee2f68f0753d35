// Attention on the packed projection: forward and backward of one (image, head) at a time, each in one thread's cache.
//
// B batch, T tokens, N heads, D head dim; tokens and dims of scratch matrices are padded with zeros. A block of rows has
// its whole rows of scores at hand (kRows by T), so that nothing is rescaled.
// Scores, sums and gradients are float32; the operands of products are bfloat16 where those run as such.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "../cpu/products.h"

namespace fastvitc {
namespace {

constexpr int64_t kRows = 32;

// `t` and `d`: tokens and dims as scratch is laid out, zero at first beyond the tokens; `depth`: tokens that a product
// sums over.
struct Shape {
  int64_t tokens, heads, dim;
  int64_t t = round_up(tokens, kTile), d = round_up(dim, kTile);
  int64_t depth = round_up(tokens, 2);
};

// exp, only as exact as the dtype of the products that take it.
template <typename M>
inline Vec exponential(const Vec& x) {
  if constexpr (std::is_same_v<M, float>) {
    return x.exp();
  } else {
    return exp2(x * Vec(1.442695041f));
  }
}

// Copies the rows of one head, `stride` apart, to a dense (t, d) matrix with zeros around them. Meanwhile it fetches the
// rows of the next head into the cache, of the next image after the `last` head: the processor does not foresee them.
template <typename T, typename M>
void gather(const T* from, int64_t stride, bool last, const Shape& s, M* to) {
  constexpr size_t kCacheLine = 64;
  const int64_t ahead = last ? s.tokens * stride - (s.heads - 1) * s.dim : s.dim;
  for (int64_t row = 0; row < s.tokens; ++row) {
    convert(from + row * stride, to + row * s.d, s.dim);
    const auto next = reinterpret_cast<uintptr_t>(from + row * stride) + ahead * sizeof(T);  // may be beyond the tensor
    for (size_t i = 0; i < s.dim * sizeof(T); i += kCacheLine) __builtin_prefetch(reinterpret_cast<char*>(next + i), 0, 2);
    std::fill_n(to + row * s.d + s.dim, s.d - s.dim, M(0));
  }
  std::fill_n(to + s.tokens * s.d, (s.t - s.tokens) * s.d, M(0));
}

// Scores of one query to exp(scale * score - max) in the products' dtype; returns (max, sum).
template <typename M>
std::pair<float, float> softmax_row(float* scores, M* p, float scale, const Shape& s) {
  if (scale <= 0) {  // the largest product is not that of the largest score
    for (int64_t j = 0; j < s.tokens; ++j) scores[j] *= scale;
    scale = 1;
  }
  std::fill(scores + s.tokens, scores + s.t, -std::numeric_limits<float>::infinity());
  auto [top, other] = load_pair(scores);
  for (int64_t j = 2 * kLane; j < s.t; j += 2 * kLane) {
    const auto [lo, hi] = load_pair(scores + j);
    top = at::vec::maximum(top, lo);
    other = at::vec::maximum(other, hi);
  }
  const float max = scale * at::vec::vec_reduce_all<float>(
      [](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, at::vec::maximum(top, other));
  Vec total(0);
  for (int64_t j = 0; j < s.t; j += 2 * kLane) {
    auto [lo, hi] = load_pair(scores + j);
    lo = exponential<M>(at::vec::fmsub(lo, Vec(scale), Vec(max)));
    hi = exponential<M>(at::vec::fmsub(hi, Vec(scale), Vec(max)));
    total = total + (lo + hi);
    store_pair(p + j, lo, hi);
  }
  return {max, sum(total)};
}

// out (T, N*D) and lse (T) of one head.
template <typename T, typename M>
class Forward {
 public:
  explicit Forward(const Shape& s)
      : s_(s), q_(s.t * s.d), rows_(s.t * s.d), k_(s.t * s.d), v_(s.t * s.d), scores_(kRows * s.t), p_(kRows * s.t), o_(kRows * s.d) {}

  void operator()(const T* qkv, float scale, bool last, T* out, float* lse) {
    const int64_t width = s_.heads * s_.dim;
    gather<T, M>(qkv, 3 * width, last, s_, q_);
    gather<T, M>(qkv + width, 3 * width, last, s_, rows_);
    pack_transposed<M>(rows_, s_.t, s_.d, k_);
    gather<T, M>(qkv + 2 * width, 3 * width, last, s_, rows_);
    pack<M>(rows_, s_.t, s_.d, v_);
    for (int64_t first = 0; first < s_.tokens; first += kRows) {
      const int64_t rows = std::min(kRows, s_.tokens - first);
      multiply<M>(rows, s_.tokens, s_.d, q_ + first * s_.d, s_.d, k_, s_.t, scores_, s_.t, false);
      float sums[kRows];
      for (int64_t row = 0; row < rows; ++row) {
        auto [max, total] = softmax_row<M>(scores_ + row * s_.t, p_ + row * s_.t, scale, s_);
        sums[row] = total;
        lse[first + row] = max + std::log(total);
      }
      multiply<M>(rows, s_.d, s_.depth, p_, s_.t, v_, s_.d, o_, s_.d, false);
      for (int64_t row = 0; row < rows; ++row) {
        float* o = o_ + row * s_.d;
        for (int64_t j = 0; j < s_.d; j += kLane) (Vec::loadu(o + j) / Vec(sums[row])).store(o + j);
        convert<float, T>(o, out + (first + row) * width, s_.dim);
      }
    }
  }

 private:
  Shape s_;
  Scratch<M> q_, rows_, k_, v_;
  Scratch<float> scores_;
  Scratch<M> p_;
  Scratch<float> o_;
};

// dqkv (T, 3*N*D) of one head. Scores are transposed, keys by queries, so that the probabilities and their gradients
// come out as the left operands of dV = P^T dO and dK = dS^T Q. dQ^T = K^T dS^T grows over the blocks of keys.
template <typename T, typename M>
class Backward {
 public:
  explicit Backward(const Shape& s)
      : s_(s), rows_(s.t * s.d), k_(s.t * s.d), v_(s.t * s.d), kt_(s.t * s.d), qt_(s.t * s.d), dot_(s.t * s.d),
        q_(s.t * s.d), do_(s.t * s.d), p_(kRows * s.t), ds_(kRows * s.t), ds_packed_(kRows * s.t),
        scores_(kRows * s.t), dp_(kRows * s.t), lse_(s.t), delta_(s.t), dqt_(s.t * s.d), grad_(s.t * s.d) {}

  void operator()(const T* dout, const T* qkv, const T* out, const float* lse, float scale, bool last, T* dqkv) {
    const int64_t width = s_.heads * s_.dim;
    gather<T, M>(qkv, 3 * width, last, s_, rows_);
    pack_transposed<M>(rows_, s_.t, s_.d, qt_);
    pack<M>(rows_, s_.t, s_.d, q_);
    gather<T, M>(dout, width, last, s_, rows_);
    pack_transposed<M>(rows_, s_.t, s_.d, dot_);
    pack<M>(rows_, s_.t, s_.d, do_);
    gather<T, M>(qkv + width, 3 * width, last, s_, k_);
    pack_transposed<M>(k_, s_.t, s_.d, rows_);
    unpack<M>(rows_, s_.d, s_.t, kt_);
    gather<T, M>(qkv + 2 * width, 3 * width, last, s_, v_);
    for (int64_t row = 0; row < s_.tokens; ++row) delta_[row] = dot(dout + row * width, out + row * width);
    std::fill_n(delta_ + s_.tokens, s_.t - s_.tokens, 0.0f);
    std::copy_n(lse, s_.tokens, lse_ + 0);
    std::fill_n(lse_ + s_.tokens, s_.t - s_.tokens, std::numeric_limits<float>::infinity());
    for (int64_t first = 0; first < s_.tokens; first += kRows) {
      const int64_t rows = std::min(kRows, s_.tokens - first), depth = round_up(rows, 2);
      multiply<M>(rows, s_.tokens, s_.d, k_ + first * s_.d, s_.d, qt_, s_.t, scores_, s_.t, false);
      multiply<M>(rows, s_.tokens, s_.d, v_ + first * s_.d, s_.d, dot_, s_.t, dp_, s_.t, false);
      for (int64_t row = 0; row < rows; ++row) probabilities(row, scale);
      if (rows < depth) {  // a pair of rows is packed together
        std::fill_n(p_ + rows * s_.t, s_.t, M(0));
        std::fill_n(ds_ + rows * s_.t, s_.t, M(0));
      }
      pack<M>(ds_, depth, s_.t, ds_packed_);
      multiply<M>(s_.d, s_.tokens, depth, kt_ + first, s_.t, ds_packed_, s_.t, dqt_, s_.t, first > 0);
      T* dk = dqkv + first * 3 * width + width;
      multiply<M>(rows, s_.d, s_.depth, ds_, s_.t, q_, s_.d, grad_, s_.d, false);
      scatter(dk, rows);
      multiply<M>(rows, s_.d, s_.depth, p_, s_.t, do_, s_.d, grad_, s_.d, false);
      scatter(dk + width, rows);
    }
    transpose(dqt_, s_.t, grad_, s_.d, s_.d, s_.t);
    scatter(dqkv, s_.tokens);
  }

 private:
  // One key's row of P^T = exp(scale * scores - lse) and dS^T = scale * P^T (dP^T - delta).
  void probabilities(int64_t row, float scale) {
    const int64_t at = row * s_.t;
    const Vec factor(scale);
    for (int64_t j = 0; j < s_.t; j += 2 * kLane) {
      auto [x0, x1] = load_pair(scores_ + at + j);
      auto [l0, l1] = load_pair(lse_ + j);
      auto [g0, g1] = load_pair(dp_ + at + j);
      auto [e0, e1] = load_pair(delta_ + j);
      const Vec p0 = exponential<M>(at::vec::fmsub(x0, factor, l0));
      const Vec p1 = exponential<M>(at::vec::fmsub(x1, factor, l1));
      store_pair(p_ + at + j, p0, p1);
      store_pair(ds_ + at + j, p0 * factor * (g0 - e0), p1 * factor * (g1 - e1));
    }
  }

  float dot(const T* a, const T* b) {
    Vec total(0);
    for_each_strip(s_.dim, [&](int64_t i, int64_t count) {
      const auto [a0, a1] = load_pair(a + i, count);
      const auto [b0, b1] = load_pair(b + i, count);
      total = at::vec::fmadd(a0, b0, at::vec::fmadd(a1, b1, total));
    });
    return sum(total);
  }

  // The first `rows` rows of grad_ to rows of the packed gradient.
  void scatter(T* to, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
      convert<float, T>(grad_ + row * s_.d, to + row * 3 * s_.heads * s_.dim, s_.dim);
    }
  }

  Shape s_;
  Scratch<M> rows_, k_, v_, kt_, qt_, dot_, q_, do_, p_, ds_, ds_packed_;
  Scratch<float> scores_, dp_, lse_, delta_, dqt_, grad_;
};

// `head` for each (image, head), on all threads; each has its own Kernel.
template <typename Kernel, typename M, typename Head>
void for_each_head(int64_t batch, const Shape& s, const Head& head) {
  at::parallel_for(0, batch * s.heads, 1, [&](int64_t begin, int64_t end) {
    Kernel kernel(s);
    for (int64_t i = begin; i < end; ++i) head(kernel, i / s.heads, i % s.heads);
    release<M>();
  });
}

// `run` with null pointers of the tensor's dtype and of the dtype that its products are computed in.
template <typename Run>
void dispatch(const at::Tensor& tensor, const Run& run) {
  with_dtype(tensor, [&](auto* value) {
    if constexpr (std::is_same_v<decltype(value), BFloat16*>) {
      if (bfloat16_products()) return run(value, value);
    }
    run(value, static_cast<float*>(nullptr));
  });
}

void attention_forward(const at::Tensor& qkv, int64_t heads, double scale, at::Tensor out, at::Tensor lse) {
  const Shape s{qkv.size(1), heads, qkv.size(2) / (3 * heads)};
  dispatch(qkv, [&](auto* value, auto* product) {
    using T = std::remove_pointer_t<decltype(value)>;
    using M = std::remove_pointer_t<decltype(product)>;
    const T* in = qkv.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    float* sums = lse.mutable_data_ptr<float>();
    for_each_head<Forward<T, M>, M>(qkv.size(0), s, [&](auto& kernel, int64_t b, int64_t h) {
      const int64_t row = b * s.tokens * s.heads * s.dim, column = h * s.dim;
      kernel(in + 3 * row + column, scale, h + 1 == heads, to + row + column, sums + (b * s.heads + h) * s.tokens);
    });
  });
}

void attention_backward(
    const at::Tensor& dout, const at::Tensor& qkv, const at::Tensor& out, const at::Tensor& lse, int64_t heads,
    double scale, at::Tensor dqkv) {
  const Shape s{qkv.size(1), heads, qkv.size(2) / (3 * heads)};
  dispatch(qkv, [&](auto* value, auto* product) {
    using T = std::remove_pointer_t<decltype(value)>;
    using M = std::remove_pointer_t<decltype(product)>;
    const T *dy = dout.const_data_ptr<T>(), *in = qkv.const_data_ptr<T>(), *y = out.const_data_ptr<T>();
    const float* sums = lse.const_data_ptr<float>();
    T* to = dqkv.mutable_data_ptr<T>();
    for_each_head<Backward<T, M>, M>(qkv.size(0), s, [&](auto& kernel, int64_t b, int64_t h) {
      const int64_t at = b * s.tokens * s.heads * s.dim, column = h * s.dim;
      kernel(dy + at + column, in + 3 * at + column, y + at + column, sums + (b * s.heads + h) * s.tokens, scale,
             h + 1 == heads, to + 3 * at + column);
    });
  });
}

TORCH_LIBRARY_FRAGMENT(fastvitc_native, library) {
  library.def("attention_forward(Tensor qkv, int heads, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()",
              &attention_forward);
  library.def("attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int heads, float scale, "
              "Tensor(a!) dqkv) -> ()",
              &attention_backward);
}

}  // namespace
}  // namespace fastvitc
