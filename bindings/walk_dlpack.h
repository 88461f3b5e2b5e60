// The part of DLPack's C interface that torch hands out as `torch.Tensor.__dlpack_c_exchange_api__` (dlpack.h, version 1.x). Declared here because
// nothing else of DLPack is needed; the layout is fixed by its major version, so no build against a torch version is needed either.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sp::python::dlpack {

inline constexpr uint32_t kMajorVersion = 1;
inline constexpr int32_t kCpu = 1;  // Device types. All others are left to Python's attributes, but for CUDA's.
inline constexpr int32_t kCuda = 2;

struct Tensor {  // DLTensor
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;  // DLDataType
  uint16_t lanes;
  const int64_t* shape;    // Valid as long as the tensor is neither resized nor freed.
  const int64_t* strides;  // In elements. Null for a tensor without dimensions.
  uint64_t byte_offset;
};
static_assert(sizeof(Tensor) == 48 && offsetof(Tensor, shape) == 24);

struct ExchangeHeader {
  uint32_t major, minor;
  ExchangeHeader* prev_api;  // An older table, or null.
};

struct Exchange {  // DLPackExchangeAPI
  ExchangeHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*tensor_from_py_object_no_sync)(void* py_object, Tensor* out);  // May be null. -1: with a Python exception set.
  void* current_work_stream;
};
static_assert(sizeof(Exchange) == 56 && offsetof(Exchange, tensor_from_py_object_no_sync) == 40);

}  // namespace sp::python::dlpack
