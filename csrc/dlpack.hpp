// What is used here of DLPack's C interface, version 1.3: https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <cstdint>

namespace dlpack {

constexpr std::uint32_t kMajor = 1;  // of the version; another one has other layouts
constexpr std::int32_t kCpu = 1;
constexpr std::uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6;

struct Device {
  std::int32_t type;
  std::int32_t id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
  bool operator==(const DataType&) const = default;
};

/// Memory of somebody else. Its first element lies `byte_offset` behind `data`; strides count elements.
struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // null: contiguous
  std::uint64_t byte_offset;
};

/// A tensor with its owner's way to end it.
struct ManagedTensor {
  std::uint32_t major, minor;
  void* context;
  void (*end)(ManagedTensor* self);
  std::uint64_t flags;
  Tensor tensor;
};

/// What a type of tensors offers under `__dlpack_c_exchange_api__`, in a capsule of the name kCapsule.
struct ExchangeApi {
  std::uint32_t major, minor;
  ExchangeApi* previous;
  void* allocate;
  void* manage;
  /// Makes a tensor object, a new reference, that ends `tensor` when it is gone. Not 0: it could not, and an
  /// error is set.
  int (*make)(ManagedTensor* tensor, void** out);
  /// Describes a tensor object, which must be kept meanwhile. Not 0: it could not, and an error is set.
  int (*describe)(void* object, Tensor* out);
  void* current_stream;
};

constexpr const char* kCapsule = "dlpack_exchange_api";

}  // namespace dlpack
