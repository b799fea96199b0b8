#include "layer_norm.hpp"

#include <algorithm>
#include <cmath>

#include "vector_clones.hpp"

namespace brc {
namespace {

// Several rows go through a sweep together: parameters and their gradients are loaded once for all of them,
// and their sums do not wait for each other. The rows stay in the first cache from sweep to sweep. Of rows
// wider than this 2 are fastest, of others 4.
constexpr std::int64_t NARROW = 128;

// Brings rows that come next into the first cache while these are computed: several wide rows at a time are
// no pattern that a processor foresees. It pays in the forward pass only.
BRC_INLINE void prefetch(const float* rows, std::int64_t count) {
#if defined(__GNUC__)
  for (std::int64_t i = 0; i < count; i += 16) __builtin_prefetch(rows + i);
#else
  static_cast<void>(rows);
  static_cast<void>(count);
#endif
}

struct Parameters {
  const float* bias;
  const float* weight;
  const float* shift;
};

enum class End { plain, relu, residual };

template <int ROWS, End END>
BRC_INLINE void forward_rows(std::int64_t width, Parameters parameters, const float* __restrict x,
                             const float* __restrict residual, float eps, float* __restrict y,
                             float* __restrict mean, float* __restrict rstd, std::int64_t ahead) {
  const float* __restrict b = parameters.bias;
  const float* __restrict w = parameters.weight;
  const float* __restrict s = parameters.shift;
  const float inverse_width = 1.0f / static_cast<float>(width);
  float m[ROWS] = {}, r[ROWS] = {};
  BRC_INDEPENDENT
  for (std::int64_t i = 0; i < width; ++i) {
    float h[ROWS];
    BRC_UNROLLED
    for (int k = 0; k < ROWS; ++k) h[k] = x[k * width + i] + b[i];
    BRC_UNROLLED
    for (int k = 0; k < ROWS; ++k) {
      y[k * width + i] = h[k];
      m[k] += h[k];
    }
  }
  for (int k = 0; k < ROWS; ++k) m[k] *= inverse_width;
  prefetch(x + ROWS * width, ahead);
  prefetch(y + ROWS * width, ahead);
  BRC_INDEPENDENT
  for (std::int64_t i = 0; i < width; ++i) {
    BRC_UNROLLED
    for (int k = 0; k < ROWS; ++k) {
      const float centred = y[k * width + i] - m[k];
      r[k] += centred * centred;
    }
  }
  for (int k = 0; k < ROWS; ++k) {
    r[k] = 1.0f / std::sqrt(r[k] * inverse_width + eps);
    mean[k] = m[k];
    rstd[k] = r[k];
  }
  BRC_INDEPENDENT
  for (std::int64_t i = 0; i < width; ++i) {
    float out[ROWS];
    BRC_UNROLLED
    for (int k = 0; k < ROWS; ++k) {
      const float normed = (y[k * width + i] - m[k]) * r[k] * w[i] + s[i];
      if constexpr (END == End::relu) {
        out[k] = normed < 0.0f ? 0.0f : normed;  // keeps NaN
      } else if constexpr (END == End::residual) {
        out[k] = normed + residual[k * width + i];
      } else {
        out[k] = normed;
      }
    }
    BRC_UNROLLED
    for (int k = 0; k < ROWS; ++k) y[k * width + i] = out[k];
  }
}

// How many floats of the next block are worth a prefetch.
template <int ROWS>
BRC_INLINE std::int64_t floats_ahead(std::int64_t row, std::int64_t end, std::int64_t width) {
  return ROWS == 2 && row + 2 * ROWS <= end ? ROWS * width : 0;
}

// Whole blocks of the rows from `row` to `end`; returns the first row that is left.
template <int ROWS, End END>
BRC_INLINE std::int64_t forward_blocks(std::int64_t row, std::int64_t end, std::int64_t width, Parameters own,
                                       const float* x, const float* residual, float eps, float* y,
                                       float* mean, float* rstd) {
  for (; row + ROWS <= end; row += ROWS) {
    const std::int64_t at = row * width;
    const float* added = END == End::residual ? residual + at : nullptr;
    forward_rows<ROWS, END>(width, own, x + at, added, eps, y + at, mean + row, rstd + row,
                            floats_ahead<ROWS>(row, end, width));
  }
  return row;
}

template <End END>
BRC_INLINE void forward(NormShape shape, std::int64_t bias_stride, std::int64_t parameter_stride,
                        const float* x, Parameters all, const float* residual, float eps, float* y,
                        float* mean, float* rstd) {
  const std::int64_t width = shape.width;
  for (std::int64_t network = 0; network < shape.networks; ++network) {
    const std::int64_t offset = network * parameter_stride;
    const Parameters own = {all.bias + network * bias_stride, all.weight + offset, all.shift + offset};
    const std::int64_t end = (network + 1) * shape.batch;
    std::int64_t row = network * shape.batch;
    if (width <= NARROW) row = forward_blocks<4, END>(row, end, width, own, x, residual, eps, y, mean, rstd);
    row = forward_blocks<2, END>(row, end, width, own, x, residual, eps, y, mean, rstd);
    forward_blocks<1, END>(row, end, width, own, x, residual, eps, y, mean, rstd);
  }
}

// dy and dx may be one buffer; what is added to `d` is the sum over these rows.
template <int ROWS, bool RELU, bool WANTED>
BRC_INLINE void backward_rows(std::int64_t width, Parameters parameters, const float* dy,
                              const float* __restrict x, const float* __restrict mean,
                              const float* __restrict rstd, float* dx, float* __restrict dbias,
                              float* __restrict dweight, float* __restrict dshift) {
  const float* __restrict b = parameters.bias;
  const float* __restrict w = parameters.weight;
  const float* __restrict s = parameters.shift;
  const float inverse_width = 1.0f / static_cast<float>(width);
  float m[ROWS], r[ROWS];
  float sum[ROWS] = {};    // of the gradient of the normalised row
  float along[ROWS] = {};  // its part along the normalised row
  for (int k = 0; k < ROWS; ++k) {
    m[k] = mean[k];
    r[k] = rstd[k];
  }
  BRC_INDEPENDENT
  for (std::int64_t i = 0; i < width; ++i) {
    float g[ROWS];
    float weight_sum = 0.0f, shift_sum = 0.0f;
    BRC_UNROLLED
    for (int k = 0; k < ROWS; ++k) {
      const float normed = (x[k * width + i] + b[i] - m[k]) * r[k];
      g[k] = dy[k * width + i];
      if constexpr (RELU) g[k] = normed * w[i] + s[i] > 0.0f ? g[k] : 0.0f;
      const float scaled = g[k] * w[i];
      sum[k] += scaled;
      along[k] += scaled * normed;
      weight_sum += g[k] * normed;
      shift_sum += g[k];
    }
    BRC_UNROLLED
    for (int k = 0; k < ROWS; ++k) dx[k * width + i] = g[k];
    if constexpr (WANTED) {
      dweight[i] += weight_sum;
      dshift[i] += shift_sum;
    }
  }
  float offset[ROWS], slope[ROWS];
  for (int k = 0; k < ROWS; ++k) {
    offset[k] = sum[k] * inverse_width;
    slope[k] = along[k] * r[k] * inverse_width;
  }
  BRC_INDEPENDENT
  for (std::int64_t i = 0; i < width; ++i) {
    float out[ROWS];
    float bias_sum = 0.0f;
    BRC_UNROLLED
    for (int k = 0; k < ROWS; ++k) {
      const float centred = x[k * width + i] + b[i] - m[k];
      out[k] = r[k] * (dx[k * width + i] * w[i] - offset[k] - slope[k] * centred);
      bias_sum += out[k];
    }
    BRC_UNROLLED
    for (int k = 0; k < ROWS; ++k) dx[k * width + i] = out[k];
    if constexpr (WANTED) dbias[i] += bias_sum;
  }
}

template <int ROWS, bool RELU, bool WANTED>
BRC_INLINE std::int64_t backward_blocks(std::int64_t row, std::int64_t end, std::int64_t width,
                                        Parameters own, const float* dy, const float* x, const float* mean,
                                        const float* rstd, float* dx, float* db, float* dw, float* ds) {
  for (; row + ROWS <= end; row += ROWS) {
    const std::int64_t at = row * width;
    backward_rows<ROWS, RELU, WANTED>(width, own, dy + at, x + at, mean + row, rstd + row, dx + at, db, dw,
                                      ds);
  }
  return row;
}

template <bool RELU, bool WANTED>
BRC_INLINE void backward(NormShape shape, std::int64_t bias_stride, std::int64_t parameter_stride,
                         std::int64_t dbias_stride, std::int64_t grad_stride, const float* dy, const float* x,
                         Parameters all, const float* mean, const float* rstd, float* dx, float* dbias,
                         float* dweight, float* dshift) {
  const std::int64_t width = shape.width;
  for (std::int64_t network = 0; network < shape.networks; ++network) {
    const std::int64_t offset = network * parameter_stride;
    const Parameters own = {all.bias + network * bias_stride, all.weight + offset, all.shift + offset};
    float* db = nullptr;
    float* dw = nullptr;
    float* ds = nullptr;
    if constexpr (WANTED) {
      db = dbias + network * dbias_stride;
      dw = dweight + network * grad_stride;
      ds = dshift + network * grad_stride;
      for (float* sums : {db, dw, ds}) std::fill_n(sums, width, 0.0f);
    }
    const std::int64_t end = (network + 1) * shape.batch;
    std::int64_t row = network * shape.batch;
    if (width <= NARROW) {
      row = backward_blocks<4, RELU, WANTED>(row, end, width, own, dy, x, mean, rstd, dx, db, dw, ds);
    }
    row = backward_blocks<2, RELU, WANTED>(row, end, width, own, dy, x, mean, rstd, dx, db, dw, ds);
    backward_blocks<1, RELU, WANTED>(row, end, width, own, dy, x, mean, rstd, dx, db, dw, ds);
  }
}

}  // namespace

BRC_VECTOR_CLONES
void bias_layer_norm_forward(NormShape shape, std::int64_t bias_stride, std::int64_t parameter_stride,
                             const float* x, const float* bias, const float* weight, const float* shift,
                             const float* residual, bool relu, float eps, float* y, float* mean,
                             float* rstd) {
  const Parameters parameters = {bias, weight, shift};
  if (relu) {
    forward<End::relu>(shape, bias_stride, parameter_stride, x, parameters, nullptr, eps, y, mean, rstd);
  } else if (residual != nullptr) {
    forward<End::residual>(shape, bias_stride, parameter_stride, x, parameters, residual, eps, y, mean, rstd);
  } else {
    forward<End::plain>(shape, bias_stride, parameter_stride, x, parameters, nullptr, eps, y, mean, rstd);
  }
}

BRC_VECTOR_CLONES
void bias_layer_norm_backward(NormShape shape, std::int64_t bias_stride, std::int64_t parameter_stride,
                              std::int64_t dbias_stride, std::int64_t grad_stride, const float* dy,
                              const float* x, const float* bias, const float* weight, const float* shift,
                              bool relu, const float* mean, const float* rstd, float* dx, float* dbias,
                              float* dweight, float* dshift) {
  const Parameters parameters = {bias, weight, shift};
  const bool wanted = dbias != nullptr;
  if (relu && wanted) {
    backward<true, true>(shape, bias_stride, parameter_stride, dbias_stride, grad_stride, dy, x, parameters,
                         mean, rstd, dx, dbias, dweight, dshift);
  } else if (relu) {
    backward<true, false>(shape, bias_stride, parameter_stride, dbias_stride, grad_stride, dy, x, parameters,
                          mean, rstd, dx, dbias, dweight, dshift);
  } else if (wanted) {
    backward<false, true>(shape, bias_stride, parameter_stride, dbias_stride, grad_stride, dy, x, parameters,
                          mean, rstd, dx, dbias, dweight, dshift);
  } else {
    backward<false, false>(shape, bias_stride, parameter_stride, dbias_stride, grad_stride, dy, x, parameters,
                           mean, rstd, dx, dbias, dweight, dshift);
  }
}

}  // namespace brc
