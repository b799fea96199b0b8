#include "policy.hpp"

#include <algorithm>

#include "vector_clones.hpp"
#include "vector_math.hpp"

namespace brc {
namespace {

constexpr float CENTRE = -4.0f;  // of log_std
constexpr float REACH = 6.0f;
constexpr float CONSTANT = 2.30523289f;  // log(2 pi) / 2 + 2 log 2: of the normal and of the slope

// Rows are short and of any length: elements go through in chunks over several rows, gathered.
constexpr std::int64_t CHUNK = 256;

// Elements of one row: `length` of them from `column`.
struct Piece {
  std::int64_t row;
  std::int64_t column;
  std::int64_t length;
};

BRC_INLINE Piece first_piece(std::int64_t start, std::int64_t count, std::int64_t actions) {
  const std::int64_t column = start % actions;
  return {start / actions, column, std::min(count, actions - column)};
}

BRC_INLINE Piece next_piece(Piece piece, std::int64_t left, std::int64_t actions) {
  return {piece.row + 1, 0, std::min(left, actions)};
}

BRC_INLINE void gather(Piece piece, std::int64_t count, std::int64_t actions, const float* __restrict x,
                       std::int64_t stride, float* __restrict out) {
  for (std::int64_t at = 0; at < count;) {
    const float* from = x + piece.row * stride + piece.column;
    for (std::int64_t i = 0; i < piece.length; ++i) out[at + i] = from[i];
    at += piece.length;
    piece = next_piece(piece, count - at, actions);
  }
}

BRC_INLINE void scatter(Piece piece, std::int64_t count, std::int64_t actions, const float* __restrict x,
                        float* __restrict out, std::int64_t stride) {
  for (std::int64_t at = 0; at < count;) {
    float* to = out + piece.row * stride + piece.column;
    for (std::int64_t i = 0; i < piece.length; ++i) to[i] = x[at + i];
    at += piece.length;
    piece = next_piece(piece, count - at, actions);
  }
}

}  // namespace

BRC_VECTOR_CLONES
void tanh_gaussian(Gaussian given, float* out_actions, std::int64_t out_stride, float* out_log_probs) {
  const std::int64_t actions = given.actions;
  const std::int64_t total = given.rows * actions;
  float mean[CHUNK] = {}, raw[CHUNK] = {}, noise[CHUNK] = {}, per_dim[CHUNK];
  std::fill_n(out_log_probs, given.rows, -static_cast<float>(actions) * CONSTANT);
  for (std::int64_t start = 0; start < total; start += CHUNK) {
    const std::int64_t count = std::min(CHUNK, total - start);
    const Piece first = first_piece(start, count, actions);
    const std::int64_t length = (count + 15) / 16 * 16;  // whole vectors; what is beyond is not used
    gather(first, count, actions, given.mean, given.mean_stride, mean);
    gather(first, count, actions, given.raw, given.raw_stride, raw);
    std::copy_n(given.noise + start, count, noise);
    for (std::int64_t i = 0; i < length; ++i) {
      const float log_std = CENTRE + REACH * vector_math::tanh(raw[i]).value;
      const vector_math::Tanh squashed = vector_math::tanh(mean[i] + vector_math::exp(log_std) * noise[i]);
      mean[i] = squashed.value;
      per_dim[i] = squashed.steepness - log_std - 0.5f * noise[i] * noise[i];
    }
    scatter(first, count, actions, mean, out_actions, out_stride);
    Piece piece = first;
    for (std::int64_t at = 0; at < count;) {
      float sum = 0.0f;
      for (std::int64_t i = 0; i < piece.length; ++i) sum += per_dim[at + i];
      out_log_probs[piece.row] += sum;
      at += piece.length;
      piece = next_piece(piece, count - at, actions);
    }
  }
}

BRC_VECTOR_CLONES
void tanh_gaussian_backward(Gaussian given, const float* dactions, std::int64_t dactions_stride,
                            float dlog_prob, float* dmean, float* draw, std::int64_t dmean_stride,
                            std::int64_t draw_stride) {
  const std::int64_t actions = given.actions;
  const std::int64_t total = given.rows * actions;
  float mean[CHUNK] = {}, raw[CHUNK] = {}, noise[CHUNK] = {}, da[CHUNK] = {};
  for (std::int64_t start = 0; start < total; start += CHUNK) {
    const std::int64_t count = std::min(CHUNK, total - start);
    const Piece first = first_piece(start, count, actions);
    const std::int64_t length = (count + 15) / 16 * 16;
    gather(first, count, actions, given.mean, given.mean_stride, mean);
    gather(first, count, actions, given.raw, given.raw_stride, raw);
    std::copy_n(given.noise + start, count, noise);
    if (dactions != nullptr) gather(first, count, actions, dactions, dactions_stride, da);
    for (std::int64_t i = 0; i < length; ++i) {
      const vector_math::Tanh t = vector_math::tanh(raw[i]);
      const float spread = vector_math::exp(CENTRE + REACH * t.value) * noise[i];
      const vector_math::Tanh squashed = vector_math::tanh(mean[i] + spread);
      const float du = da[i] * squashed.slope + 2.0f * squashed.value * dlog_prob;
      mean[i] = du;
      raw[i] = REACH * t.slope * (du * spread - dlog_prob);
    }
    scatter(first, count, actions, mean, dmean, dmean_stride);
    scatter(first, count, actions, raw, draw, draw_stride);
  }
}

}  // namespace brc
