// What the CPU kernels of all ops share: vector loads and stores of every dtype as float32, small matrix products on
// libtorch's brgemm, and the layouts that it reads. Everything here runs on one thread.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

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
// Rows and columns of scratch matrices come in multiples of this: a transposition's tile, and a vector of every width.
constexpr int64_t kTile = 32;

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
  T values[2 * kLane];
  store_pair(values, lo, hi);
  std::copy_n(values, count, to);
}

// to[0 .. count) = from[0 .. count), from dtype to dtype.
template <typename From, typename To>
inline void convert(const From* from, To* to, int64_t count) {
  if constexpr (std::is_same_v<From, To>) {
    std::copy_n(from, count, to);
    return;
  }
  int64_t i = 0;
  for (; i + 2 * kLane <= count; i += 2 * kLane) {
    auto [lo, hi] = load_pair(from + i);
    store_pair(to + i, lo, hi);
  }
  if (i < count) {
    auto [lo, hi] = load_pair(from + i, count - i);
    store_pair(to + i, lo, hi, count - i);
  }
}

inline float sum(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, v);
}

// (rows, columns) to (columns, rows), both multiples of 16, of 32-bit units.
inline void transpose(const float* from, int64_t ld_from, float* to, int64_t ld_to, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += 16) {
    for (int64_t j = 0; j < columns; j += 16) {
      at::vec::transpose_mxn<float, 16, 16>(from + i * ld_from + j, ld_from, to + j * ld_to + i, ld_to);
    }
  }
}

// Whether products of bfloat16 run as such (AVX-512, AMX); otherwise kernels compute in float32. There is no such
// question in libtorch's interface, whose product raises where it cannot.
inline bool bfloat16_products() {
#if defined(__AVX512BF16__)
  static const bool found = [] {
    const BFloat16 a[2] = {1, 2}, b[2] = {3, 4};
    float c = 0;
    try {
      at::native::cpublas::brgemm(1, 1, 2, 2, 1, 1, false, a, b, &c, true);
    } catch (const c10::Error&) {
      return false;
    }
    at::native::cpublas::brgemm_release();
    return c == 11;
  }();
  return found;
#else
  return false;
#endif
}

// The layouts in which a product's right operand (K, N) is read: float32 by rows; bfloat16 with two rows interleaved,
// [K/2][N][2]. K and N are multiples of kTile, zeros beyond the matrix.

// Right operand = from, (K, N).
template <typename T>
inline void pack(const T* from, int64_t k, int64_t n, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    std::copy_n(from, k * n, to);
  } else {
    auto* source = reinterpret_cast<const uint16_t*>(from);
    auto* target = reinterpret_cast<uint32_t*>(to);
    for (int64_t row = 0; row < k; row += 2, source += 2 * n, target += n) {
      for (int64_t j = 0; j < n; ++j) target[j] = source[j] | static_cast<uint32_t>(source[n + j]) << 16;
    }
  }
}

// Right operand = the transpose of from, (N, K).
template <typename T>
inline void pack_transposed(const T* from, int64_t n, int64_t k, T* to) {
  constexpr int64_t units = sizeof(float) / sizeof(T);
  auto* source = reinterpret_cast<const float*>(from);
  transpose(source, k / units, reinterpret_cast<float*>(to), n, n, k / units);
}

// A packed right operand (K, N) back to rows.
template <typename T>
inline void unpack(const T* from, int64_t k, int64_t n, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    std::copy_n(from, k * n, to);
  } else {
    auto* source = reinterpret_cast<const uint32_t*>(from);
    auto* target = reinterpret_cast<uint16_t*>(to);
    for (int64_t row = 0; row < k; row += 2, source += n, target += 2 * n) {
      for (int64_t j = 0; j < n; ++j) target[j] = static_cast<uint16_t>(source[j]);
      for (int64_t j = 0; j < n; ++j) target[n + j] = static_cast<uint16_t>(source[j] >> 16);
    }
  }
}

// C (M, N) float32 = A (M, K) by rows times a packed B (K, N), added to C if `add`.
template <typename T>
inline void multiply(
    int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, !std::is_same_v<T, float>);
}

// Call once a thread's products are done: AMX tiles are configured until then.
template <typename T>
inline void release() {
  at::native::cpublas::brgemm_release(!std::is_same_v<T, float>);
}

}  // namespace
}  // namespace fastvitc
