// Text of a shard's header.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <algorithm>
#include <string_view>
#include <vector>

#include "convert.h"
#include "errors.h"
#include "format/shard_text.h"
#include "module.h"
#include "walk.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace sp::python {
namespace {

std::string_view Utf8(nb::handle text) {
  Py_ssize_t size = 0;
  const char* bytes = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (bytes == nullptr) throw nb::python_error();
  return {bytes, static_cast<size_t>(size)};
}

// Appends the numbers of a tuple.
size_t AppendNumbers(std::vector<uint64_t>& numbers, nb::handle tuple) {
  if (!PyTuple_Check(tuple.ptr())) throw nb::type_error("a shape is a tuple");
  const Py_ssize_t size = PyTuple_GET_SIZE(tuple.ptr());
  for (Py_ssize_t i = 0; i < size; ++i) {
    const unsigned long long value = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
    if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred() != nullptr) throw nb::python_error();
    numbers.push_back(value);
  }
  return static_cast<size_t>(size);
}

nb::bytes StaticPart(const nb::list& entries, std::string_view safepoint) {
  std::vector<StaticEntry> rows;
  std::vector<uint64_t> numbers;
  std::vector<std::pair<size_t, size_t>> dimensions;  // Of shape and offsets, which lie in `numbers` one after the other.
  rows.reserve(nb::len(entries));
  dimensions.reserve(nb::len(entries));
  for (const nb::handle entry : entries) {
    if (!PyTuple_Check(entry.ptr()) || PyTuple_GET_SIZE(entry.ptr()) != 6) throw nb::type_error("an entry has six parts");
    const auto part = [&](Py_ssize_t i) { return nb::handle(PyTuple_GET_ITEM(entry.ptr(), i)); };
    rows.push_back({.key = Utf8(part(0)), .dtype = Utf8(part(1)), .begin = nb::cast<uint64_t>(part(4)), .end = nb::cast<uint64_t>(part(5))});
    const size_t shape = AppendNumbers(numbers, part(2));
    dimensions.emplace_back(shape, AppendNumbers(numbers, part(3)));
  }
  const uint64_t* next = numbers.data();
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i].shape = {next, dimensions[i].first};
    rows[i].offsets = {next + dimensions[i].first, dimensions[i].second};
    next += dimensions[i].first + dimensions[i].second;
  }
  // The entries' strings stay where they are: the list holds them, and no Python runs in between.
  const std::string text = WriteStaticPart(rows, safepoint);
  return nb::bytes(text.data(), text.size());
}

std::string_view StaticPartOf(const nb::bytes& header, size_t offset) {
  const std::string_view text(static_cast<const char*>(header.data()), header.size());
  if (offset > text.size()) throw nb::value_error("the static part begins behind the end of the header");
  return text.substr(offset);
}

nb::object SplitHeader(const nb::bytes& header, size_t static_offset) {
  const auto texts = SplitStaticPart(StaticPartOf(header, static_offset));
  if (!texts) return nb::none();
  return nb::make_tuple(texts->sharding, texts->safepoint, static_offset + texts->entries);
}

// For a class of safepoint._shard: a named tuple of rank, dtype, raw type, shape, offsets, global shape, begin, bytes, path.
nb::object ReadPieces(const nb::bytes& header, size_t offset, const nb::object& rank, nb::handle piece_class, const nb::dict& paths) {
  auto* type = reinterpret_cast<PyTypeObject*>(piece_class.ptr());
  if (!PyType_Check(piece_class.ptr()) || !PyType_IsSubtype(type, &PyTuple_Type)) throw nb::type_error("a piece is a named tuple");
  nb::dict pieces;
  nb::object dtype = nb::str(""), shape = nb::tuple();  // Those of the tensor before: most have the same.
  std::vector<uint64_t> sizes;
  const bool read = ReadEntries(StaticPartOf(header, offset), [&](const StaticEntry& e) {
    if (e.end < e.begin) return false;
    const nb::object key = nb::str(e.key.data(), e.key.size());
    if (Utf8(dtype) != e.dtype) dtype = nb::str(e.dtype.data(), e.dtype.size());
    if (!std::equal(sizes.begin(), sizes.end(), e.shape.begin(), e.shape.end())) {
      sizes.assign(e.shape.begin(), e.shape.end());
      shape = Steal(PyTuple_New(static_cast<Py_ssize_t>(sizes.size())));
      for (size_t i = 0; i < sizes.size(); ++i) {
        PyTuple_SET_ITEM(shape.ptr(), static_cast<Py_ssize_t>(i), Steal(PyLong_FromUnsignedLongLong(sizes[i])).release().ptr());
      }
    }
    PyObject* known_path = PyDict_GetItemWithError(paths.ptr(), key.ptr());
    if (known_path == nullptr && PyErr_Occurred() != nullptr) throw nb::python_error();
    const nb::object path = known_path != nullptr ? nb::borrow(known_path) : nb::none();
    const nb::object begin = Steal(PyLong_FromUnsignedLongLong(header.size() + e.begin));
    const nb::object size = Steal(PyLong_FromUnsignedLongLong(e.end - e.begin));
    const nb::object fields[] = {rank, dtype, nb::none(), shape, nb::none(), shape, begin, size, path};
    const nb::object piece = Steal(type->tp_alloc(type, 9));
    for (Py_ssize_t i = 0; i < 9; ++i) PyTuple_SET_ITEM(piece.ptr(), i, Py_NewRef(fields[i].ptr()));
    const nb::object list = Steal(PyList_New(1));
    PyList_SET_ITEM(list.ptr(), 0, Py_NewRef(piece.ptr()));
    const Py_ssize_t before = PyDict_GET_SIZE(pieces.ptr());
    if (PyDict_SetItem(pieces.ptr(), key.ptr(), list.ptr()) != 0) throw nb::python_error();
    return PyDict_GET_SIZE(pieces.ptr()) == before + 1;  // Not a key twice.
  });
  return read ? nb::object(pieces) : nb::none();
}

}  // namespace

void BindHeader(nb::module_& m) {
  m.def("static_part", &StaticPart, "entries"_a, "safepoint"_a,
        nb::sig("def static_part(entries: list[tuple[str, str, tuple[int, ...], tuple[int, ...], int, int]], safepoint: str) -> bytes"),
        "The static part of a header. Entries: (key, dtype, shape, offsets, begin, end of the data); `safepoint`: the JSON text of that name.");
  m.def("split_header", &SplitHeader, "header"_a, "static_offset"_a,
        nb::sig("def split_header(header: bytes, static_offset: int) -> tuple[str, str, int] | None"),
        "The texts of DCP_SHARDING_INFO and safepoint, and where the tensors begin. None: the header is not in the form that `static_part` gives it.");
  m.def("read_pieces", &ReadPieces, "header"_a, "offset"_a, "rank"_a, "piece_class"_a, "paths"_a,
        nb::sig("def read_pieces(header: bytes, offset: int, rank: int, piece_class: type, paths: dict[str, typing.Any]) "
                "-> dict[str, list[typing.Any]] | None"),
        "The tensors from there on, each as if it were whole: by key, one piece each. None: as above, or keys need more than plain ASCII.");
}

}  // namespace sp::python
