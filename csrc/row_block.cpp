#include "row_block.hpp"

#include <algorithm>

#include "replay_layout.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace brc {
namespace {

constexpr std::size_t kHugePage = std::size_t{1} << 21;
constexpr std::size_t kSideBlock = std::size_t{1} << 18;

}  // namespace

RowBlock::RowBlock(std::size_t rows, std::size_t stride, const char* what) : stride_(stride) {
  const std::size_t bytes = rows * stride;
  const std::size_t alignment = bytes < kHugePage ? 64 : kHugePage;
  nbytes_ = Layout::align(bytes, alignment);
  data_.reset(static_cast<std::byte*>(std::aligned_alloc(alignment, nbytes_)));
  if (!data_) {
    throw OutOfMemory("cannot reserve " + to_string(nbytes_) + " bytes for " + what + ": " + to_string(rows) +
                      " rows of " + to_string(stride) + " bytes; lower capacity");
  }
#if defined(__linux__)
  // Advice: a refusal costs only speed.
  if (alignment == kHugePage) madvise(data_.get(), nbytes_, MADV_HUGEPAGE);
#endif
}

SideStore::SideStore(std::size_t bytes)
    : stride_(Layout::align(bytes, 64)), slots_per_block_(std::max<std::size_t>(1, kSideBlock / stride_)) {}

void SideStore::reserve(std::size_t wanted) {
  while (slots() < wanted) blocks_.emplace_back(slots_per_block_, stride_, "successors kept aside");
}

}  // namespace brc
