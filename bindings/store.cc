// Steps in a store, read without a daemon.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <ctime>

#include "client/stored_pin.h"
#include "convert.h"
#include "durable/open_store.h"
#include "durable/retention.h"
#include "durable/step_store.h"
#include "errors.h"
#include "module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace sp::python {
namespace {

constexpr uint64_t kManyObjects = uint64_t{16} << 30;  // A call that lists or deletes may take as long as reading so many bytes: an hour.

struct Store {
  std::shared_ptr<ObjectStore> store;
};

Store OpenForReading(const std::string& url) { return {Value(Unlocked([&] { return OpenStoreForReading(url); }))}; }

using Remains = std::vector<std::pair<FoundStep, std::string>>;  // Names and reasons.

std::pair<std::vector<FoundStep>, Remains> Listing(const Store& s, const std::string& ns) {
  StoreListing listing = Value(Unlocked([&] { return ListStore(*s.store, ns, std::time(nullptr), ReadLimits(kManyObjects)); }));
  Remains remains;
  for (Departure& departure : listing.remains) remains.emplace_back(FoundStep{std::move(departure.step), 0}, std::move(departure.why));
  return {std::move(listing.steps), std::move(remains)};
}

std::vector<std::pair<bool, std::string>> JudgeSteps(const std::vector<std::pair<uint64_t, int64_t>>& newest_first, uint64_t keep_last,
                                                     uint64_t keep_every, int64_t keep_for) {
  std::vector<DatedStep> steps;
  for (const auto& [step, modified] : newest_first) steps.push_back({step, modified});
  std::vector<std::pair<bool, std::string>> judged;
  for (const Judgement& judgement : Judge({keep_last, keep_every, keep_for}, steps, std::time(nullptr))) judged.emplace_back(judgement.stays, judgement.why);
  return judged;
}

std::pair<std::vector<ObjectInfo>, std::string> ListObjects(const Store& s, const std::string& prefix, const std::string& cursor) {
  ListPage page = Value(Unlocked([&] { return s.store->List(prefix, cursor, ReadLimits(kManyObjects)); }));
  return {std::move(page.objects), std::move(page.next)};
}

nb::bytes ReadRange(const Store& s, const std::string& key, uint64_t offset, uint64_t size) {
  // Straight into the result: nobody else has it yet.
  nb::bytes out = nb::steal<nb::bytes>(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size)));
  if (!out.is_valid()) throw nb::python_error();
  const MutableByteSpan bytes(reinterpret_cast<uint8_t*>(PyBytes_AsString(out.ptr())), size);
  Check(Unlocked([&] { return s.store->ReadRange(key, offset, bytes, ReadLimits(size)); }));
  return out;
}

}  // namespace

void BindStore(nb::module_& m) {
  nb::class_<FoundStep>(m, "StepName", "Names one whole step of a store.")
      .def_prop_ro("ns", [](const FoundStep& f) { return f.name.ns; }, "Namespace.")
      .def_prop_ro("step", [](const FoundStep& f) { return f.name.step; }, "Training step.")
      .def_prop_ro("attempt", [](const FoundStep& f) { return ToBytes(f.name.attempt.span()); }, nb::for_getter(nb::sig("def attempt(self) -> Id")),
                   "16 bytes.")
      .def_ro("modified", &FoundStep::modified_unix_s, "When its manifest was made, by the store's clock: seconds since 1970.");

  nb::class_<ObjectInfo>(m, "StoredObject", "One object of a store, whoever wrote it.")
      .def_ro("key", &ObjectInfo::key, "Its name below the store's URL.")
      .def_ro("size", &ObjectInfo::size_bytes, "Bytes.");

  nb::class_<StoredPin>(m, "StoredPin", "One whole step of a store; its shards are read from there. A context manager, like ReadPin.")
      .def_prop_ro("info", [](const StoredPin& p) { return p.info(); }, "The attempt.")
      .def_prop_ro("uid", &StoredPin::uid, "User id of the job that saved it.")
      .def(
          "shard", [](const StoredPin& p, uint32_t rank) { return Value(Unlocked([&] { return p.Shard(rank); })); }, "rank"_a,
          "A reader of one rank's shard. NotFound, Corrupt, Incomplete.")
      .def(
          "report_corrupt", [](const StoredPin&, uint32_t, uint64_t) { return false; }, "rank"_a, "block"_a,
          "Nobody is told: a store has no quarantine. False.")
      .def("close", [](const StoredPin&) {}, "Does nothing: what is in a store stays there.")
      .def("__enter__", [](nb::handle self) { return self; }, nb::sig("def __enter__(self) -> StoredPin"))
      .def(
          "__exit__", [](StoredPin&, nb::handle, nb::handle, nb::handle) {}, "kind"_a.none(), "value"_a.none(), "traceback"_a.none(),
          nb::sig("def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, "
                  "traceback: types.TracebackType | None) -> None"));

  nb::class_<Store>(m, "Store", "A durable tier: steps as objects of a file system or an object store.")
      .def("__init__", [](Store* self, const std::string& url) { new (self) Store(OpenForReading(url)); }, "url"_a,
           "InvalidArgument: no URL of a store. NotFound, Denied.")
      .def_prop_ro("url", [](const Store& s) { return s.store->url(); }, "Without credentials.")
      .def(
          "steps", [](const Store& s, const std::string& ns) { return Value(Unlocked([&] { return ListSteps(*s.store, ns, ReadLimits(kManyObjects)); })); },
          "ns"_a = "", "The whole steps of one namespace or of all, ascending by namespace and step. Unavailable, Denied.")
      .def(
          "open", [](const Store& s, const FoundStep& step) { return Value(Unlocked([&] { return StoredPin::Open(s.store, step.name); })); }, "name"_a,
          "One of its steps. NotFound, Corrupt, Incomplete.")
      .def(
          "objects", &ListObjects, "prefix"_a = "", "cursor"_a = "",
          "One page of the objects whose keys begin with `prefix`, ascending, and the cursor of the next page, empty after the last; but for keys that "
          "no store of ours could have. NotFound, Unavailable, Denied.")
      .def("read", &ReadRange, "key"_a, "offset"_a, "size"_a, "A range of one object, unchecked. NotFound; Corrupt: it ends before.")
      .def("listing", &Listing, "ns"_a = "",
           "As steps; and what is left of steps that will never be whole, and why: deletions that were cut short, and what nobody has finished writing "
           "in a week. Unavailable, Denied.")
      .def(
          "delete", [](const Store& s, const FoundStep& step) { Check(Unlocked([&] { return DeleteStep(*s.store, step.name, ReadLimits(kManyObjects)); })); }, "name"_a,
          "Deletes a step: its manifest first, so that it is never half there; then what else of it is ours. Denied, Unavailable.");

  m.def("judge_retention", &JudgeSteps, "newest_first"_a, "keep_last"_a, "keep_every"_a, "keep_for"_a,
        "What a rule says of the steps (number, when made) of one namespace and user: whether each stays, and why. 0: no such rule; keep_for in seconds.");
}

}  // namespace sp::python
