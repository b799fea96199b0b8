#include "layer_norm.hpp"

#include <algorithm>
#include <cmath>

// One binary for every x86-64: the loader picks the widest vectors the processor has.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
#define BRC_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define BRC_VECTOR_CLONES
#endif

namespace brc {

BRC_VECTOR_CLONES
void bias_layer_norm_forward(NormShape shape, const float* x, const float* bias, const float* weight,
                             const float* shift, const float* residual, bool relu, float eps, float* y,
                             float* mean, float* rstd) {
  const std::int64_t width = shape.width;
  const float inverse_width = 1.0f / static_cast<float>(width);
  for (std::int64_t row = 0; row < shape.networks * shape.batch; ++row) {
    const std::int64_t network = row / shape.batch;
    const float* __restrict xr = x + row * width;
    const float* __restrict b = bias + network * width;
    const float* __restrict w = weight + network * width;
    const float* __restrict s = shift + network * width;
    float* __restrict yr = y + row * width;

    float sum = 0.0f;
    for (std::int64_t i = 0; i < width; ++i) {
      yr[i] = xr[i] + b[i];
      sum += yr[i];
    }
    const float m = sum * inverse_width;
    float squares = 0.0f;
    for (std::int64_t i = 0; i < width; ++i) {
      const float centred = yr[i] - m;
      squares += centred * centred;
    }
    const float r = 1.0f / std::sqrt(squares * inverse_width + eps);
    mean[row] = m;
    rstd[row] = r;
    if (relu) {
      for (std::int64_t i = 0; i < width; ++i) {
        const float out = (yr[i] - m) * r * w[i] + s[i];
        yr[i] = out < 0.0f ? 0.0f : out;  // keeps NaN
      }
    } else if (residual != nullptr) {
      const float* __restrict rr = residual + row * width;
      for (std::int64_t i = 0; i < width; ++i) yr[i] = (yr[i] - m) * r * w[i] + s[i] + rr[i];
    } else {
      for (std::int64_t i = 0; i < width; ++i) yr[i] = (yr[i] - m) * r * w[i] + s[i];
    }
  }
}

BRC_VECTOR_CLONES
void bias_layer_norm_backward(NormShape shape, const float* dy, const float* y, const float* x,
                              const float* bias, const float* weight, const float* mean, const float* rstd,
                              float* dx, float* dbias, float* dweight, float* dshift) {
  const std::int64_t width = shape.width;
  const float inverse_width = 1.0f / static_cast<float>(width);
  const bool parameters = dbias != nullptr;
  if (parameters) {
    std::fill_n(dbias, shape.networks * width, 0.0f);
    std::fill_n(dweight, shape.networks * width, 0.0f);
    std::fill_n(dshift, shape.networks * width, 0.0f);
  }
  for (std::int64_t row = 0; row < shape.networks * shape.batch; ++row) {
    const std::int64_t network = row / shape.batch;
    const float* __restrict g = dy + row * width;
    const float* __restrict xr = x + row * width;
    const float* __restrict b = bias + network * width;
    const float* __restrict w = weight + network * width;
    float* __restrict out = dx + row * width;
    const float m = mean[row];
    const float r = rstd[row];

    float sum = 0.0f;    // of the gradient of the normalised row
    float along = 0.0f;  // its part along the normalised row
    if (y != nullptr) {
      const float* __restrict yr = y + row * width;
      for (std::int64_t i = 0; i < width; ++i) out[i] = yr[i] > 0.0f ? g[i] : 0.0f;
    } else {
      for (std::int64_t i = 0; i < width; ++i) out[i] = g[i];
    }
    if (parameters) {
      float* __restrict dw = dweight + network * width;
      float* __restrict ds = dshift + network * width;
      for (std::int64_t i = 0; i < width; ++i) {
        dw[i] += out[i] * (xr[i] + b[i] - m) * r;
        ds[i] += out[i];
      }
    }
    for (std::int64_t i = 0; i < width; ++i) {
      const float scaled = out[i] * w[i];
      sum += scaled;
      along += scaled * (xr[i] + b[i] - m);
    }
    const float offset = sum * inverse_width;
    const float slope = along * r * r * inverse_width;
    for (std::int64_t i = 0; i < width; ++i) {
      out[i] = r * (out[i] * w[i] - offset - slope * (xr[i] + b[i] - m));
    }
    if (parameters) {
      float* __restrict db = dbias + network * width;
      for (std::int64_t i = 0; i < width; ++i) db[i] += out[i];
    }
  }
}

}  // namespace brc
