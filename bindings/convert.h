// Between Python's values and ours. With the GIL held. Wrong values raise InvalidArgument.
#pragma once

#include <nanobind/nanobind.h>

#include <optional>
#include <vector>

#include "base/bytes.h"
#include "base/clock.h"
#include "client/copy_engine.h"
#include "format/messages.h"

namespace sp::python {

// Objects with the buffer protocol.
struct Buffer : nanobind::object {
  NB_OBJECT_DEFAULT(Buffer, object, "typing_extensions.Buffer", PyObject_CheckBuffer)
};

// The bytes of a contiguous buffer; keeps it from changing its size while this lives.
class BufferView {
 public:
  explicit BufferView(const Buffer& buffer, int flags = PyBUF_SIMPLE);
  BufferView(const BufferView&) = delete;
  BufferView& operator=(const BufferView&) = delete;
  ~BufferView() { PyBuffer_Release(&view_); }
  ByteSpan bytes() const { return {static_cast<const uint8_t*>(view_.buf), static_cast<size_t>(view_.len)}; }
  const Py_buffer& view() const { return view_; }

 private:
  Py_buffer view_{};
};

nanobind::bytes ToBytes(ByteSpan bytes);
Id128 ToId(const nanobind::bytes& value, const char* what);
Hash256 ToHash(const nanobind::bytes& value, const char* what);
Level ToLevel(std::string_view name);

// Rows of three uint64 (N x 3, C-contiguous): (source address, shard offset, size), or (shard offset, size, target address).
std::vector<CopySegment> ToCopySegments(const Buffer& rows);
std::vector<ScatterSegment> ToScatterSegments(const Buffer& rows);

// Seconds from now; none: for ever. Not a number, or negative, raises.
Nanos ToNanos(std::optional<double> seconds);

}  // namespace sp::python
