// The least work a sampled transition can be: one contiguous row, copied from a random place.
// bench/native/row_gather.py compiles this file and calls it.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr std::size_t kLine = 64;

inline void prefetch(const char* row, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += kLine) __builtin_prefetch(row + at, 0, 3);
}

}  // namespace

extern "C" {

/// out[i] = rows[index[i]] for i < count, rows of `row_bytes` bytes. While row i is copied, the first
/// `prefetch_bytes` bytes of row i + ahead are fetched; ahead = 0 fetches nothing.
void row_gather(const char* rows, std::size_t row_bytes, const std::uint32_t* index, std::size_t count,
                std::size_t ahead, std::size_t prefetch_bytes, char* out) {
  const std::size_t wanted = ahead == 0 ? 0 : std::min(prefetch_bytes, row_bytes);
  const std::size_t first = std::min(ahead, count);
  for (std::size_t i = 0; i < first; ++i) prefetch(rows + index[i] * row_bytes, wanted);
  for (std::size_t i = 0; i < count; ++i) {
    if (i + ahead < count) prefetch(rows + index[i + ahead] * row_bytes, wanted);
    std::memcpy(out + i * row_bytes, rows + index[i] * row_bytes, row_bytes);
  }
}

}  // extern "C"
