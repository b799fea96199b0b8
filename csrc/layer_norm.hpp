// Bias + LayerNorm + (ReLU | residual) over float rows, forward and backward, one pass over memory each.
//
// Rows are [networks, batch, width]; parameters are [networks, width]. Buffers are the caller's, contiguous,
// and must not overlap. Nothing is allocated and nothing throws; calls on different outputs may run in
// parallel.
#pragma once

#include <cstdint>

namespace brc {

struct NormShape {
  std::int64_t networks;
  std::int64_t batch;
  std::int64_t width;
};

// y = act(weight * (x + bias - mean) * rstd + shift) [+ residual]; act is ReLU where `relu`.
// `residual` may be null. `mean` and `rstd` receive one value per row, for the backward pass.
void bias_layer_norm_forward(NormShape shape, const float* x, const float* bias, const float* weight,
                             const float* shift, const float* residual, bool relu, float eps, float* y,
                             float* mean, float* rstd);

// Gradients of the forward pass. `y` is its output where it ended in ReLU, else null.
// `dbias`, `dweight`, `dshift` are summed over the batch; all three are null where only `dx` is wanted.
void bias_layer_norm_backward(NormShape shape, const float* dy, const float* y, const float* x,
                              const float* bias, const float* weight, const float* mean, const float* rstd,
                              float* dx, float* dbias, float* dweight, float* dshift);

}  // namespace brc
