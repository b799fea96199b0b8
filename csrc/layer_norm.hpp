// Bias + LayerNorm + (ReLU | residual) over float rows, forward and backward, one pass over memory each.
//
// Rows are [networks, batch, width], contiguous; parameters are [width] per network, any distance apart.
// Buffers are the caller's and must not overlap unless told otherwise. Nothing is allocated and nothing
// throws; calls on different outputs may run in parallel.
#pragma once

#include <cstdint>

namespace brc {

struct NormShape {
  std::int64_t networks;
  std::int64_t batch;
  std::int64_t width;
};

// y = act(weight * (x + bias - mean) * rstd + shift) [+ residual]; act is ReLU where `relu`, which takes no
// residual. The parameters of network n are at bias + n * bias_stride and weight, shift + n *
// parameter_stride: a bias_stride of 0 gives all networks one bias. `residual` may be null. `mean` and `rstd`
// receive one value per row, for the backward pass.
void bias_layer_norm_forward(NormShape shape, std::int64_t bias_stride, std::int64_t parameter_stride,
                             const float* x, const float* bias, const float* weight, const float* shift,
                             const float* residual, bool relu, float eps, float* y, float* mean, float* rstd);

// Gradients of the forward pass, `dy` being that of y without its residual. Where `relu`, its mask is
// computed anew; NaN there counts as off. `dx` may be `dy` itself. `dbias`, `dweight`, `dshift` are summed
// over the batch, those of network n at dbias + n * dbias_stride (with 0, the last network's is left) and
// dweight, dshift + n * grad_stride; all three are null where only `dx` is wanted.
void bias_layer_norm_backward(NormShape shape, std::int64_t bias_stride, std::int64_t parameter_stride,
                              std::int64_t dbias_stride, std::int64_t grad_stride, const float* dy,
                              const float* x, const float* bias, const float* weight, const float* shift,
                              bool relu, const float* mean, const float* rstd, float* dx, float* dbias,
                              float* dweight, float* dshift);

}  // namespace brc
