// Little-endian fields at fixed offsets: for records whose size never changes. Pure.
#pragma once

#include <algorithm>
#include <concepts>

#include "base/bytes.h"

namespace sp::layout {

// The caller guarantees that the field lies inside `bytes`: offsets are constants checked by static_assert beside the record.
template <std::unsigned_integral T>
void Put(MutableByteSpan bytes, size_t offset, T value) {
  for (size_t i = 0; i < sizeof(T); ++i) bytes[offset + i] = static_cast<uint8_t>(value >> (8 * i));
}

template <std::unsigned_integral T>
T Get(ByteSpan bytes, size_t offset) {
  T value = 0;
  for (size_t i = 0; i < sizeof(T); ++i) value = static_cast<T>(value | static_cast<T>(T{bytes[offset + i]} << (8 * i)));
  return value;
}

template <size_t N>
void Put(MutableByteSpan bytes, size_t offset, const FixedBytes<N>& value) {
  std::copy(value.bytes.begin(), value.bytes.end(), bytes.begin() + static_cast<std::ptrdiff_t>(offset));
}

template <size_t N>
FixedBytes<N> GetFixed(ByteSpan bytes, size_t offset) {
  FixedBytes<N> value;
  const ByteSpan field = bytes.subspan(offset, N);
  std::copy(field.begin(), field.end(), value.bytes.begin());
  return value;
}

inline bool AllZero(ByteSpan bytes) {
  // Every byte equals its neighbour: one memcmp, because a fresh ledger is tens of megabytes of zeros.
  return bytes.empty() || (bytes[0] == 0 && std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0);
}

}  // namespace sp::layout
