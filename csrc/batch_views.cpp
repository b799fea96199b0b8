#include "batch_views.hpp"

#include <algorithm>
#include <utility>

#include "exact_data.hpp"

namespace py = pybind11;

namespace brc {
namespace {

/// The tensors of one batch: what they are on, and how many are left.
struct Loan {
  std::shared_ptr<Slot> slot;
  std::atomic<std::size_t> left;
  std::vector<dlpack::ManagedTensor> tensors;
};

/// Any thread may drop the last tensor, with or without the GIL.
void end_tensor(dlpack::ManagedTensor* tensor) {
  std::unique_ptr<Loan> loan(static_cast<Loan*>(tensor->context));
  if (loan->left.fetch_sub(1) > 1 || !Py_IsInitialized()) {
    loan.release();
    return;
  }
  loan->slot->used = false;
  const py::gil_scoped_acquire acquired;
  loan.reset();
}

}  // namespace

std::byte* Views::memory_of(Slot& slot) const {
  const auto bytes = static_cast<std::size_t>(slot.memory.nbytes());
  if (bytes < bytes_)
    refuse("a slot of " + to_string(bytes_) + " bytes is expected, got " + to_string(bytes));
  return static_cast<std::byte*>(slot.memory.mutable_data());
}

Views::Views(std::vector<View> parts) : parts_(std::move(parts)) {
  for (const View& part : parts_) bytes_ = std::max(bytes_, part.offset + part.bytes);
}

py::list Views::tensors(const std::shared_ptr<Slot>& slot) const {
  auto loan = std::make_unique<Loan>(slot, parts_.size(), std::vector<dlpack::ManagedTensor>(parts_.size()));
  py::list made(parts_.size());
  std::byte* const data = memory_of(*slot);
  slot->used = true;
  Loan* const shared = loan.release();  // of the tensors from now on; for ever, if one cannot be made
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    const View& part = parts_[i];
    dlpack::ManagedTensor& tensor = shared->tensors[i];
    tensor = {dlpack::kMajor,
              0,
              shared,
              &end_tensor,
              0,
              {data + part.offset,
               {dlpack::kCpu, 0},
               static_cast<std::int32_t>(part.shape.size()),
               part.type,
               const_cast<std::int64_t*>(part.shape.data()),
               const_cast<std::int64_t*>(part.strides.data()),
               0}};
    void* object = nullptr;
    if (exchange_api()->make(&tensor, &object) != 0) throw py::error_already_set();
    PyList_SET_ITEM(made.ptr(), static_cast<py::ssize_t>(i), static_cast<PyObject*>(object));
  }
  return made;
}

py::list Views::arrays(const std::shared_ptr<Slot>& slot) const {
  const std::byte* const data = memory_of(*slot);
  slot->used = true;
  const py::capsule use(new std::shared_ptr<Slot>(slot), [](void* pointer) {
    const std::unique_ptr<std::shared_ptr<Slot>> held(static_cast<std::shared_ptr<Slot>*>(pointer));
    (*held)->used = false;
  });
  py::list made(parts_.size());
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    const View& part = parts_[i];
    made[i] = py::array(part.dtype, part.shape, static_cast<const void*>(data + part.offset), use);
  }
  return made;
}

BatchColumns Views::columns(Slot& slot, const Layout& layout) const {
  const std::size_t parts = layout.parts.size();
  const std::size_t all = 2 * parts + 7 + layout.fields.size();
  if (parts_.size() < all || parts_.size() > all + 1) refuse("another number of columns is expected");
  std::byte* const data = memory_of(slot);
  std::size_t next = 0;
  const auto bytes = [&] {
    const View& part = parts_[next++];
    return MutableBytes(data + part.offset, part.bytes);
  };
  const auto values = [&](auto zero) {
    using T = decltype(zero);
    const MutableBytes column = bytes();
    return std::span<T>(reinterpret_cast<T*>(column.data()), column.size() / sizeof(T));
  };
  BatchColumns columns;
  for (std::size_t p = 0; p < parts; ++p) columns.observations[p] = bytes();
  for (std::size_t p = 0; p < parts; ++p) columns.next_observations[p] = bytes();
  columns.rewards = values(0.0f);
  columns.masks = values(0.0f);
  columns.task_ids = values(std::int64_t{0});
  columns.terminated = values(static_cast<unsigned char>(0));
  columns.truncated = values(static_cast<unsigned char>(0));
  columns.steps = values(std::int64_t{0});
  columns.indices = values(std::int64_t{0});
  for (std::size_t f = 0; f < layout.fields.size(); ++f) columns.fields[f] = bytes();
  if (parts_.size() > all) columns.weights = values(0.0f);
  return columns;
}

}  // namespace brc
