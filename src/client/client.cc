#include "client/client.h"

#include <algorithm>
#include <limits>

#include "base/no_memory.h"
#include "format/names.h"

namespace sp {
namespace {

// How much earlier than we give up the daemon is asked to answer, so that a refusal arrives instead of a silence.
constexpr Nanos kAnswerMargin = 100 * kNanosPerMilli;
// How long after the end of a wait the daemon's "not yet" is waited for.
constexpr Nanos kWaitGrace = 250 * kNanosPerMilli;
constexpr Nanos kWaitRound = 60 * kNanosPerSecond;
constexpr Nanos kCancelTimeout = 3 * kNanosPerSecond;
constexpr Nanos kByeTimeout = 2 * kNanosPerSecond;

Nanos After(Nanos timeout) {
  const Nanos now = MonotonicNow();
  return timeout > kForever - now ? kForever : now + std::max<Nanos>(timeout, 0);
}

uint64_t DaemonTimeout(Nanos timeout) { return static_cast<uint64_t>(std::max<Nanos>(timeout - kAnswerMargin, timeout / 2)); }

}  // namespace

Client::Client(const ClientOptions& options)
    : core_(std::make_shared<ClientCore>(SessionOptions{options.socket_path, options.client_name, options.start}, options.timeout)) {}

Result<std::unique_ptr<Client>> Client::Connect(const ClientOptions& options) {
  return OrNoMemory("connect", [&]() -> Result<std::unique_ptr<Client>> {
    std::unique_ptr<Client> client(new Client(options));
    SP_RETURN_IF_ERROR(client->core_->session.Connect(After(options.timeout)));
    return client;
  });
}

Client::~Client() { Close(); }

CallOptions Client::Within(Nanos timeout) const { return {.deadline = After(timeout)}; }

Result<OpenGenerationReply> Client::OpenGeneration(const OpenGenerationRequest& request, Nanos timeout) {
  return OrNoMemory("open a generation", [&]() -> Result<OpenGenerationReply> {
    SP_RETURN_IF_ERROR(CheckNamespace(request.ns));
    return core_->session.Ask<OpenGenerationReply>(MessageType::kOpenGeneration, request, Within(timeout));
  });
}

Result<uint32_t> Client::PrepareSlots(const std::string& ns, uint64_t length, uint32_t count, Nanos timeout) {
  return OrNoMemory("prepare slots", [&]() -> Result<uint32_t> {
    SP_RETURN_IF_ERROR(CheckNamespace(ns));
    if (length == 0 || length > kShardBytesMax) {
      return Error(StatusCode::kInvalidArgument, "shard of " + std::to_string(length) + " bytes; the limit is " + std::to_string(kShardBytesMax));
    }
    const CallOptions options = Within(timeout);
    const PrepareSlotsRequest request{ns, LeaseBytes(length), DaemonTimeout(timeout), count};
    SP_ASSIGN_OR_RETURN(const Reply reply, core_->session.Call(MessageType::kPrepareSlots, Encode(request), options));
    SP_RETURN_IF_ERROR(reply.frame.ToStatus());
    SP_ASSIGN_OR_RETURN(const auto prepared, Decode<PrepareSlotsReply>(reply.frame.body));
    for (const SlotInfo& slot : prepared.slots) {
      SP_ASSIGN_OR_RETURN([[maybe_unused]] const SlotCache::Handle mapped,
                          core_->slots.Get(core_->session, reply.origin, slot.slot, slot.extents, options.deadline));
    }
    return static_cast<uint32_t>(prepared.slots.size());
  });
}

Result<std::unique_ptr<Lease>> Client::Reserve(const ReserveOptions& r, Nanos timeout) {
  return OrNoMemory("reserve", [&]() -> Result<std::unique_ptr<Lease>> {
    SP_RETURN_IF_ERROR(CheckNamespace(r.ns));
    if (r.length == 0 || r.length > kShardBytesMax) {
      return Error(StatusCode::kInvalidArgument, "shard of " + std::to_string(r.length) + " bytes; the limit is " + std::to_string(kShardBytesMax));
    }
    const CallOptions options = Within(timeout);
    const ReserveRequest request{r.ns, r.generation, r.nonce, r.step, r.try_number, r.world_size, r.rank, LeaseBytes(r.length),
                                 DaemonTimeout(timeout)};
    SP_ASSIGN_OR_RETURN(const Reply reply, core_->session.Call(MessageType::kReserve, Encode(request), options));
    SP_RETURN_IF_ERROR(reply.frame.ToStatus());
    SP_ASSIGN_OR_RETURN(const auto granted, Decode<ReserveReply>(reply.frame.body));
    core_->slots.Forget(granted.gone_slots);
    Result<std::unique_ptr<Lease>> lease = OrNoMemory("map a slot", [&]() -> Result<std::unique_ptr<Lease>> {
      SP_ASSIGN_OR_RETURN(SlotCache::Handle slot, core_->slots.Get(core_->session, reply.origin, granted.slot, granted.extents, options.deadline));
      if (slot->bytes().size() < request.bytes) {
        return Error(StatusCode::kProtocol, "a slot of " + std::to_string(slot->bytes().size()) + " bytes was granted for " +
                                                std::to_string(request.bytes));
      }
      if (granted.lease_ns == 0) return Error(StatusCode::kProtocol, "a lease that lasts no time was granted");
      return std::make_unique<Lease>(core_, reply.origin, granted, std::move(slot), r.length);
    });
    // We will not use it. If this does not arrive the lease expires.
    if (!lease) {
      [[maybe_unused]] const Status aborted = AbortLease(*core_, reply.origin, granted.lease, lease.error().message());
    }
    return lease;
  });
}

Result<Level> Client::Wait(const std::string& ns, const Id128& attempt, Level level, Nanos timeout) {
  return OrNoMemory("wait for a level", [&]() -> Result<Level> {
    SP_RETURN_IF_ERROR(CheckNamespace(ns));
    const Nanos end = After(timeout);
    for (;;) {
      const Nanos left = std::max<Nanos>(end - MonotonicNow(), 0);
      const Nanos round = std::min(left, kWaitRound);
      const WaitRequest request{ns, attempt, level, static_cast<uint64_t>(round)};
      const Nanos unreachable = round == left ? round + kWaitGrace : std::max(round, core_->timeout) + kWaitGrace;
      CallOptions options = Within(unreachable);
      options.long_call = true;
      const auto reply = core_->session.Ask<WaitReply>(MessageType::kWait, request, options);
      if (reply) return reply->level;
      if (reply.error().code() != StatusCode::kDeadline || round == left) return std::unexpected(reply.error());
    }
  });
}

Result<AttemptInfo> Client::Latest(const std::string& ns, Level level) {
  return OrNoMemory("ask for the latest step", [&]() -> Result<AttemptInfo> {
    SP_RETURN_IF_ERROR(CheckNamespace(ns));
    return core_->session.Ask<AttemptInfo>(MessageType::kLatest, NamespaceRequest{ns, level, 0}, Within());
  });
}

Result<std::vector<AttemptInfo>> Client::ListSteps(const std::string& ns) {
  return OrNoMemory("list steps", [&]() -> Result<std::vector<AttemptInfo>> {
    SP_RETURN_IF_ERROR(CheckNamespace(ns));
    std::vector<AttemptInfo> all;
    for (;;) {
      const NamespaceRequest request{ns, Level::kMemory, static_cast<uint32_t>(all.size())};
      SP_ASSIGN_OR_RETURN(auto page, core_->session.Ask<ListStepsReply>(MessageType::kListSteps, request, Within()));
      all.insert(all.end(), page.attempts.begin(), page.attempts.end());
      if (page.attempts.empty() || all.size() >= page.total) return all;
    }
  });
}

Result<std::vector<NamespaceInfo>> Client::ListNamespaces() {
  return OrNoMemory("list namespaces", [&]() -> Result<std::vector<NamespaceInfo>> {
    std::vector<NamespaceInfo> all;
    for (;;) {
      const NamespaceRequest request{"", Level::kMemory, static_cast<uint32_t>(all.size())};
      SP_ASSIGN_OR_RETURN(auto page, core_->session.Ask<ListNamespacesReply>(MessageType::kListNamespaces, request, Within()));
      all.insert(all.end(), page.namespaces.begin(), page.namespaces.end());
      if (page.namespaces.empty() || all.size() >= page.total) return all;
    }
  });
}

Result<std::unique_ptr<ReadPin>> Client::OpenRead(const OpenReadRequest& request) {
  return OrNoMemory("open a read", [&]() -> Result<std::unique_ptr<ReadPin>> {
    SP_RETURN_IF_ERROR(CheckNamespace(request.ns));
    SP_ASSIGN_OR_RETURN(const Reply reply, core_->session.Call(MessageType::kOpenRead, Encode(request), Within()));
    SP_RETURN_IF_ERROR(reply.frame.ToStatus());
    SP_ASSIGN_OR_RETURN(const auto opened, Decode<OpenReadReply>(reply.frame.body));
    if (opened.pin_ns == 0) return Error(StatusCode::kProtocol, "a pin that lasts no time was granted");
    return std::make_unique<ReadPin>(core_, reply.origin, opened);
  });
}

Status Client::PinStep(const std::string& ns, const Id128& attempt, bool on) {
  return OrNoMemory("pin a step", [&]() -> Status {
    SP_RETURN_IF_ERROR(CheckNamespace(ns));
    const auto done = core_->session.Ask<Empty>(MessageType::kPinStep, PinStepRequest{ns, attempt, on}, Within());
    return done ? Status() : done.error();
  });
}

Status Client::MakeDurable(const std::string& ns, const Id128& attempt) {
  return OrNoMemory("ask for durability", [&]() -> Status {
    SP_RETURN_IF_ERROR(CheckNamespace(ns));
    const auto done = core_->session.Ask<Empty>(MessageType::kMakeDurable, MakeDurableRequest{ns, attempt}, Within());
    return done ? Status() : done.error();
  });
}

Result<std::string> Client::StatusJson() {
  return OrNoMemory("ask for the status", [&]() -> Result<std::string> {
    SP_ASSIGN_OR_RETURN(auto reply, core_->session.Ask<StatusReply>(MessageType::kStatus, Empty{}, Within()));
    return std::move(reply.json);
  });
}

void Client::Close(Nanos timeout) {
  if (!core_->session.fork_guard().in_owner() || closed_.exchange(true)) return;
  ClientCore& core = *core_;
  core.session.Interrupt();
  if (!core.tasks.WaitIdle(After(timeout))) {
    core.transfers.CancelAll(OrNoMemory("cancel saves", []() -> Status {
      return {StatusCode::kClosed, "the client was closed before the save was finished"};
    }));
    // What still runs now waits for a daemon that does not answer.
    if (!core.tasks.WaitIdle(After(kCancelTimeout))) core.session.End(MonotonicNow());
  }
  core.tasks.Stop();
  core.slots.Clear();  // Bye promises that nothing writes any more.
  core.session.End(After(kByeTimeout));
  core.keep_alive.Stop();
}

}  // namespace sp
