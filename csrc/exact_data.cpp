#include "exact_data.hpp"

#include <cstddef>
#include <cstdint>

namespace py = pybind11;

namespace brc {
namespace {

PyTypeObject* tensor_type = nullptr;
const dlpack::ExchangeApi* tensor_api = nullptr;

/// Whether a tensor's numbers are those in memory with their signs turned. Other than here, its strides tell:
/// it is every second number of a complex tensor.
bool negated(py::handle tensor) {
  return py::reinterpret_steal<py::object>(PyObject_CallMethod(tensor.ptr(), "is_neg", nullptr)).ptr() !=
         Py_False;
}

const void* tensor_data(py::handle value, const Expected& expected, py::ssize_t& count) {
  dlpack::Tensor tensor;
  if (tensor_api->describe(value.ptr(), &tensor) != 0) {  // sparse, of other devices, inside of torch.func
    PyErr_Clear();
    return nullptr;
  }
  const auto ndim = static_cast<std::int32_t>(expected.shape.size()) + 1;
  if (tensor.device.type != dlpack::kCpu || tensor.ndim != ndim || tensor.dtype != expected.dtype)
    return nullptr;
  if (count < 0) count = static_cast<py::ssize_t>(tensor.shape[0]);
  std::int64_t elements = 1;
  for (std::int32_t d = ndim - 1; d >= 0; --d) {
    const auto size =
        static_cast<std::int64_t>(d == 0 ? count : expected.shape[static_cast<std::size_t>(d - 1)]);
    if (tensor.shape[d] != size) return nullptr;
    if (tensor.strides != nullptr && tensor.strides[d] != elements) return nullptr;
    elements *= size;
  }
  if (elements == 1 && negated(value)) {
    PyErr_Clear();
    return nullptr;
  }
  const std::byte* const data = static_cast<const std::byte*>(tensor.data) + tensor.byte_offset;
  const bool aligned = reinterpret_cast<std::uintptr_t>(data) % (expected.dtype.bits / 8u) == 0;
  return aligned ? data : nullptr;
}

const void* array_data(py::handle value, const Expected& expected, py::ssize_t& count) {
  const auto* array = py::detail::array_proxy(value.ptr());
  const auto ndim = static_cast<int>(expected.shape.size()) + 1;
  constexpr int kPlain =
      py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  const auto* descr = py::detail::array_descriptor1_proxy(array->descr);
  if (descr->type_num != expected.type || descr->byteorder == '>' || descr->byteorder == '<') return nullptr;
  if (array->nd != ndim || (array->flags & kPlain) != kPlain) return nullptr;
  if (count < 0) count = array->dimensions[0];
  if (array->dimensions[0] != count) return nullptr;
  for (int d = 1; d < ndim; ++d) {
    if (array->dimensions[d] != expected.shape[static_cast<std::size_t>(d - 1)]) return nullptr;
  }
  return array->data;
}

}  // namespace

bool read_tensors(py::type type) {
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule)) return false;
  const auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  if (api->major != dlpack::kMajor || api->describe == nullptr) return false;
  tensor_api = api;
  tensor_type = reinterpret_cast<PyTypeObject*>(type.release().ptr());
  return true;
}

const dlpack::ExchangeApi* exchange_api() noexcept {
  return tensor_api;
}

const void* exact_data(py::handle value, const Expected& expected, py::ssize_t& count) {
  if (py::detail::npy_api::get().PyArray_Check_(value.ptr())) return array_data(value, expected, count);
  if (tensor_type != nullptr && Py_TYPE(value.ptr()) == tensor_type)
    return tensor_data(value, expected, count);
  return nullptr;
}

}  // namespace brc
