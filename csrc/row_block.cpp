#include "row_block.hpp"

#include <algorithm>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace brc {
namespace {

constexpr std::size_t kHugePage = std::size_t{1} << 21;

using std::to_string;

}  // namespace

RowBlock::RowBlock(std::size_t rows, std::size_t width, const char* what)
    : stride_(row_bytes(width) / sizeof(float)) {
  const std::size_t bytes = rows * row_bytes(width);
  const std::size_t alignment = bytes < kHugePage ? 64 : kHugePage;
  nbytes_ = (bytes + alignment - 1) / alignment * alignment;
  data_.reset(static_cast<float*>(std::aligned_alloc(alignment, nbytes_)));
  if (!data_) {
    throw OutOfMemory("cannot reserve " + to_string(nbytes_) + " bytes for " + what + ": " + to_string(rows) +
                      " rows of " + to_string(row_bytes(width)) + " bytes; lower capacity");
  }
#if defined(__linux__)
  // Advice: a refusal costs only speed.
  if (alignment == kHugePage) madvise(data_.get(), nbytes_, MADV_HUGEPAGE);
#endif
}

SideStore::SideStore(std::size_t width)
    : width_(width), slots_per_block_(std::max<std::size_t>(1, kHugePage / RowBlock::row_bytes(width))) {}

void SideStore::reserve(std::size_t wanted) {
  while (slots() < wanted) {
    const std::size_t first = slots();
    free_.reserve(first + slots_per_block_);
    blocks_.emplace_back(slots_per_block_, width_, "successors kept aside");
    for (std::size_t slot = slots(); slot-- > first;) free_.push_back(static_cast<std::uint32_t>(slot));
  }
}

std::uint32_t SideStore::put(const float* values) noexcept {
  const std::uint32_t slot = free_.back();
  free_.pop_back();
  std::memcpy(blocks_[slot / slots_per_block_].row(slot % slots_per_block_), values, width_ * sizeof(float));
  return slot;
}

const float* SideStore::at(std::uint32_t slot) const noexcept {
  return blocks_[slot / slots_per_block_].row(slot % slots_per_block_);
}

std::size_t SideStore::nbytes() const noexcept {
  return slots() * sizeof(std::uint32_t) + (blocks_.empty() ? 0 : blocks_.size() * blocks_[0].nbytes());
}

}  // namespace brc
