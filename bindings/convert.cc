#include "convert.h"

#include <cmath>
#include <cstring>
#include <string>

#include "client/client_core.h"
#include "errors.h"

namespace nb = nanobind;

namespace sp::python {
namespace {

[[noreturn]] void Refuse(const std::string& why) { Raise(Status(StatusCode::kInvalidArgument, why)); }

template <size_t N>
FixedBytes<N> ToFixed(const nb::bytes& value, const char* what) {
  if (value.size() != N) Refuse(std::string(what) + " has " + std::to_string(value.size()) + " bytes, must be " + std::to_string(N));
  FixedBytes<N> out;
  std::memcpy(out.bytes.data(), value.data(), N);
  return out;
}

// Calls add(a, b, c) for every row.
template <typename Add>
void ForEachRow(const Buffer& rows, const Add& add) {
  const BufferView buffer(rows, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT);
  const Py_buffer& view = buffer.view();
  const std::string_view format = view.format != nullptr ? view.format : "B";
  const bool is_uint64 = view.itemsize == 8 && (format.ends_with('Q') || format.ends_with('L')) && !format.starts_with('>') &&
                         !format.starts_with('!');
  if (!is_uint64 || view.ndim != 2 || view.shape[1] != 3) {
    Refuse("segments must be a C-contiguous buffer of uint64, N x 3; this one has format '" + std::string(format) + "' and " +
           std::to_string(view.ndim) + " dimensions");
  }
  const auto* values = static_cast<const uint8_t*>(view.buf);
  for (Py_ssize_t i = 0; i < view.shape[0]; ++i) {
    uint64_t row[3];
    std::memcpy(row, values + i * static_cast<Py_ssize_t>(sizeof row), sizeof row);
    add(row[0], row[1], row[2]);
  }
}

uint8_t* Address(uint64_t value) { return reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(value)); }

}  // namespace

BufferView::BufferView(const Buffer& buffer, int flags) {
  if (PyObject_GetBuffer(buffer.ptr(), &view_, flags) != 0) throw nb::python_error();
}

nb::bytes ToBytes(ByteSpan bytes) { return nb::bytes(bytes.data(), bytes.size()); }
Id128 ToId(const nb::bytes& value, const char* what) { return ToFixed<16>(value, what); }
Hash256 ToHash(const nb::bytes& value, const char* what) { return ToFixed<32>(value, what); }

Level ToLevel(std::string_view name) {
  for (const Level level : {Level::kMemory, Level::kReplicated, Level::kDurable}) {
    if (name == LevelName(level)) return level;
  }
  Refuse("level '" + std::string(name) + "' is none of memory, replicated, durable");
}

std::vector<CopySegment> ToCopySegments(const Buffer& rows) {
  std::vector<CopySegment> segments;
  ForEachRow(rows, [&](uint64_t source, uint64_t offset, uint64_t size) { segments.push_back({Address(source), offset, size}); });
  return segments;
}

std::vector<ScatterSegment> ToScatterSegments(const Buffer& rows) {
  std::vector<ScatterSegment> segments;
  ForEachRow(rows, [&](uint64_t offset, uint64_t size, uint64_t target) { segments.push_back({offset, size, Address(target)}); });
  return segments;
}

Nanos ToNanos(std::optional<double> seconds) {
  if (!seconds) return kForever;
  if (std::isnan(*seconds) || *seconds < 0) Refuse("a time of " + std::to_string(*seconds) + " seconds");
  const double nanos = *seconds * static_cast<double>(kNanosPerSecond);
  return nanos < static_cast<double>(kForever) ? static_cast<Nanos>(nanos) : kForever;
}

}  // namespace sp::python
