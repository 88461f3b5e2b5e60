#include "client/read_pin.h"

#include "base/no_memory.h"
#include "durable/open_store.h"

namespace sp {
namespace {

constexpr Nanos kUnpinTimeout = 2 * kNanosPerSecond;

}  // namespace

ReadPin::ReadPin(CoreHandle core, Origin origin, const OpenReadReply& reply)
    : core_(std::move(core)), origin_(origin), reply_(reply) {
  // Asking for a shard's record makes the pin last longer. What the answer is does not matter: a pin that has ended says so to whoever
  // asks for the next shard, and a reader notices by the checksums.
  const auto period = static_cast<Nanos>(reply.pin_ns / 3);
  const auto renewal = core_->keep_alive.Add(period, [core = &*core_, boot = origin.boot, pin = reply.pin, period] {
    const CallOptions options{.deadline = MonotonicNow() + period, .boot = boot};
    const auto answer = core->session.Ask<ShardInfoReply>(MessageType::kShardInfo, ShardRequest{pin, 0, 0}, options);
    return answer || answer.error().code() != StatusCode::kClosed;
  });
  if (renewal) renewal_ = *renewal;
}

ReadPin::~ReadPin() {
  // Not waiting for the daemon; the task says goodbye for us.
  if (!core_->session.fork_guard().in_owner() || closed_) return;
  core_->keep_alive.Remove(renewal_);
  [[maybe_unused]] const Status added = OrNoMemory("end a read", [this] {
    return core_->tasks.Add([core = &*core_, boot = origin_.boot, pin = reply_.pin] {
      const CallOptions options{.deadline = MonotonicNow() + kUnpinTimeout, .boot = boot};
      [[maybe_unused]] const auto done = core->session.Ask<Empty>(MessageType::kUnpin, PinRequest{pin}, options);
    });
  });
}

Status ReadPin::CheckOpen() {
  SP_RETURN_IF_ERROR(core_->session.fork_guard().Check());
  std::lock_guard lock(mutex_);
  return closed_ ? Status(StatusCode::kClosed, "this read was closed") : Status();
}

ReadResult<std::unique_ptr<ShardReader>> ReadPin::Shard(uint32_t rank) {
  return OrNoMemory("open a shard", [&]() -> ReadResult<std::unique_ptr<ShardReader>> {
    if (Status open = CheckOpen(); !open.ok()) return std::unexpected(open);
    return ShardReader::Open(core_, origin_, reply_.pin, reply_.info, rank, [this] { return Store(); });
  });
}

Result<std::shared_ptr<ObjectStore>> ReadPin::Store() {
  std::lock_guard lock(mutex_);
  if (store_) return store_;
  if (reply_.store.empty()) return Error(StatusCode::kProtocol, "the daemon does not have the shard and names no store that has");
  SP_ASSIGN_OR_RETURN(store_, OpenStoreForReading(reply_.store));
  return store_;
}

Result<bool> ReadPin::ReportCorrupt(uint32_t rank, uint64_t block) {
  return OrNoMemory("report a corrupt block", [&]() -> Result<bool> {
    SP_RETURN_IF_ERROR(CheckOpen());
    const CallOptions options{.deadline = core_->Deadline(), .boot = origin_.boot};
    SP_ASSIGN_OR_RETURN(const auto reply, core_->session.Ask<ReportCorruptReply>(MessageType::kReportCorrupt, ShardRequest{reply_.pin, rank, block}, options));
    return reply.confirmed;
  });
}

void ReadPin::Close() {
  if (!core_->session.fork_guard().in_owner()) return;
  {
    std::lock_guard lock(mutex_);
    if (closed_) return;
    closed_ = true;
  }
  core_->keep_alive.Remove(renewal_);
  // A daemon that cannot be told lets go of the pin when it expires, or when this process ends.
  const CallOptions options{.deadline = MonotonicNow() + kUnpinTimeout, .boot = origin_.boot};
  [[maybe_unused]] const auto done =
      OrNoMemory("end a read", [&] { return core_->session.Ask<Empty>(MessageType::kUnpin, PinRequest{reply_.pin}, options); });
}

}  // namespace sp
