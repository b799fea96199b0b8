// Tanh-Gaussian sample and log-probability, forward and backward, with the noise given.
//
// Rows of `actions` floats, each matrix with a distance between its rows, so that halves of one tensor are
// read and written where they lie. Buffers must not overlap. Nothing is allocated and nothing throws.
#pragma once

#include <cstdint>

namespace brc {

// Rows of mean and of raw log standard deviation, and noise [rows, actions], contiguous.
struct Gaussian {
  std::int64_t rows;
  std::int64_t actions;
  const float* mean;
  const float* raw;
  std::int64_t mean_stride;
  std::int64_t raw_stride;
  const float* noise;
};

// With log_std = -4 + 6 tanh(raw) and u = mean + exp(log_std) * noise:
//   out_actions = tanh(u)
//   out_log_probs = sum over actions of -noise^2 / 2 - log_std - log(2 pi) / 2 - log(1 - tanh(u)^2), [rows]
// Finite for every finite u.
void tanh_gaussian(Gaussian given, float* out_actions, std::int64_t out_stride, float* out_log_probs);

// Gradients of the mean and of raw from those of the actions and of the log-probabilities, of which all rows
// have the same, `dlog_prob`. `dactions` may be null, which is 0.
void tanh_gaussian_backward(Gaussian given, const float* dactions, std::int64_t dactions_stride,
                            float dlog_prob, float* dmean, float* draw, std::int64_t dmean_stride,
                            std::int64_t draw_stride);

}  // namespace brc
