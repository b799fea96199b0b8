// The memory of the replay store: aligned rows of bytes, and a pool of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

namespace brc {

/// The system refused an allocation; the message holds the numbers.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string message) : message_(std::move(message)) {}
  [[nodiscard]] const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

/// A fixed block of rows, 64-byte aligned, or 2 MB aligned and in huge pages once it is that large.
/// It owns the block; the memory is uninitialised, and pages that nobody writes cost nothing.
class RowBlock {
 public:
  /// `stride` bytes a row. Throws OutOfMemory, which names `what`. O(1).
  RowBlock(std::size_t rows, std::size_t stride, const char* what);
  [[nodiscard]] std::byte* row(std::size_t index) noexcept { return data_.get() + index * stride_; }
  [[nodiscard]] const std::byte* row(std::size_t index) const noexcept {
    return data_.get() + index * stride_;
  }
  [[nodiscard]] std::size_t stride() const noexcept { return stride_; }
  [[nodiscard]] std::size_t nbytes() const noexcept { return nbytes_; }

 private:
  struct Free {
    void operator()(std::byte* data) const noexcept { std::free(data); }
  };
  std::size_t stride_;  // bytes from a row to the next
  std::size_t nbytes_;  // a multiple of the alignment
  std::unique_ptr<std::byte[], Free> data_;
};

/// Rows for the successors that no following row can hold, by slot. It owns its blocks, which never move or
/// shrink. Not thread-safe.
class SideStore {
 public:
  explicit SideStore(std::size_t bytes);
  /// Grows until `slots` exist. Throws OutOfMemory with every slot as it was. O(new slots).
  void reserve(std::size_t slots);
  [[nodiscard]] std::byte* at(std::size_t slot) noexcept {
    return blocks_[slot / slots_per_block_].row(slot % slots_per_block_);
  }
  [[nodiscard]] const std::byte* at(std::size_t slot) const noexcept {
    return blocks_[slot / slots_per_block_].row(slot % slots_per_block_);
  }
  [[nodiscard]] std::size_t slots() const noexcept { return blocks_.size() * slots_per_block_; }
  [[nodiscard]] std::size_t nbytes() const noexcept {
    return blocks_.empty() ? 0 : blocks_.size() * blocks_[0].nbytes();
  }

 private:
  std::size_t stride_;           // of a slot, padded to 64 bytes
  std::size_t slots_per_block_;  // about 256 KB of slots, at least 1
  std::vector<RowBlock> blocks_;
};

}  // namespace brc
