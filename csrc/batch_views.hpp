// The memory of one batch, and the tensors and arrays on it.
#pragma once

#include <pybind11/numpy.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "dlpack.hpp"
#include "replay_layout.hpp"

namespace brc {

/// Memory for one batch, and whether a tensor or an array on it is alive.
struct Slot {
  explicit Slot(pybind11::array memory_) : memory(std::move(memory_)) {}
  pybind11::array memory;
  std::atomic<bool> used = false;
};

/// One column of a batch: where it lies in a slot, and as what tensors and numpy know it.
struct View {
  pybind11::dtype dtype;
  dlpack::DataType type;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // in elements
  std::size_t offset;                 // in bytes
  std::size_t bytes;
};

/// Columns of a batch side by side in a slot.
class Views {
 public:
  explicit Views(std::vector<View> parts);
  /// Tensors of the type that `read_tensors` was given, or numpy arrays. Together they keep the slot, and
  /// mark it as used until the last of them is gone. Throws std::invalid_argument for a slot that is too
  /// small. Precondition of `tensors`: `read_tensors` was true.
  [[nodiscard]] pybind11::list tensors(const std::shared_ptr<Slot>& slot) const;
  [[nodiscard]] pybind11::list arrays(const std::shared_ptr<Slot>& slot) const;
  /// The same memory for a store of this layout; throws std::invalid_argument if it has other columns.
  [[nodiscard]] BatchColumns columns(Slot& slot, const Layout& layout) const;

 private:
  [[nodiscard]] std::byte* memory_of(Slot& slot) const;

  std::vector<View> parts_;  // of observations, of next observations; rewards, masks, task_ids, terminated,
                             // truncated, steps, indices; fields; weights or not
  std::size_t bytes_ = 0;
};

}  // namespace brc
