// Leases and transfers.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include "client/lease.h"
#include "client/transfer.h"
#include "convert.h"
#include "errors.h"
#include "module.h"
#include "wait.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace sp::python {
namespace {

using Start = Result<Transfer> (Lease::*)(ByteSpan, std::vector<CopySegment>, const SealInfo&);

template <Start start>
Transfer StartLease(Lease& lease, const Buffer& header, const Buffer& segments, uint64_t static_offset, const nb::bytes& structure, int threads,
                    bool hold) {
  const BufferView view(header);
  const SealInfo seal{static_offset, ToHash(structure, "structure"), threads, hold};
  std::vector<CopySegment> rows = ToCopySegments(segments);
  return Value(Unlocked([&] { return (lease.*start)(view.bytes(), std::move(rows), seal); }));
}

}  // namespace

void BindSave(nb::module_& m) {
  nb::class_<Transfer>(m, "Transfer", "A save in progress. It goes on when this object is dropped.")
      .def(
          "wait_copied",
          [](const Transfer& t, std::optional<double> timeout) {
            Check(WaitInterruptibly(ToNanos(timeout), kSliceOfLocalWait, [&](Nanos time) { return t.WaitCopied(After(time)); }));
          },
          "timeout"_a.none(), "Waits until the caller's memory is free to change. Raises the copy's error; DeadlineExceeded: still running.")
      .def(
          "wait_sealed",
          [](const Transfer& t, std::optional<double> timeout) {
            return Value(WaitInterruptibly(ToNanos(timeout), kSliceOfLocalWait, [&](Nanos time) { return t.WaitSealed(After(time)); }));
          },
          "timeout"_a.none(), "Waits until the shard is sealed. Raises the copy's or the seal's error; DeadlineExceeded: still running.")
      .def(
          "release", [](Transfer& t) { Check(t.Release()); },
          "Lets a save that was started with hold=True be sealed. Without effect on another one; to decide otherwise, abort its lease.")
      .def_prop_ro("copied", &Transfer::copied, "The copy ended well.")
      .def_prop_ro("sealed", &Transfer::sealed, "The shard is sealed.")
      .def_prop_ro("copy_seconds", &Transfer::copy_seconds, "Duration of the copy; 0 while it runs.");

  nb::class_<Lease>(m, "Lease", "Room for one shard in the daemon's memory. Dropped without a start, it is aborted.")
      .def_prop_ro("attempt", [](const Lease& l) { return ToBytes(l.attempt().span()); }, "16 bytes.")
      .def_prop_ro("length", &Lease::length, "Of the shard, in bytes.")
      .def_prop_ro("address", [](const Lease& l) { return reinterpret_cast<uintptr_t>(l.data()); },
                   "Where the slot is mapped. Valid while this object lives.")
      .def_prop_ro("capacity", &Lease::capacity, "Bytes mapped at `address`.")
      .def_prop_ro("mapping", &Lease::mapping, "Number of the mapping at `address`; of all mappings of this process, no other has it.")
      .def_prop_ro("slot", &Lease::slot, "Id of the slot; a later lease on the same slot has the same address.")
      .def("start", &StartLease<&Lease::Start>, "header"_a, "segments"_a, nb::kw_only(), "static_offset"_a, "structure"_a, "threads"_a = 0,
           "hold"_a = false,
           "Copies header and segments (uint64 N x 3: source address, shard offset, size), which tile the shard in order, and seals it, in the "
           "background. The sources must stay alive and unchanged until wait_copied returned. hold: the seal waits for Transfer.release.")
      .def("start_in_place", &StartLease<&Lease::StartInPlace>, "header"_a, "segments"_a, nb::kw_only(), "static_offset"_a, "structure"_a,
           "threads"_a = 0, "hold"_a = false, "As start, but what header and segments leave is in the lease already.")
      .def(
          "abort", [](Lease& l, const std::string& reason) { Check(Unlocked([&] { return l.Abort(reason); })); }, "reason"_a,
          "Promises that nothing writes any more; other ranks see the reason. Cancels a transfer in progress and waits for its end.");
}

}  // namespace sp::python
