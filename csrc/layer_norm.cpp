#include "layer_norm.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "scratch.hpp"
#include "vector_clones.hpp"

namespace brc {
namespace {

// Several rows go through a sweep together: parameters and their gradients are loaded once for all of them,
// and their sums do not wait for each other. The rows stay in the first cache from sweep to sweep. Of rows
// wider than this 2 are fastest, of others 4.
constexpr std::int64_t NARROW_FORWARD = 512;
constexpr std::int64_t NARROW_BACKWARD = 256;

// Brings rows that come next into the first cache while these are computed: several wide rows at a time are
// no pattern that a processor foresees. It pays in the forward pass only.
template <class T>
BRC_INLINE void prefetch(const T* rows, std::int64_t count) {
#if defined(__GNUC__)
  constexpr auto LINE = static_cast<std::int64_t>(64 / sizeof(T));
  for (std::int64_t i = 0; i < count; i += LINE) __builtin_prefetch(rows + i);
#else
  static_cast<void>(rows);
  static_cast<void>(count);
#endif
}

struct Vectors {
  const float* bias;
  const float* weight;
  const float* shift;
};

template <class T>
Vectors of_network(const Norm<T>& norm, std::int64_t network) {
  const std::int64_t at = network * norm.vector_stride;
  return {norm.bias + network * norm.bias_stride, norm.weight + at, norm.shift + at};
}

// Where a sweep leaves floats for the next: in its output, which has to hold them, or in the thread's memory.
template <class T>
BRC_INLINE float* between_sweeps(T* out, std::int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    return out;
  } else {
    thread_local Scratch scratch;
    return scratch.floats(count);
  }
}

enum class End { plain, relu, residual };

template <int ROWS, End END, class T>
BRC_INLINE void forward_rows(std::int64_t width, const Vectors& vectors, const T* __restrict x,
                             const T* __restrict residual, float eps, T* __restrict y, float* work,
                             float* __restrict mean, float* __restrict rstd, std::int64_t ahead) {
  const float* __restrict b = vectors.bias;
  const float* __restrict w = vectors.weight;
  const float* __restrict s = vectors.shift;
  const float inverse_width = 1.0f / static_cast<float>(width);
  float m[ROWS] = {}, r[ROWS] = {};
  BRC_INDEPENDENT
  for (std::int64_t i = 0; i < width; ++i) {
    float h[ROWS];
    BRC_UNROLLED
    for (int k = 0; k < ROWS; ++k) h[k] = to_float(x[k * width + i]) + b[i];
    BRC_UNROLLED
    for (int k = 0; k < ROWS; ++k) {
      work[k * width + i] = h[k];
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
      const float centred = work[k * width + i] - m[k];
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
      const float centred = work[k * width + i] - m[k];
      const float normed = centred * r[k] * w[i] + s[i];
      if constexpr (END == End::relu) {
        out[k] = normed < 0.0f ? 0.0f : normed;  // keeps NaN
      } else if constexpr (END == End::residual) {
        out[k] = normed + to_float(residual[k * width + i]);
      } else {
        out[k] = normed;
      }
    }
    BRC_UNROLLED
    for (int k = 0; k < ROWS; ++k) y[k * width + i] = from_float<T>(out[k]);
  }
}

// Whole blocks of ROWS rows; returns the first row that is left.
template <int ROWS, End END, class T>
BRC_INLINE std::int64_t forward_blocks(std::int64_t row, std::int64_t stop, std::int64_t width,
                                       const Vectors& own, const T* x, const T* residual, float eps, T* y,
                                       float* mean, float* rstd) {
  for (; row + ROWS <= stop; row += ROWS) {
    const std::int64_t at = row * width;
    const std::int64_t ahead = ROWS == 2 && row + 2 * ROWS <= stop ? ROWS * width : 0;
    forward_rows<ROWS, END>(width, own, x + at, END == End::residual ? residual + at : nullptr, eps, y + at,
                            between_sweeps(y + at, ROWS * width), mean + row, rstd + row, ahead);
  }
  return row;
}

template <End END, class T>
BRC_INLINE void forward(std::int64_t row, std::int64_t stop, std::int64_t width, const Vectors& own,
                        const T* x, const T* residual, float eps, T* y, float* mean, float* rstd) {
  if (width <= NARROW_FORWARD)
    row = forward_blocks<4, END>(row, stop, width, own, x, residual, eps, y, mean, rstd);
  row = forward_blocks<2, END>(row, stop, width, own, x, residual, eps, y, mean, rstd);
  forward_blocks<1, END>(row, stop, width, own, x, residual, eps, y, mean, rstd);
}

template <class T>
BRC_INLINE void forward_any(std::int64_t row, std::int64_t stop, std::int64_t width, const Vectors& own,
                            bool relu, const T* x, const T* residual, float eps, T* y, float* mean,
                            float* rstd) {
  if (relu) {
    forward<End::relu>(row, stop, width, own, x, residual, eps, y, mean, rstd);
  } else if (residual != nullptr) {
    forward<End::residual>(row, stop, width, own, x, residual, eps, y, mean, rstd);
  } else {
    forward<End::plain>(row, stop, width, own, x, residual, eps, y, mean, rstd);
  }
}

// dy and dx may be one buffer; to `sums`, those of bias, weight and shift, is added what these rows give.
template <int ROWS, bool RELU, bool WANTED, class T>
BRC_INLINE void backward_rows(std::int64_t width, const Vectors& vectors, const T* dy, const T* __restrict x,
                              const float* __restrict mean, const float* __restrict rstd, T* dx, float* work,
                              float* sums) {
  const float* __restrict b = vectors.bias;
  const float* __restrict w = vectors.weight;
  const float* __restrict s = vectors.shift;
  float* __restrict dbias = sums;
  float* __restrict dweight = sums + width;
  float* __restrict dshift = sums + 2 * width;
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
      const float normed = (to_float(x[k * width + i]) + b[i] - m[k]) * r[k];
      g[k] = to_float(dy[k * width + i]);
      if constexpr (RELU) g[k] = normed * w[i] + s[i] > 0.0f ? g[k] : 0.0f;
      const float scaled = g[k] * w[i];
      sum[k] += scaled;
      along[k] += scaled * normed;
      weight_sum += g[k] * normed;
      shift_sum += g[k];
    }
    BRC_UNROLLED
    for (int k = 0; k < ROWS; ++k) work[k * width + i] = g[k];
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
      const float centred = to_float(x[k * width + i]) + b[i] - m[k];
      out[k] = r[k] * (work[k * width + i] * w[i] - offset[k] - slope[k] * centred);
      bias_sum += out[k];
    }
    BRC_UNROLLED
    for (int k = 0; k < ROWS; ++k) dx[k * width + i] = from_float<T>(out[k]);
    if constexpr (WANTED) dbias[i] += bias_sum;
  }
}

template <int ROWS, bool RELU, bool WANTED, class T>
BRC_INLINE std::int64_t backward_blocks(std::int64_t row, std::int64_t stop, std::int64_t width,
                                        const Vectors& own, const T* dy, const T* x, const float* mean,
                                        const float* rstd, T* dx, float* sums) {
  for (; row + ROWS <= stop; row += ROWS) {
    const std::int64_t at = row * width;
    backward_rows<ROWS, RELU, WANTED>(width, own, dy + at, x + at, mean + row, rstd + row, dx + at,
                                      between_sweeps(dx + at, ROWS * width), sums);
  }
  return row;
}

template <bool RELU, bool WANTED, class T>
BRC_INLINE void backward(std::int64_t row, std::int64_t stop, std::int64_t width, const Vectors& own,
                         const T* dy, const T* x, const float* mean, const float* rstd, T* dx, float* sums) {
  if (width <= NARROW_BACKWARD) {
    row = backward_blocks<4, RELU, WANTED>(row, stop, width, own, dy, x, mean, rstd, dx, sums);
  }
  row = backward_blocks<2, RELU, WANTED>(row, stop, width, own, dy, x, mean, rstd, dx, sums);
  backward_blocks<1, RELU, WANTED>(row, stop, width, own, dy, x, mean, rstd, dx, sums);
}

template <class T>
BRC_INLINE void backward_any(std::int64_t row, std::int64_t stop, std::int64_t width, const Vectors& own,
                             bool relu, const T* dy, const T* x, const float* mean, const float* rstd, T* dx,
                             float* sums) {
  if (relu && sums != nullptr) {
    backward<true, true>(row, stop, width, own, dy, x, mean, rstd, dx, sums);
  } else if (relu) {
    backward<true, false>(row, stop, width, own, dy, x, mean, rstd, dx, sums);
  } else if (sums != nullptr) {
    backward<false, true>(row, stop, width, own, dy, x, mean, rstd, dx, sums);
  } else {
    backward<false, false>(row, stop, width, own, dy, x, mean, rstd, dx, sums);
  }
}

// What the loader picks from has no templates: one function for each kind of numbers.

BRC_VECTOR_CLONES
void forward_of(std::int64_t row, std::int64_t stop, std::int64_t width, const Vectors& own, bool relu,
                const float* x, const float* residual, float eps, float* y, float* mean, float* rstd) {
  forward_any(row, stop, width, own, relu, x, residual, eps, y, mean, rstd);
}

BRC_VECTOR_CLONES
void forward_of(std::int64_t row, std::int64_t stop, std::int64_t width, const Vectors& own, bool relu,
                const BFloat16* x, const BFloat16* residual, float eps, BFloat16* y, float* mean,
                float* rstd) {
  forward_any(row, stop, width, own, relu, x, residual, eps, y, mean, rstd);
}

BRC_VECTOR_CLONES
void backward_of(std::int64_t row, std::int64_t stop, std::int64_t width, const Vectors& own, bool relu,
                 const float* dy, const float* x, const float* mean, const float* rstd, float* dx,
                 float* sums) {
  backward_any(row, stop, width, own, relu, dy, x, mean, rstd, dx, sums);
}

BRC_VECTOR_CLONES
void backward_of(std::int64_t row, std::int64_t stop, std::int64_t width, const Vectors& own, bool relu,
                 const BFloat16* dy, const BFloat16* x, const float* mean, const float* rstd, BFloat16* dx,
                 float* sums) {
  backward_any(row, stop, width, own, relu, dy, x, mean, rstd, dx, sums);
}

}  // namespace

template <class T>
void NormForward<T>::rows(std::int64_t network, std::int64_t start, std::int64_t stop) {
  const std::int64_t first = network * shape().rows;
  forward_of(first + start, first + stop, shape().width, of_network(norm_, network), norm_.relu, norm_.x,
             residual_, eps_, y_, mean_, rstd_);
}

template <class T>
NormBackward<T>::NormBackward(const Norm<T>& norm, const float* mean, const float* rstd, const T* dy, T* dx,
                              NormGradients<T> gradients)
    : RowPass(norm.shape), norm_(norm), mean_(mean), rstd_(rstd), dy_(dy), dx_(dx), gradients_(gradients) {
  if (gradients.bias != nullptr) {
    const std::int64_t pieces = std::max(std::int64_t{1}, shape().pieces());  // no rows add up to 0
    sums_.resize(static_cast<std::size_t>(shape().networks * pieces * 3 * shape().width));
  }
}

template <class T>
float* NormBackward<T>::sums(std::int64_t network, std::int64_t piece) {
  const std::int64_t pieces = std::max(std::int64_t{1}, shape().pieces());
  return sums_.data() + (network * pieces + piece) * 3 * shape().width;
}

template <class T>
void NormBackward<T>::rows(std::int64_t network, std::int64_t start, std::int64_t stop) {
  const std::int64_t first = network * shape().rows, width = shape().width;
  float* own = sums_.empty() ? nullptr : sums(network, start / PIECE);
  if (own != nullptr && start % PIECE == 0) std::fill_n(own, 3 * width, 0.0f);
  backward_of(first + start, first + stop, width, of_network(norm_, network), norm_.relu, dy_, norm_.x, mean_,
              rstd_, dx_, own);
}

template <class T>
void NormBackward<T>::finish() {
  if (sums_.empty()) return;
  const std::int64_t width = shape().width;
  for (std::int64_t network = 0; network < shape().networks; ++network) {
    float* __restrict total = sums(network, 0);
    for (std::int64_t piece = 1; piece < shape().pieces(); ++piece) {
      const float* __restrict more = sums(network, piece);
      for (std::int64_t i = 0; i < 3 * width; ++i) total[i] += more[i];
    }
    const std::int64_t at = network * gradients_.stride;
    T* const into[] = {gradients_.bias + network * gradients_.bias_stride, gradients_.weight + at,
                       gradients_.shift + at};
    for (T* out : into) {
      for (std::int64_t i = 0; i < width; ++i) out[i] = from_float<T>(total[i]);
      total += width;
    }
  }
}

template class NormForward<float>;
template class NormForward<BFloat16>;
template class NormBackward<float>;
template class NormBackward<BFloat16>;

}  // namespace brc
