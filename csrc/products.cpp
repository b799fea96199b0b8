#include "products.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdlib>
#include <utility>

#include "numbers.hpp"
#include "scratch.hpp"
#include "vector_clones.hpp"
#include "workers.hpp"

#if defined(__x86_64__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 11))
#define BRC_HAS_AVX512 1
#include <immintrin.h>
#endif

namespace brc {

#ifdef BRC_HAS_AVX512

bool multiplies(Number kind) {
  static const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const bool low = wide && __builtin_cpu_supports("avx512bf16");
  return kind == Number::float32 ? wide : low;
}

namespace {

constexpr std::int64_t LANES = 16;     // floats of a vector
constexpr std::int64_t PANEL = 32;     // columns of b
constexpr std::int64_t TILE = 14;      // rows of a, at most
constexpr std::int64_t DEPTH = 512;    // of a block of b, in units
constexpr std::int64_t COLUMNS = 512;  // of a block of b
constexpr std::int64_t PIECE = 64;     // rows that a thread takes at least

// The kernels take 32 bits of depth at a time, a unit: a float, or two bfloat16 whose products are added.

template <class Element>
constexpr std::int64_t UNIT = sizeof(float) / sizeof(Element);

// Where the sums of a tile go.
struct Sums {
  const float* bias;  // of its columns, or null
  void* to;
  std::int64_t to_stride;
  Number kind;
  bool add;
};

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), \
                             apply_to = function)
#else
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the compiler's own header (GCC bug 105593)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif

BRC_INLINE __mmask16 first(std::int64_t lanes) {
  return static_cast<__mmask16>(lanes >= LANES ? 0xffff : (1u << lanes) - 1);
}

// Up to 16 units from `count` elements that lie along the depth; 0 beyond them.
template <class T>
BRC_INLINE __m512 along_depth(const T* x, std::int64_t count) {
  if constexpr (UNIT<T> == 1) {
    return _mm512_maskz_loadu_ps(first(count), x);
  } else {
    const auto mask = static_cast<__mmask32>(count >= 32 ? 0xffffffffu : (1u << count) - 1);
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, x));
  }
}

// A unit of each of up to 16 columns, of which the rows of the unit are `stride` apart; 0 beyond `rows`.
template <class T>
BRC_INLINE __m512 across(const T* x, std::int64_t stride, std::int64_t rows, __mmask16 columns) {
  if constexpr (UNIT<T> == 1) {
    return _mm512_maskz_loadu_ps(columns, x);
  } else {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(columns, x));
    if (rows < 2) return _mm512_castsi512_ps(low);
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(columns, x + stride));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

template <class T>
BRC_INLINE __m512 multiply_add(__m512 a, __m512 b, __m512 sum) {
  if constexpr (UNIT<T> == 1) {
    return _mm512_fmadd_ps(a, b, sum);
  } else {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
}

BRC_INLINE __m512 from_bfloat16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

// The transpose of 16 x 16 units: of `rows` rows, `stride` elements apart, of `depth` elements.
template <class T>
BRC_INLINE void transpose(const T* x, std::int64_t stride, std::int64_t rows, std::int64_t depth, float* out,
                          std::int64_t out_stride) {
  __m512 r[16], t[16];
  BRC_UNROLLED
  for (int i = 0; i < 16; ++i) {
    r[i] = i < rows ? along_depth<T>(x + i * stride, depth) : _mm512_setzero_ps();
  }
  BRC_UNROLLED
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  BRC_UNROLLED
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d upper = _mm512_castps_pd(t[i + j]), lower = _mm512_castps_pd(t[i + 2 + j]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(upper, lower));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(upper, lower));
    }
  }
  BRC_UNROLLED
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 16; j += 8) {
      t[j + i] = _mm512_shuffle_f32x4(r[j + i], r[j + 4 + i], 0x88);
      t[j + 4 + i] = _mm512_shuffle_f32x4(r[j + i], r[j + 4 + i], 0xdd);
    }
  }
  BRC_UNROLLED
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
  const std::int64_t units = (depth + UNIT<T> - 1) / UNIT<T>;
  BRC_UNROLLED
  for (int i = 0; i < 16; ++i) {
    if (i < units) _mm512_store_ps(out + i * out_stride, r[i]);
  }
}

// A block of b as panels [units, 16 or 32], the last of which may have room for 16 columns.
template <class T>
void copy_panels(std::int64_t depth, std::int64_t columns, const T* b, std::int64_t row_stride,
                 std::int64_t column_stride, float* out) {
  const std::int64_t panel = (depth + UNIT<T> - 1) / UNIT<T> * PANEL;
  const auto vectors = [&](std::int64_t n) { return columns - n > LANES ? 2 : 1; };
  if (column_stride == 1) {
    constexpr std::int64_t AHEAD = 8;  // rows, brought near: they are no pattern that a processor foresees
    for (std::int64_t k = 0; k < depth; k += UNIT<T>) {
      const auto* row = b + k * row_stride;
      float* to = out + k / UNIT<T> * PANEL;
      for (std::int64_t n = 0; n < columns; n += PANEL, to += panel) {
        float* at = vectors(n) == 1 ? to - k / UNIT<T> * LANES : to;
        for (std::int64_t v = 0; v < vectors(n); ++v) {
          const std::int64_t column = n + v * LANES;
          for (int i = 0; i < UNIT<T> && k + AHEAD + i < depth; ++i) {
            __builtin_prefetch(row + (AHEAD + i) * row_stride + column);
          }
          _mm512_store_ps(at + v * LANES,
                          across<T>(row + column, row_stride, depth - k, first(columns - column)));
        }
      }
    }
    return;
  }
  constexpr std::int64_t BLOCK = LANES * UNIT<T>;
  for (std::int64_t n = 0; n < columns; n += PANEL, out += panel) {
    const std::int64_t step = vectors(n) * LANES;
    for (std::int64_t column = n; column < std::min(n + PANEL, columns); column += LANES) {
      float* to = out + column - n;
      for (std::int64_t k = 0; k < depth; k += BLOCK, to += LANES * step) {
        const auto* from = b + column * column_stride + k;
        const std::int64_t rows = std::min(LANES, columns - column);
        if (column + LANES < columns) {
          for (int i = 0; i < LANES; ++i) __builtin_prefetch(from + (LANES + i) * column_stride);
        }
        transpose<T>(from, column_stride, rows, std::min(BLOCK, depth - k), to, step);
      }
    }
  }
}

// A tile of a: with its rows contiguous [units / 16, rows, 16], else [units, 16].
template <class T>
void copy_tile(std::int64_t depth, std::int64_t rows, const T* a, std::int64_t row_stride,
               std::int64_t column_stride, float* out, bool more) {
  if (column_stride == 1) {
    constexpr std::int64_t BLOCK = LANES * UNIT<T>;
    for (std::int64_t k = 0; k < depth; k += BLOCK) {
      for (std::int64_t i = 0; i < rows; ++i, out += LANES) {
        if (more) __builtin_prefetch(a + (i + rows) * row_stride + k);
        _mm512_store_ps(out, along_depth<T>(a + i * row_stride + k, depth - k));
      }
    }
  } else {
    for (std::int64_t k = 0; k < depth; k += UNIT<T>, out += LANES) {
      const auto* column = a + k * column_stride;
      if (more) {
        for (int i = 0; i < UNIT<T>; ++i) __builtin_prefetch(column + i * column_stride + 2 * LANES - 2);
      }
      _mm512_store_ps(out, across<T>(column, column_stride, depth - k, first(rows)));
    }
  }
}

BRC_INLINE void store(const Sums& sums, std::int64_t at, __m512 total, __mmask16 mask) {
  if (sums.kind == Number::float32) {
    float* to = static_cast<float*>(sums.to) + at;
    if (sums.add) total = _mm512_add_ps(total, _mm512_maskz_loadu_ps(mask, to));
    _mm512_mask_storeu_ps(to, mask, total);
  } else {
    auto* to = static_cast<BFloat16*>(sums.to) + at;
    if (sums.add) total = _mm512_add_ps(total, from_bfloat16(_mm256_maskz_loadu_epi16(mask, to)));
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(total));
  }
}

// What comes next is brought near step by step, `bytes` in all from `start`.
struct Ahead {
  const char* start;
  std::int64_t bytes;
};

// The sums of ROWS rows and up to 16 * VECTORS columns, of which `lanes` are of the last vector.
template <class T, int ROWS, int VECTORS, bool ALONG>
void tile(std::int64_t units, const float* a, const float* b, std::int64_t b_stride, std::int64_t lanes,
          const Sums& sums, Ahead ahead) {
  const __mmask16 last = first(lanes);
  const std::int64_t stride = ahead.bytes / units + (ahead.bytes > 0 ? 1 : 0);
  BRC_UNROLLED
  for (int i = 0; i < ROWS; ++i) {
    const std::int64_t size = sums.kind == Number::float32 ? 4 : 2;
    const char* to = static_cast<const char*>(sums.to) + i * sums.to_stride * size;
    for (std::int64_t at = 0; at < VECTORS * LANES * size; at += 64) __builtin_prefetch(to + at, 1);
  }
  const auto mask = [&](int v) { return v + 1 == VECTORS ? last : static_cast<__mmask16>(0xffff); };
  __m512 total[ROWS][VECTORS];
  BRC_UNROLLED
  for (int i = 0; i < ROWS; ++i) {
    for (int v = 0; v < VECTORS; ++v) {
      total[i][v] =
          sums.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask(v), sums.bias + v * LANES);
    }
  }
  const auto step = [&](const float* x, std::int64_t x_stride) __attribute__((always_inline)) {
    __m512 y[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      y[v] = _mm512_maskz_loadu_ps(mask(v), b + v * LANES);
    }
    BRC_UNROLLED
    for (int i = 0; i < ROWS; ++i) {
      const __m512 each = _mm512_set1_ps(x[i * x_stride]);
      for (int v = 0; v < VECTORS; ++v) total[i][v] = multiply_add<T>(each, y[v], total[i][v]);
    }
    b += b_stride;
    __builtin_prefetch(ahead.start);
    ahead.start += stride;
  };
  if constexpr (ALONG) {
    for (std::int64_t k = 0; k < units; k += LANES, a += ROWS * LANES) {
      const std::int64_t here = std::min(LANES, units - k);
      for (std::int64_t j = 0; j < here; ++j) step(a + j, LANES);
    }
  } else {
    for (std::int64_t k = 0; k < units; ++k, a += LANES) step(a, 1);
  }
  BRC_UNROLLED
  for (int i = 0; i < ROWS; ++i) {
    for (int v = 0; v < VECTORS; ++v) store(sums, i * sums.to_stride + v * LANES, total[i][v], mask(v));
  }
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#pragma GCC diagnostic pop
#endif

using Tile = void (*)(std::int64_t, const float*, const float*, std::int64_t, std::int64_t, const Sums&,
                      Ahead);

template <class T, int VECTORS, bool ALONG, int... ROWS>
constexpr std::array<Tile, TILE> tiles_of(std::integer_sequence<int, ROWS...>) {
  return {tile<T, ROWS + 1, VECTORS, ALONG>...};
}

template <class T, int VECTORS, bool ALONG>
constexpr std::array<Tile, TILE> TILES =
    tiles_of<T, VECTORS, ALONG>(std::make_integer_sequence<int, static_cast<int>(TILE)>());

template <class T>
Tile tile_for(std::int64_t rows, bool two_vectors, bool along) {
  const auto at = static_cast<std::size_t>(rows - 1);
  if (two_vectors) return along ? TILES<T, 2, true>[at] : TILES<T, 2, false>[at];
  return along ? TILES<T, 1, true>[at] : TILES<T, 1, false>[at];
}

struct Range {
  std::int64_t start, stop;
  [[nodiscard]] std::int64_t size() const { return stop - start; }
};

// Part `index` of `parts` of a range, which differ in size by one at most.
Range part_of(Range whole, std::int64_t index, std::int64_t parts) {
  return {whole.start + whole.size() * index / parts, whole.start + whole.size() * (index + 1) / parts};
}

// x[offset], in elements of T.
template <class T>
void* at(void* x, std::int64_t offset) {
  return static_cast<T*>(x) + offset;
}

template <class T>
class Multiplication {
 public:
  Multiplication(const ProductShape& shape, const Factor& a, const Factor& b, const Bias& bias,
                 const Product& out)
      : shape_(shape), a_(a), b_(b), bias_(bias), out_(out), depth_(shape.depth) {
    // what is deeper than a block is added to sums that wait in `out`, where they must not lose digits
    if (out.kind == Number::float32) depth_ = std::min(depth_, DEPTH * UNIT<T>);
  }

  void run() {
    const std::int64_t pieces = (shape_.rows + PIECE - 1) / PIECE;
    // twice as many parts as threads: nobody waits long for the last one
    const std::int64_t wanted = threads() > 1 ? 2 * threads() : 1;
    const std::int64_t row_parts =
        std::clamp((wanted + shape_.networks - 1) / shape_.networks, std::int64_t{1}, pieces);
    const std::int64_t panels = (shape_.columns + PANEL - 1) / PANEL;
    const std::int64_t fit = std::max(std::int64_t{1}, DEPTH * COLUMNS / (units(depth_) * PANEL));
    const std::int64_t missing = wanted / (shape_.networks * row_parts);
    const std::int64_t column_parts =
        std::clamp(std::max(missing, (panels + fit - 1) / fit), std::int64_t{1}, panels);
    const double cost = static_cast<double>(shape_.networks * shape_.rows * shape_.columns) *
                        static_cast<double>(shape_.depth) / LANES;
    for_each_item(shape_.networks * column_parts * row_parts, cost, [&](std::int64_t item) {
      const Range own = part_of({0, pieces}, item % row_parts, row_parts);
      const std::int64_t column = item / row_parts % column_parts;
      part(item / row_parts / column_parts, own, columns_of(column, column_parts));
    });
  }

 private:
  static std::int64_t units(std::int64_t depth) { return (depth + UNIT<T> - 1) / UNIT<T>; }

  static std::int64_t bytes_of(std::int64_t count) { return count * static_cast<std::int64_t>(sizeof(T)); }

  [[nodiscard]] Range columns_of(std::int64_t index, std::int64_t parts) const {
    const Range own = part_of({0, (shape_.columns + PANEL - 1) / PANEL}, index, parts);
    return {own.start * PANEL, std::min(own.stop * PANEL, shape_.columns)};
  }

  // These pieces of rows, and columns, of one network.
  void part(std::int64_t network, Range pieces, Range columns) const {
    const auto* a = static_cast<const T*>(a_.data) + network * a_.network_stride;
    const auto* b =
        static_cast<const T*>(b_.data) + network * b_.network_stride + columns.start * b_.column_stride;
    const std::int64_t wide = (columns.size() + PANEL - 1) / PANEL * PANEL;
    thread_local Scratch scratch;
    float* const panels = scratch.floats(units(depth_) * wide + (units(depth_) + LANES) * LANES);
    float* const copy = panels + units(depth_) * wide;
    // few rows have used a row of b before it leaves the cache
    const bool direct = UNIT<T> == 1 && b_.column_stride == 1 && shape_.rows <= TILE;
    for (std::int64_t k = 0; k < shape_.depth; k += depth_) {
      const std::int64_t deep = std::min(depth_, shape_.depth - k);
      const T* const below = b + k * b_.row_stride;
      if (!direct) copy_panels<T>(deep, columns.size(), below, b_.row_stride, b_.column_stride, panels);
      for (std::int64_t piece = pieces.start; piece < pieces.stop; ++piece) {
        const Range rows = {piece * PIECE, std::min((piece + 1) * PIECE, shape_.rows)};
        const std::int64_t tiles = (rows.size() + TILE - 1) / TILE;
        for (std::int64_t t = 0; t < tiles; ++t) {
          const Range own = part_of(rows, t, tiles);
          const bool more = t + 1 < tiles || piece + 1 < pieces.stop;
          const bool dense = a_.column_stride == 1 && a_.row_stride == deep;
          copy_tile<T>(deep, own.size(), a + own.start * a_.row_stride + k * a_.column_stride, a_.row_stride,
                       a_.column_stride, copy, more && !dense);
          // the next rows where they are one piece of memory; at the end the next network's b
          Ahead next = {reinterpret_cast<const char*>(copy), 0};
          if (more && dense) {
            next = {reinterpret_cast<const char*>(a + own.stop * a_.row_stride), bytes_of(own.size() * deep)};
          } else if (!more && network + 1 < shape_.networks && k + deep == shape_.depth) {
            next = {reinterpret_cast<const char*>(b + b_.network_stride), bytes_of(columns.size() * deep)};
          }
          next.bytes /= wide / PANEL;
          const float* panel = panels;
          for (std::int64_t n = 0; n < columns.size(); n += PANEL, panel += units(deep) * PANEL) {
            const std::int64_t here = std::min(PANEL, columns.size() - n);
            const bool two = here > LANES;
            const float* from = panel;
            std::int64_t stride = two ? PANEL : LANES;
            if constexpr (UNIT<T> == 1) {
              if (direct) from = below + n, stride = b_.row_stride;
            }
            const std::int64_t place =
                network * out_.network_stride + own.start * out_.row_stride + columns.start + n;
            const bool starts = bias_.data != nullptr && k == 0;
            const Sums sums = {
                starts ? bias_.data + network * bias_.network_stride + columns.start + n : nullptr,
                out_.kind == Number::float32 ? at<float>(out_.data, place) : at<BFloat16>(out_.data, place),
                out_.row_stride, out_.kind, out_.accumulate || k > 0};
            tile_for<T>(own.size(), two, a_.column_stride == 1)(units(deep), copy, from, stride,
                                                                two ? here - LANES : here, sums, next);
            next.start += next.bytes;
          }
        }
      }
    }
  }

  ProductShape shape_;
  Factor a_, b_;
  Bias bias_;
  Product out_;
  std::int64_t depth_;  // of a block
};

}  // namespace

void multiply(const ProductShape& shape, Number kind, const Factor& a, const Factor& b, const Bias& bias,
              const Product& out) {
  if (shape.networks * shape.rows * shape.columns == 0) return;
  if (kind == Number::float32) {
    Multiplication<float>(shape, a, b, bias, out).run();
  } else {
    Multiplication<BFloat16>(shape, a, b, bias, out).run();
  }
}

#else

bool multiplies(Number) {
  return false;
}

void multiply(const ProductShape&, Number, const Factor&, const Factor&, const Bias&, const Product&) {
  std::abort();
}

#endif

}  // namespace brc
