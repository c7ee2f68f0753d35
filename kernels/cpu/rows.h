// Passes over a (rows, columns) matrix that also sum over its rows: in chunks of a fixed number of rows, each in one
// thread, whose sums are then added in order. The result does not depend on the number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "vectors.h"

namespace fastvitc {
namespace {

constexpr int64_t kChunkRows = 128;

// `row(index, sums)` for each row; `sums` are `count` vectors of the row's chunk, round_up(columns, 2 * kLane) apart,
// zero at first. Their totals go to `totals`, (count, columns).
template <typename Row>
void sum_over_rows(int64_t rows, int64_t columns, int64_t count, float* totals, const Row& row) {
  const int64_t stride = round_up(columns, 2 * kLane), chunks = (rows + kChunkRows - 1) / kChunkRows;
  std::vector<float> sums(chunks * count * stride, 0.0f);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin * kChunkRows; index < std::min(rows, end * kChunkRows); ++index) {
      row(index, sums.data() + index / kChunkRows * count * stride);
    }
  });
  std::fill_n(totals, count * columns, 0.0f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t vector = 0; vector < count; ++vector) {
      const float* from = sums.data() + (chunk * count + vector) * stride;
      for (int64_t i = 0; i < columns; ++i) totals[vector * columns + i] += from[i];
    }
  }
}

// to[0 .. 2 * kLane) += values.
inline void add_to(float* to, const Vec& lo, const Vec& hi) {
  const auto [a, b] = load_pair(to);
  store_pair(to, a + lo, b + hi);
}

}  // namespace
}  // namespace fastvitc
