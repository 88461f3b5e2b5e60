// The session with the daemon.
#include "client/client.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "convert.h"
#include "errors.h"
#include "module.h"
#include "wait.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace sp::python {
namespace {

// Python's constructor makes the object before the client is known to be usable.
class PyClient {
 public:
  PyClient(const std::string& socket_path, const std::string& client_name, const std::optional<StartOptions>& start, double deadline)
      : client_(Value(Unlocked([&, timeout = ToNanos(deadline)] {
          return Client::Connect({.socket_path = socket_path, .client_name = client_name, .start = start, .timeout = timeout});
        }))) {}
  ~PyClient() {
    Unlocked([&] { client_.reset(); });
  }
  PyClient(const PyClient&) = delete;
  PyClient& operator=(const PyClient&) = delete;

  Client* operator->() const { return client_.get(); }

 private:
  std::unique_ptr<Client> client_;
};

OpenGenerationReply OpenGeneration(PyClient& c, const std::string& ns, const nb::bytes& nonce, uint32_t world_size, uint32_t rank,
                                   const std::optional<nb::bytes>& parent, bool fresh, double deadline) {
  if (parent && fresh) Raise(Status(StatusCode::kInvalidArgument, "a generation has a parent or is fresh, not both"));
  OpenGenerationRequest request{.ns = ns, .nonce = ToId(nonce, "nonce"), .world_size = world_size, .rank = rank};
  if (fresh) request.parent_mode = ParentMode::kFresh;
  if (parent) {
    request.parent_mode = ParentMode::kAttempt;
    request.parent = ToId(*parent, "parent");
  }
  return Value(Unlocked([&, timeout = ToNanos(deadline)] { return c->OpenGeneration(request, timeout); }));
}

std::unique_ptr<Lease> Reserve(PyClient& c, const std::string& ns, uint64_t generation, const nb::bytes& nonce, uint64_t step,
                               uint32_t try_number, uint32_t world_size, uint32_t rank, uint64_t length, double deadline) {
  const ReserveOptions options{ns, generation, ToId(nonce, "nonce"), step, try_number, world_size, rank, length};
  return Value(Unlocked([&, timeout = ToNanos(deadline)] { return c->Reserve(options, timeout); }));
}

std::string WaitFor(PyClient& c, const std::string& ns, const nb::bytes& attempt, const std::string& level, std::optional<double> timeout) {
  const Id128 id = ToId(attempt, "attempt");
  const Level wanted = ToLevel(level);
  // A slice in which the daemon was not reached is no answer: it has the client's timeout to come back.
  Nanos reached_at = MonotonicNow();
  const auto may_go_on = [&](const Status& status) {
    if (status.code() != StatusCode::kUnavailable) reached_at = MonotonicNow();
    return IsNotYet(status) || (status.code() == StatusCode::kUnavailable && MonotonicNow() - reached_at < c->timeout());
  };
  const auto reached = WaitInterruptibly(
      ToNanos(timeout), kSliceOfDaemonWait, [&](Nanos time) { return c->Wait(ns, id, wanted, time); }, may_go_on);
  if (!reached) Raise(reached.error());
  return std::string(LevelName(*reached));
}

std::unique_ptr<ReadPin> OpenRead(PyClient& c, const std::string& ns, std::optional<uint64_t> step, const std::optional<nb::bytes>& attempt,
                                  const std::optional<nb::bytes>& nonce, uint32_t sequence) {
  if (step && attempt) Raise(Status(StatusCode::kInvalidArgument, "a read is by step or by attempt, not both"));
  OpenReadRequest request{.ns = ns, .sequence = sequence};
  if (step) {
    request.choice = ReadChoice::kStep;
    request.step = *step;
  }
  if (attempt) {
    request.choice = ReadChoice::kAttempt;
    request.attempt = ToId(*attempt, "attempt");
  }
  if (nonce) request.nonce = ToId(*nonce, "nonce");
  return Value(Unlocked([&] { return c->OpenRead(request); }));
}

}  // namespace

void BindClient(nb::module_& m) {
  nb::class_<StartOptions>(m, "StartOptions", "How to start a private daemon.")
      .def(
          "__init__",
          [](StartOptions* self, const std::string& daemon_path, const std::vector<std::string>& arguments, const std::string& lock_path,
             const std::string& log_path) { new (self) StartOptions{daemon_path, arguments, lock_path, log_path}; },
          nb::kw_only(), "daemon_path"_a, "arguments"_a, "lock_path"_a, "log_path"_a,
          "`arguments` are those after the program's name. Of all processes that use one `lock_path`, one starts the daemon.");

  nb::class_<PyClient>(m, "Client",
                       "One session with the node's daemon. Thread-safe. Not usable in a forked child (raises Unavailable). Deadlines and "
                       "timeouts are seconds from now.")
      .def(nb::init<const std::string&, const std::string&, const std::optional<StartOptions>&, double>(), "socket_path"_a, nb::kw_only(),
           "client_name"_a = "", "start"_a.none() = nb::none(), "deadline"_a = 30.0,
           "Connects. When nobody listens and `start` is given, starts a private daemon; Unavailable otherwise. `deadline` also holds for "
           "every call that takes none.")
      .def_prop_ro("daemon", [](const PyClient& c) { return c->daemon(); }, "The daemon of the newest connection.")
      .def_prop_ro("socket_path", [](const PyClient& c) { return c->socket_path(); }, "Where it is connected.")
      .def_prop_ro("mappings", [](const PyClient& c) { return Unlocked([&] { return c->mappings(); }); }, "Numbers of the slots' mappings that are there now.")
      .def_prop_ro("started_daemon", [](const PyClient& c) { return c->started_daemon(); }, "This client started the private daemon.")
      .def("open_generation", &OpenGeneration, "ns"_a, "nonce"_a, "world_size"_a, "rank"_a, nb::kw_only(), "parent"_a.none() = nb::none(),
           "fresh"_a = false, "deadline"_a, "Opens the generation of a launch; the same nonce gives the same generation.")
      .def(
          "prepare_slots",
          [](PyClient& c, const std::string& ns, uint64_t length, uint32_t count, double deadline) {
            return Value(Unlocked([&, timeout = ToNanos(deadline)] { return c->PrepareSlots(ns, length, count, timeout); }));
          },
          "ns"_a, "length"_a, "count"_a, nb::kw_only(), "deadline"_a,
          "Announces shards of `length` bytes; returns how many slots are ready and mapped in this process.")
      .def("reserve", &Reserve, "ns"_a, "generation"_a, "nonce"_a, "step"_a, "try_number"_a, "world_size"_a, "rank"_a, "length"_a, nb::kw_only(),
           "deadline"_a, "Room for one shard, before any byte is copied. NoSpace, Fenced, Closed.")
      .def("wait", &WaitFor, "ns"_a, "attempt"_a, "level"_a, nb::kw_only(), "timeout"_a.none(),
           "Waits until the attempt has the level; the level it has (\"none\": retired since). DeadlineExceeded, Closed, Corrupt.")
      .def(
          "latest",
          [](PyClient& c, const std::string& ns, const std::string& level) {
            const Level wanted = ToLevel(level);
            return Value(Unlocked([&] { return c->Latest(ns, wanted); }));
          },
          "ns"_a, "level"_a = "memory", "The newest complete attempt. NotFound, Lost, Unavailable.")
      .def(
          "list_steps", [](PyClient& c, const std::string& ns) { return Value(Unlocked([&] { return c->ListSteps(ns); })); }, "ns"_a,
          "What can be restored, newest first, then whatever else is known.")
      .def(
          "list_namespaces", [](PyClient& c) { return Value(Unlocked([&] { return c->ListNamespaces(); })); }, "Those of this user.")
      .def("open_read", &OpenRead, "ns"_a, nb::kw_only(), "step"_a.none() = nb::none(), "attempt"_a.none() = nb::none(),
           "nonce"_a.none() = nb::none(), "sequence"_a = 0,
           "Chooses and holds one attempt. With a nonce all ranks of the launch get the same one for the same sequence number.")
      .def(
          "pin_step",
          [](PyClient& c, const std::string& ns, const nb::bytes& attempt, bool on) {
            const Id128 id = ToId(attempt, "attempt");
            Check(Unlocked([&] { return c->PinStep(ns, id, on); }));
          },
          "ns"_a, "attempt"_a, "on"_a, "Keeps an attempt until it is let go again.")
      .def(
          "make_durable",
          [](PyClient& c, const std::string& ns, const nb::bytes& attempt) {
            const Id128 id = ToId(attempt, "attempt");
            Check(Unlocked([&] { return c->MakeDurable(ns, id); }));
          },
          "ns"_a, "attempt"_a, "Asks for level durable. Unavailable: the daemon has no durable tier. Closed: the attempt has ended.")
      .def(
          "status", [](PyClient& c) { return Value(Unlocked([&] { return c->StatusJson(); })); }, "The daemon's status, JSON.")
      .def(
          "close",
          [](PyClient& c, std::optional<double> timeout) {
            Unlocked([&] { c->Close(timeout ? ToNanos(*timeout) : c->timeout()); });
          },
          nb::kw_only(), "timeout"_a.none() = nb::none(),
          "Lets running transfers finish for up to so many seconds (None: the client's deadline), then ends the session; five more where the "
          "daemon does not answer.");
}

}  // namespace sp::python
