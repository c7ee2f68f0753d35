// What the CPU kernels of all ops share: vector loads and stores of every dtype as float32, dtypes, scratch memory.
// Everything here runs on one thread.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

namespace fastvitc {
namespace {  // each op's file has its own copy: they differ in nothing but the file they are compiled in

using at::BFloat16;
using at::Half;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLane = Vec::size();

inline int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// Memory of one thread, aligned to a cache line and zero at first.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<T*>(std::aligned_alloc(64, round_up(size * sizeof(T), 64)))) {
    if (data_ == nullptr && size > 0) throw std::bad_alloc();
    std::fill_n(data_, size, T(0));
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() { return data_; }

 private:
  T* data_;
};

// Two vectors of consecutive values, 2 * kLane in all.
struct Pair {
  Vec lo, hi;
};

template <typename T>
inline Pair load_pair(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return {Vec::loadu(from), Vec::loadu(from + kLane)};
  } else {
    auto [lo, hi] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from));
    return {lo, hi};
  }
}

// The first `count` values, 0 behind them.
template <typename T>
inline Pair load_pair(const T* from, int64_t count) {
  if (count == 2 * kLane) return load_pair(from);
  T values[2 * kLane] = {};
  std::copy_n(from, count, values);
  return load_pair(values);
}

template <typename T>
inline void store_pair(T* to, const Vec& lo, const Vec& hi) {
  if constexpr (std::is_same_v<T, float>) {
    lo.store(to);
    hi.store(to + kLane);
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(hi, lo)));
#endif
  } else {
    at::vec::convert_from_float<T>(lo, hi).store(to);
  }
}

template <typename T>
inline void store_pair(T* to, const Vec& lo, const Vec& hi, int64_t count) {
  if (count == 2 * kLane) return store_pair(to, lo, hi);
  T values[2 * kLane];
  store_pair(values, lo, hi);
  std::copy_n(values, count, to);
}

// Calls `strip(first, count)` along a row. `count` is 2 * kLane, a constant to the compiler where it is taken as `auto`;
// at the end it is what is left.
template <typename Strip>
inline void for_each_strip(int64_t size, const Strip& strip) {
  int64_t first = 0;
  for (; first + 2 * kLane <= size; first += 2 * kLane) strip(first, std::integral_constant<int64_t, 2 * kLane>());
  if (first < size) strip(first, size - first);
}

// to[0 .. count) = from[0 .. count), from dtype to dtype.
template <typename From, typename To>
inline void convert(const From* from, To* to, int64_t count) {
  if constexpr (std::is_same_v<From, To>) {
    using Whole = at::vec::Vectorized<To>;
    int64_t i = 0;
    for (; i + Whole::size() <= count; i += Whole::size()) Whole::loadu(from + i).store(to + i);
    std::copy_n(from + i, count - i, to + i);  // a call of its own for every row would cost as much as the rest
  } else {
    for_each_strip(count, [&](int64_t i, int64_t left) {
      const auto [lo, hi] = load_pair(from + i, left);
      store_pair(to + i, lo, hi, left);
    });
  }
}

// 2^x, relative error below 2e-7 (2^0 too is not exactly 1): a polynomial of the fraction, by the integer part. Zero and
// infinity at the ends, NaN of NaN.
inline Vec exp2(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int kFloor = 1;
  const Vec fraction = _mm512_reduce_ps(x, kFloor);
  Vec power(0.001877576671f);
  for (const float c : {0.008989340339f, 0.05582631759f, 0.2401536173f, 0.6931530731f, 0.9999999251f}) {
    power = at::vec::fmadd(power, fraction, Vec(c));
  }
  return _mm512_scalef_ps(power, x);
#else
  return x.exp2();
#endif
}

// 1/x where x and 1/x are normal numbers.
inline Vec reciprocal(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  const Vec near = _mm512_rcp14_ps(x);
  return near * at::vec::fnmadd(x, near, Vec(2.0f));
#else
  return Vec(1.0f) / x;
#endif
}

inline float sum(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, v);
}

// `run` with a null pointer of the tensor's dtype.
template <typename Run>
inline void with_dtype(const at::Tensor& tensor, const Run& run) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return run(static_cast<float*>(nullptr));
    case at::kHalf:
      return run(static_cast<Half*>(nullptr));
    case at::kBFloat16:
      return run(static_cast<BFloat16*>(nullptr));
    default:
      TORCH_CHECK_TYPE(false, "fastvitc: no native kernel for ", tensor.scalar_type());
  }
}

}  // namespace
}  // namespace fastvitc
