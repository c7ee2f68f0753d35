// uint8 images of any strides to normalised channels-last ones: a pixel value has 256 results in each channel, and they
// are looked up.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../cpu/vectors.h"

namespace fastvitc {
namespace {

// Value is an unsigned integer of the size of the result's dtype.
template <typename Value>
void look_up(const at::Tensor& image, const at::Tensor& table, at::Tensor& out) {
  const int64_t channels = image.size(1), height = image.size(2), width = image.size(3);
  const auto stride = image.strides();
  const uint8_t* pixels = image.const_data_ptr<uint8_t>();
  const auto* values = static_cast<const Value*>(table.const_data_ptr());
  auto* results = static_cast<Value*>(out.mutable_data_ptr());
  at::parallel_for(0, image.size(0) * height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t c = 0; c < channels; ++c) {
        const uint8_t* from = pixels + row / height * stride[0] + row % height * stride[2] + c * stride[1];
        const Value* value = values + c * 256;
        Value* to = results + row * width * channels + c;
        for (int64_t i = 0; i < width; ++i) to[i * channels] = value[from[i * stride[3]]];
      }
    }
  });
}

// table: (..., C, ..., 256) dense, out: channels-last, of one dtype
void look_up_any(const at::Tensor& image, const at::Tensor& table, at::Tensor out) {
  TORCH_CHECK_TYPE(out.element_size() == 4 || out.element_size() == 2, "fastvitc: no pixels of ", out.scalar_type());
  out.element_size() == 4 ? look_up<uint32_t>(image, table, out) : look_up<uint16_t>(image, table, out);
}

TORCH_LIBRARY_FRAGMENT(fastvitc_native, library) {
  library.def("look_up(Tensor image, Tensor table, Tensor(a!) out) -> ()", &look_up_any);
}

}  // namespace
}  // namespace fastvitc
