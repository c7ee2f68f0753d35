// Small matrix products on libtorch's brgemm, which runs on AMX and AVX-512 (oneDNN), and the layouts that it reads.
// Everything here runs on one thread.
#pragma once

#include <ATen/native/CPUBlas.h>

#include "vectors.h"

namespace fastvitc {
namespace {

// Rows and columns of scratch matrices come in multiples of this: a transposition's tile, and a pair of every width.
constexpr int64_t kTile = 32;

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
