#include "client/transfer.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "base/crc32c.h"
#include "base/no_memory.h"
#include "base/sha256.h"
#include "client/in_place.h"
#include "format/fixed_layout.h"

namespace sp {
namespace {

// An abort frees the slot early, so it is worth a try, not a long wait.
constexpr Nanos kAbortTimeout = 2 * kNanosPerSecond;
constexpr size_t kReasonBytesMax = 200;  // LeaseRequest::reason.

std::chrono::steady_clock::time_point At(Nanos deadline) {
  return std::chrono::steady_clock::time_point(std::chrono::nanoseconds(deadline));
}

uint32_t WholeCrc(const std::vector<uint32_t>& crcs, uint64_t length) {
  uint32_t whole = 0;
  for (size_t block = 0; block < crcs.size(); ++block) {
    whole = Crc32cCombine(whole, crcs[block], std::min(kBlockBytes, length - block * kBlockBytes));
  }
  return whole;
}

}  // namespace

Status AbortLease(ClientCore& core, const Origin& origin, uint64_t lease, const std::string& reason) {
  const LeaseRequest request{lease, reason.substr(0, kReasonBytesMax)};
  const CallOptions options{.deadline = std::min(core.Deadline(), MonotonicNow() + kAbortTimeout), .boot = origin.boot};
  const Result<Empty> done = core.session.Ask<Empty>(MessageType::kAbort, request, options);
  return done ? Status() : done.error();
}

Status TransferState::Start(ClientCore& core) {
  // Before the copy can begin: it may take longer than the lease lasts, and may have to wait for a thread.
  SP_ASSIGN_OR_RETURN(const uint64_t renewal, core.keep_alive.Add(plan_.lease_period / 3, [self = shared_from_this(), &core] {
    return self->Renew(core);
  }));
  uint64_t cancel = 0;  // No transfer's.
  const auto end = [](ClientCore& core, uint64_t renewal, uint64_t cancel) {
    core.keep_alive.Remove(renewal);
    core.transfers.Remove(cancel);
  };
  const Status added = OrNoMemory("start a save", [&] {
    cancel = core.transfers.Add([self = shared_from_this()](const Status& why) { self->Cancel(why); });
    return core.tasks.Add([self = shared_from_this(), &core, end, renewal, cancel] {
      self->Run(core);
      end(core, renewal, cancel);
    });
  });
  if (!added.ok()) end(core, renewal, cancel);
  return added;
}

void TransferState::Cancel(const Status& why) noexcept {
  std::lock_guard lock(mutex_);
  if (cancelled_.ok()) cancelled_ = CopyStatus(why);
  cancel_ = true;
  changed_.notify_all();
}

Status TransferState::Release() {
  SP_RETURN_IF_ERROR(guard_.Check());
  std::lock_guard lock(mutex_);
  released_ = true;
  changed_.notify_all();
  return {};
}

Status TransferState::WaitReleased() {
  if (!plan_.seal.hold) return {};
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return released_ || cancel_; });
  return CopyStatus(cancelled_);
}

bool TransferState::Renew(ClientCore& core) {
  const CallOptions options{.deadline = MonotonicNow() + plan_.lease_period / 3, .boot = plan_.origin.boot};
  const Result<Empty> renewed = core.session.Ask<Empty>(MessageType::kRenew, LeaseRequest{plan_.lease, ""}, options);
  if (renewed) return true;
  switch (renewed.error().code()) {
    case StatusCode::kUnavailable:
    case StatusCode::kDeadline: return true;  // The daemon may be back before the lease ends; the seal will tell.
    default: Cancel(renewed.error()); return false;
  }
}

void TransferState::Run(ClientCore& core) {
  std::vector<uint32_t> crcs;
  const Nanos begin = MonotonicNow();
  const Status copied = OrNoMemory("copy", [&] {
    crcs.resize(BlockCount(plan_.length));
    return Copy(core, &crcs);
  });
  {
    std::lock_guard lock(mutex_);
    copy_time_ = MonotonicNow() - begin;
    copied_ = CopyStatus(copied);
  }
  changed_.notify_all();
  const Status may_seal = copied.ok() ? WaitReleased() : CopyStatus(copied);
  Result<SealReply> sealed =
      may_seal.ok() ? OrNoMemory("seal", [&] { return Seal(core, crcs); }) : std::unexpected(CopyStatus(may_seal));
  if (!sealed && sealed.error().code() == StatusCode::kDeadline) {
    // For whoever waits, kDeadline means "still running", and this has ended.
    sealed = OrNoMemory("seal", [&]() -> Result<SealReply> {
      return Error(StatusCode::kUnavailable, sealed.error().message() + "; whether the shard was sealed is unknown");
    });
  }
  if (!sealed) {
    // The daemon keeps the slot of an ended lease until it hears that nothing writes there any more. Where it cannot be told now, it
    // finds out when this session ends; the error that counts is the one that is kept.
    [[maybe_unused]] const Status aborted =
        OrNoMemory("abort", [&] { return AbortLease(core, plan_.origin, plan_.lease, sealed.error().ToString()); });
  }
  {
    std::lock_guard lock(mutex_);
    sealed_ = std::move(sealed);
    plan_.slot.reset();
    plan_.header = {};
    plan_.segments = {};
  }
  changed_.notify_all();
}

Status TransferState::Copy(ClientCore& core, std::vector<uint32_t>* crcs) {
  std::vector<CopySegment> segments;
  segments.reserve(plan_.segments.size() + 1);
  segments.push_back({plan_.header.data(), 0, plan_.header.size()});
  segments.insert(segments.end(), plan_.segments.begin(), plan_.segments.end());
  const MutableByteSpan target = plan_.slot->bytes().first(plan_.length);
  const CopyOptions options{.threads = plan_.seal.threads, .cancel = &cancel_};
  const Status status = plan_.in_place ? FillInPlace(segments, target, *crcs, options, core.in_place_threads)
                                       : core.engine.CopyIn(segments, target, *crcs, options);
  std::lock_guard lock(mutex_);
  return cancelled_.ok() ? status : cancelled_;
}

Result<SealReply> TransferState::Seal(ClientCore& core, const std::vector<uint32_t>& crcs) {
  const uint64_t list = ChecksumListOffset(plan_.length);
  const MutableByteSpan bytes = plan_.slot->bytes();
  std::memset(bytes.data() + plan_.length, 0, list - plan_.length);
  for (size_t block = 0; block < crcs.size(); ++block) layout::Put(bytes, list + 4 * block, crcs[block]);
  SealRequest request;
  request.lease = plan_.lease;
  request.length_bytes = plan_.length;
  request.header_bytes = plan_.header.size();
  request.static_offset = plan_.seal.static_offset;
  request.structure = plan_.seal.structure;
  request.block_root = Sha256(bytes.subspan(list, 4 * crcs.size()));
  request.whole_crc = WholeCrc(crcs, plan_.length);
  return core.session.Ask<SealReply>(MessageType::kSeal, request, {.deadline = core.Deadline(), .boot = plan_.origin.boot});
}

Status TransferState::WaitCopied(Nanos deadline) const {
  return OrNoMemory("wait for a copy", [&]() -> Status {
    SP_RETURN_IF_ERROR(guard_.Check());
    std::unique_lock lock(mutex_);
    if (changed_.wait_until(lock, At(deadline), [this] { return copied_.has_value(); })) return *copied_;
    return {StatusCode::kDeadline, "the copy is still running"};
  });
}

Result<SealReply> TransferState::WaitSealed(Nanos deadline) const {
  return OrNoMemory("wait for a seal", [&]() -> Result<SealReply> {
    SP_RETURN_IF_ERROR(guard_.Check());
    std::unique_lock lock(mutex_);
    if (changed_.wait_until(lock, At(deadline), [this] { return sealed_.has_value(); })) return *sealed_;
    return Error(StatusCode::kDeadline, copied_ ? "the seal is still running" : "the copy is still running");
  });
}

bool TransferState::copied() const {
  if (!guard_.in_owner()) return false;  // The lock may be held for ever here.
  std::lock_guard lock(mutex_);
  return copied_.has_value() && copied_->ok();
}

bool TransferState::sealed() const {
  if (!guard_.in_owner()) return false;  // The lock may be held for ever here.
  std::lock_guard lock(mutex_);
  return sealed_.has_value() && sealed_->has_value();
}

double TransferState::copy_seconds() const {
  if (!guard_.in_owner()) return 0;
  std::lock_guard lock(mutex_);
  return static_cast<double>(copy_time_) / static_cast<double>(kNanosPerSecond);
}

}  // namespace sp
