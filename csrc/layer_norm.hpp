// Bias + LayerNorm + (ReLU | residual) over rows, forward and backward, one pass over memory each.
//
// Rows are [networks, rows, width], contiguous; vectors are [width] of each network, any distance apart.
// Buffers are the caller's, outlive the pass and do not overlap unless told otherwise.
#pragma once

#include <cstdint>
#include <vector>

#include "numbers.hpp"
#include "row_pass.hpp"

namespace brc {

// What both passes read. The vectors of network n are at bias + n * bias_stride and weight, shift + n *
// vector_stride: a bias_stride of 0 gives all networks one bias.
template <class T>
struct Norm {
  RowShape shape;
  const T* x;
  const float* bias;
  const float* weight;
  const float* shift;
  std::int64_t bias_stride;
  std::int64_t vector_stride;
  bool relu;
};

// y = act(weight * (x + bias - mean) * rstd + shift) [+ residual]; act is ReLU where `relu`, which takes no
// residual. `residual` may be null. `mean` and `rstd` get one value of each row, for the backward pass.
template <class T>
class NormForward final : public RowPass {
 public:
  NormForward(const Norm<T>& norm, const T* residual, float eps, T* y, float* mean, float* rstd)
      : RowPass(norm.shape), norm_(norm), residual_(residual), eps_(eps), y_(y), mean_(mean), rstd_(rstd) {}

  void rows(std::int64_t network, std::int64_t start, std::int64_t stop) override;

 private:
  Norm<T> norm_;
  const T* residual_;
  float eps_;
  T* y_;
  float* mean_;
  float* rstd_;
};

// Where gradients of vectors go, as in `Norm`: with a bias_stride of 0 that of the last network is left. All
// null where none are wanted.
template <class T>
struct NormGradients {
  T* bias;
  T* weight;
  T* shift;
  std::int64_t bias_stride;
  std::int64_t stride;
};

// Gradients of the forward pass, `dy` being that of y without its residual; `dx` may be `dy` itself. Where
// `relu`, its mask is computed anew, and NaN there counts as off. Those of vectors are summed over rows.
template <class T>
class NormBackward final : public RowPass {
 public:
  NormBackward(const Norm<T>& norm, const float* mean, const float* rstd, const T* dy, T* dx,
               NormGradients<T> gradients);

  void rows(std::int64_t network, std::int64_t start, std::int64_t stop) override;
  void finish() override;

 private:
  float* sums(std::int64_t network, std::int64_t piece);

  Norm<T> norm_;
  const float* mean_;
  const float* rstd_;
  const T* dy_;
  T* dx_;
  NormGradients<T> gradients_;
  std::vector<float> sums_;  // [networks, pieces, 3, width]
};

}  // namespace brc
