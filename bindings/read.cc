// Read pins and shard readers.
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "client/read_pin.h"
#include "client/shard_reader.h"
#include "convert.h"
#include "errors.h"
#include "module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace sp::python {
namespace {

nb::bytes ReadBytes(ShardReader& reader, uint64_t offset, uint64_t size) {
  const uint64_t length = reader.record().length_bytes;
  if (offset > length || size > length - offset) {
    Raise(Status(StatusCode::kInvalidArgument, std::to_string(size) + " bytes at " + std::to_string(offset) + " of a shard of " +
                                                   std::to_string(length)));
  }
  // Straight into the result: nobody else has it yet.
  nb::bytes out = nb::steal<nb::bytes>(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size)));
  if (!out.is_valid()) throw nb::python_error();
  const ScatterSegment segment{offset, size, reinterpret_cast<uint8_t*>(PyBytes_AsString(out.ptr()))};
  auto read = Unlocked([&] { return reader.Read({&segment, 1}); });
  if (!read) {
    ReadError error = std::move(read).error();
    error.state_modified = false;  // The result is dropped.
    Raise(error);
  }
  return out;
}

}  // namespace

void BindRead(nb::module_& m) {
  nb::class_<ShardReader>(m, "ShardReader", "One sealed shard. Every byte that it gives out was checked against the seal record.")
      .def_prop_ro("rank", [](const ShardReader& r) { return r.record().rank; }, "Whose shard it is.")
      .def_prop_ro("length", [](const ShardReader& r) { return r.record().length_bytes; }, "Bytes.")
      .def_prop_ro("header_bytes", [](const ShardReader& r) { return r.record().header_bytes; }, "Where the data begins.")
      .def_prop_ro("static_offset", [](const ShardReader& r) { return r.record().static_offset; },
                   "Where the part of the header begins that does not change from step to step.")
      .def_prop_ro("structure", [](const ShardReader& r) { return ToBytes(r.record().structure.span()); }, "SHA-256 of that part, 32 bytes.")
      .def_prop_ro("record", [](const ShardReader& r) { return ToBytes(r.identity().span()); }, "Identity of the seal record, 32 bytes.")
      .def_prop_ro("from_store", &ShardReader::from_store, "It is read from the durable tier; else from memory.")
      .def_prop_ro("blocks", &ShardReader::blocks, "Blocks of 1 MiB, the last one may be shorter.")
      .def(
          "header",
          [](ShardReader& r) {
            const std::vector<uint8_t> header = Value(Unlocked([&] { return r.Header(); }));
            return ToBytes(header);
          },
          "The safetensors header: 8 length bytes and the JSON text. Corrupt.")
      .def(
          "read",
          [](ShardReader& r, const Buffer& segments, int threads) {
            const std::vector<ScatterSegment> rows = ToScatterSegments(segments);
            return Value(Unlocked([&] { return r.Read(rows, threads); }));
          },
          "segments"_a, nb::kw_only(), "threads"_a = 0,
          "Copies ranges (uint64 N x 3: shard offset, size, target address); returns the number of bytes. Corrupt names the first bad block.")
      .def("read_bytes", &ReadBytes, "offset"_a, "size"_a, "A range of the shard. Corrupt.")
      .def(
          "verify",
          [](ShardReader& r, uint64_t first, uint64_t count) { return Value(Unlocked([&] { return r.Verify(first, count); })); },
          "first_block"_a, "count"_a, "Those of these blocks that are corrupt.")
      .def(
          "copy_to_file", [](ShardReader& r, int fd) { Value(Unlocked([&] { return r.CopyToFile(fd); })); }, "fd"_a,
          "Writes the shard to the file, from its offset 0 on. Corrupt: the file has the part before the bad block.");

  nb::class_<ReadPin>(m, "ReadPin", "One attempt, held for reading until it is closed. A context manager.")
      .def_prop_ro("info", [](const ReadPin& p) { return p.info(); }, "The attempt.")
      .def(
          "shard", [](ReadPin& p, uint32_t rank) { return Value(Unlocked([&] { return p.Shard(rank); })); }, "rank"_a,
          "A reader of one rank's shard. NotFound, Corrupt, Closed.")
      .def(
          "report_corrupt",
          [](ReadPin& p, uint32_t rank, uint64_t block) { return Value(Unlocked([&] { return p.ReportCorrupt(rank, block); })); }, "rank"_a,
          "block"_a, "Has the daemon read the block again; whether it is corrupt there, too. The shard is out of use then.")
      .def(
          "close", [](ReadPin& p) { Unlocked([&] { p.Close(); }); }, "Lets go of the attempt.")
      .def("__enter__", [](nb::handle self) { return self; }, nb::sig("def __enter__(self) -> ReadPin"))
      .def(
          "__exit__", [](ReadPin& p, nb::handle, nb::handle, nb::handle) { Unlocked([&] { p.Close(); }); }, "kind"_a.none(), "value"_a.none(),
          "traceback"_a.none(),
          nb::sig("def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, "
                  "traceback: types.TracebackType | None) -> None"));
}

}  // namespace sp::python
