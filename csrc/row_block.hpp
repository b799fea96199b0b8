// The memory of the replay store: aligned rows of floats, and a pool of them.
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

/// A fixed block of rows of floats, 64-byte aligned, or 2 MB aligned and in huge pages once it is that large.
/// It owns the block; the memory is uninitialised, and pages that nobody writes cost nothing.
class RowBlock {
 public:
  /// Rows are padded to 64 bytes. Throws OutOfMemory, which names `what`. O(1).
  RowBlock(std::size_t rows, std::size_t width, const char* what);
  [[nodiscard]] float* row(std::size_t index) noexcept { return data_.get() + index * stride_; }
  [[nodiscard]] const float* row(std::size_t index) const noexcept { return data_.get() + index * stride_; }
  [[nodiscard]] std::size_t nbytes() const noexcept { return nbytes_; }
  /// Bytes of a row of `width` floats with its padding.
  [[nodiscard]] static constexpr std::size_t row_bytes(std::size_t width) noexcept {
    return (width * sizeof(float) + 63) / 64 * 64;
  }

 private:
  struct Free {
    void operator()(float* data) const noexcept { std::free(data); }
  };
  std::size_t stride_;  // floats from a row to the next, a multiple of 16
  std::size_t nbytes_;  // a multiple of the alignment
  std::unique_ptr<float[], Free> data_;
};

/// A pool of equally wide rows for the successors that no following row can hold. It owns its blocks, which
/// never move or shrink; a freed slot is the next to be reused. Not thread-safe.
class SideStore {
 public:
  explicit SideStore(std::size_t width);
  /// Grows until `slots` exist. Throws OutOfMemory with every slot as it was. O(new slots).
  void reserve(std::size_t slots);
  /// Stores `width` floats. Precondition: a reserved slot is free. O(width).
  [[nodiscard]] std::uint32_t put(const float* values) noexcept;
  [[nodiscard]] const float* at(std::uint32_t slot) const noexcept;
  void release(std::uint32_t slot) noexcept { free_.push_back(slot); }
  [[nodiscard]] std::size_t used() const noexcept { return slots() - free_.size(); }
  [[nodiscard]] std::size_t nbytes() const noexcept;

 private:
  [[nodiscard]] std::size_t slots() const noexcept { return blocks_.size() * slots_per_block_; }
  std::size_t width_;
  std::size_t slots_per_block_;      // about 2 MB of slots, at least 1
  std::vector<RowBlock> blocks_;     // slot k is row k % slots_per_block_ of block k / slots_per_block_
  std::vector<std::uint32_t> free_;  // each free slot once, the last first to go; its capacity is slots()
};

}  // namespace brc
