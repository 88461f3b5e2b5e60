// Values that describe: read-only attributes.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "convert.h"
#include "format/messages.h"
#include "module.h"

namespace nb = nanobind;

namespace sp::python {

void BindInfo(nb::module_& m) {
  nb::class_<HelloReply>(m, "DaemonInfo", "The daemon of the newest connection.")
      .def_prop_ro("node", [](const HelloReply& d) { return ToBytes(d.node.span()); }, "Node id, 16 bytes.")
      .def_prop_ro("boot", [](const HelloReply& d) { return ToBytes(d.boot.span()); },
                   "16 bytes that change when the keeper, and so the memory, was replaced.")
      .def_ro("incarnation", &HelloReply::incarnation, "How many workers the keeper has started.")
      .def_ro("extent_bytes", &HelloReply::extent_bytes, "Unit of the pool.")
      .def_ro("pool_bytes_max", &HelloReply::pool_bytes_max, "Bound of the pool.")
      .def_prop_ro("lease_seconds", [](const HelloReply& d) { return static_cast<double>(d.lease_ns) / kNanosPerSecond; },
                   "How long a lease lasts without a renewal.")
      .def_ro("retain", &HelloReply::retain, "Complete steps kept per namespace.")
      .def_ro("pid", &HelloReply::daemon_pid, "Process id of the keeper, which lives as long as the daemon, as the daemon sees it.")
      .def_ro("private", &HelloReply::is_private, "Started by a client library for this user.")
      .def_ro("store", &HelloReply::store, "URL of the durable tier, without credentials; empty: there is none.")
      .def_ro("version", &HelloReply::daemon_version, "Version of the daemon.");

  // In the stub of a class with an attribute `bytes`, that name is no type any more; so the type gets another one, with its length.
  m.attr("Id") = nb::module_::import_("typing").attr("Annotated")[nb::make_tuple(nb::borrow(reinterpret_cast<PyObject*>(&PyBytes_Type)),
                                                                                 16)];
  nb::class_<AttemptInfo>(m, "AttemptInfo", "One try at saving one step.")
      .def_prop_ro("attempt", [](const AttemptInfo& i) { return ToBytes(i.attempt.span()); }, nb::for_getter(nb::sig("def attempt(self) -> Id")),
                   "16 bytes.")
      .def_prop_ro("nonce", [](const AttemptInfo& i) { return ToBytes(i.nonce.span()); }, nb::for_getter(nb::sig("def nonce(self) -> Id")),
                   "Of the launch that wrote it, 16 bytes.")
      .def_ro("generation", &AttemptInfo::generation, "Incarnation of the job.")
      .def_ro("step", &AttemptInfo::step, "Training step.")
      .def_ro("try_number", &AttemptInfo::try_number, "Which try at the step.")
      .def_ro("world_size", &AttemptInfo::world_size, "Ranks at save time.")
      .def_ro("sealed_ranks", &AttemptInfo::sealed_ranks, "Ranks whose shard is sealed.")
      .def_ro("bytes", &AttemptInfo::bytes, "Sum of the sealed shards' lengths.")
      .def_prop_ro("state", [](const AttemptInfo& i) { return std::string(AttemptStateName(i.state)); },
                   "open, complete, closed, corrupt or retired.")
      .def_prop_ro("level", [](const AttemptInfo& i) { return std::string(LevelName(i.level)); },
                   "How safe it is: none, memory, replicated or durable.")
      .def_ro("pinned", &AttemptInfo::pinned, "Held by an operator or a reader.")
      .def_ro("reason", &AttemptInfo::reason, "Why it is closed, corrupt or not complete; empty otherwise.");

  nb::class_<NamespaceInfo>(m, "NamespaceInfo", "The identity under which checkpoints of a job live.")
      .def_ro("ns", &NamespaceInfo::ns, "Its name.")
      .def_ro("generation", &NamespaceInfo::generation, "The current one.")
      .def_ro("bytes", &NamespaceInfo::bytes, "Held for it.")
      .def_ro("complete_steps", &NamespaceInfo::complete_steps, "Complete steps held.");

  nb::class_<OpenGenerationReply>(m, "Generation", "An opened generation.")
      .def_ro("generation", &OpenGenerationReply::generation, "Fencing number, from 1.")
      .def_prop_ro(
          "parent", [](const OpenGenerationReply& g) { return g.has_parent ? std::optional(ToBytes(g.parent.span())) : std::nullopt; },
          "Attempt that it continues from, 16 bytes.")
      .def_prop_ro(
          "parent_step", [](const OpenGenerationReply& g) { return g.has_parent ? std::optional(g.parent_step) : std::nullopt; },
          "Step of the parent.");

  nb::class_<SealReply>(m, "SealResult", "A sealed shard.")
      .def_prop_ro("record", [](const SealReply& r) { return ToBytes(r.record.span()); }, "Identity of the seal record, 32 bytes.")
      .def_ro("complete", &SealReply::complete, "The whole attempt is complete by this seal.");
}

}  // namespace sp::python
