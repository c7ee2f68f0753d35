// uint8 images of any strides to normalised channels-last ones: a pixel value has 256 results in each channel, and they
// are looked up. Where a batch is mixed with itself, two results are added.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>

#include "../cpu/vectors.h"

namespace fastvitc {
namespace {

// fill(b, y, c, to) for each row y of each image b and each channel c: it writes the row's results, C apart, at `to`.
template <typename Value, typename Fill>
void for_each_row(const at::Tensor& image, at::Tensor& out, const Fill& fill) {
  const int64_t channels = image.size(1), height = image.size(2), width = image.size(3);
  auto* results = static_cast<Value*>(out.mutable_data_ptr());
  at::parallel_for(0, image.size(0) * height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t c = 0; c < channels; ++c) fill(row / height, row % height, c, results + row * width * channels + c);
    }
  });
}

// Value is an unsigned integer of the size of the result's dtype.
template <typename Value>
void look_up(const at::Tensor& image, const at::Tensor& table, at::Tensor& out) {
  const int64_t channels = image.size(1), width = image.size(3);
  const auto stride = image.strides();
  const uint8_t* pixels = image.const_data_ptr<uint8_t>();
  const auto* values = static_cast<const Value*>(table.const_data_ptr());
  for_each_row<Value>(image, out, [&](int64_t b, int64_t y, int64_t c, Value* to) {
    const uint8_t* from = pixels + b * stride[0] + y * stride[2] + c * stride[1];
    const Value* value = values + c * 256;
    for (int64_t i = 0; i < width; ++i) to[i * channels] = value[from[i * stride[3]]];
  });
}

// An edge of the box as an index from `least` to `size`: index i is past it where i >= edge.
int64_t index_of(float edge, int64_t least, int64_t size) {
  return std::clamp(static_cast<int64_t>(std::ceil(edge)), least, size);
}

template <typename Value>
void look_up_mixed(const at::Tensor& image, const at::Tensor& tables, const at::Tensor& mix, at::Tensor& out) {
  const int64_t batch = image.size(0), channels = image.size(1), height = image.size(2), width = image.size(3);
  const auto stride = image.strides();
  const uint8_t* pixels = image.const_data_ptr<uint8_t>();
  const float* plain = tables.const_data_ptr<float>();
  const float *own = plain + channels * 256, *other = own + channels * 256;
  const float* edges = mix.const_data_ptr<float>() + 1;
  const int64_t top = index_of(edges[0], 0, height), bottom = index_of(edges[1], top, height);
  const int64_t left = index_of(edges[2], 0, width), right = index_of(edges[3], left, width);
  for_each_row<Value>(image, out, [&](int64_t b, int64_t y, int64_t c, Value* to) {
    const int64_t place = y * stride[2] + c * stride[1], entry = c * 256;
    const uint8_t* from = pixels + b * stride[0] + place;
    const uint8_t* partner = pixels + (b == 0 ? batch - 1 : b - 1) * stride[0] + place;
    const auto outside = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i * channels] = plain[entry + from[i * stride[3]]];
    };
    if (y < top || y >= bottom) return outside(0, width);
    outside(0, left);
    for (int64_t i = left; i < right; ++i) {
      to[i * channels] = own[entry + from[i * stride[3]]] + other[entry + partner[i * stride[3]]];
    }
    outside(right, width);
  });
}

// table: (..., C, ..., 256) dense, out: channels-last, of one dtype
void look_up_any(const at::Tensor& image, const at::Tensor& table, at::Tensor out) {
  TORCH_CHECK_TYPE(out.element_size() == 4 || out.element_size() == 2, "fastvitc: no pixels of ", out.scalar_type());
  out.element_size() == 4 ? look_up<uint32_t>(image, table, out) : look_up<uint16_t>(image, table, out);
}

// tables: (3, ..., C, ..., 256) float32 dense: of a pixel outside the box; and the two terms of one inside, from its own
// image and from the one before it. mix: (5,) float32 dense, the last four are the box. out: channels-last.
void look_up_mixed_any(const at::Tensor& image, const at::Tensor& tables, const at::Tensor& mix, at::Tensor out) {
  with_dtype(out, [&](auto* value) {
    look_up_mixed<std::remove_pointer_t<decltype(value)>>(image, tables, mix, out);
  });
}

TORCH_LIBRARY_FRAGMENT(fastvitc_native, library) {
  library.def("look_up(Tensor image, Tensor table, Tensor(a!) out) -> ()", &look_up_any);
  library.def("look_up_mixed(Tensor image, Tensor tables, Tensor mix, Tensor(a!) out) -> ()", &look_up_mixed_any);
}

}  // namespace
}  // namespace fastvitc
