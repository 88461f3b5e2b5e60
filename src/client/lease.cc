#include "client/lease.h"

#include "base/no_memory.h"
#include "client/in_place.h"

namespace sp {

Lease::~Lease() {
  if (!core_->session.fork_guard().in_owner() || use_ != Use::kNone) return;
  // Not here: the destructor must not wait for the daemon. When the client is closed its session has ended, and the lease with it.
  [[maybe_unused]] const Status added = OrNoMemory("abort a save", [this] {
    return core_->tasks.Add([core = &*core_, origin = origin_, lease = reply_.lease] {
      [[maybe_unused]] const Status aborted = AbortLease(*core, origin, lease, "the save was given up before it began to copy");
    });
  });
}

Result<Transfer> Lease::Start(ByteSpan header, std::vector<CopySegment> segments, const SealInfo& seal) {
  return Begin(header, std::move(segments), seal, false);
}

Result<Transfer> Lease::StartInPlace(ByteSpan header, std::vector<CopySegment> segments, const SealInfo& seal) {
  return Begin(header, std::move(segments), seal, true);
}

Result<Transfer> Lease::Begin(ByteSpan header, std::vector<CopySegment> segments, const SealInfo& seal, bool in_place) {
  return OrNoMemory("start a save", [&]() -> Result<Transfer> {
    SP_RETURN_IF_ERROR(core_->session.fork_guard().Check());
    if (header.size() > kHeaderBytesMax || header.size() > length_ || seal.static_offset >= header.size()) {
      return Error(StatusCode::kInvalidArgument, "header of " + std::to_string(header.size()) + " bytes, static part from " +
                                                     std::to_string(seal.static_offset) + ": outside the limits, or of the shard's " +
                                                     std::to_string(length_) + " bytes");
    }
    if (seal.threads < 0 || seal.threads > kCopyThreadsMax) {
      return Error(StatusCode::kInvalidArgument, "copy threads " + std::to_string(seal.threads) + " not in 0.." + std::to_string(kCopyThreadsMax));
    }
    // Checked here and not only by the copy, so that the caller hears it at once.
    std::vector<CopySegment> all{{header.data(), 0, header.size()}};
    all.insert(all.end(), segments.begin(), segments.end());
    SP_RETURN_IF_ERROR(CheckSegments(all, length_, !in_place));

    std::lock_guard lock(mutex_);
    if (use_ != Use::kNone) {
      return Error(StatusCode::kInvalidArgument, use_ == Use::kStarted ? "this lease's save has been started already" : "this lease was aborted");
    }
    auto state = std::make_shared<TransferState>(TransferPlan{
        .origin = origin_,
        .lease = reply_.lease,
        .lease_period = static_cast<Nanos>(reply_.lease_ns),
        .slot = slot_,
        .length = length_,
        .header = std::vector<uint8_t>(header.begin(), header.end()),
        .segments = std::move(segments),
        .seal = seal,
        .in_place = in_place,
    });
    SP_RETURN_IF_ERROR(state->Start(*core_));
    use_ = Use::kStarted;
    transfer_ = state;
    return Transfer(std::move(state));
  });
}

Status Lease::Abort(const std::string& reason) {
  return OrNoMemory("abort a save", [&]() -> Status {
    SP_RETURN_IF_ERROR(core_->session.fork_guard().Check());
    std::unique_lock lock(mutex_);
    const Use use = use_;
    const std::shared_ptr<TransferState> transfer = transfer_;
    if (use == Use::kNone) use_ = Use::kAborted;
    lock.unlock();
    switch (use) {
      case Use::kAborted: return {};
      case Use::kNone: return AbortLease(*core_, origin_, reply_.lease, reason);
      case Use::kStarted: break;
    }
    transfer->Cancel(Status(StatusCode::kClosed, "the save was aborted: " + reason));
    // The transfer's own thread tells the daemon, after the last write. How it ended is for those who wait on it.
    [[maybe_unused]] const Result<SealReply> end = transfer->WaitSealed(kForever);
    return {};
  });
}

}  // namespace sp
