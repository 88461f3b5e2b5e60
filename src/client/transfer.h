// A save in progress: copy into the lease, checksum list, seal. Thread-safe.
//
// The work runs on a thread of the client and goes on when every handle is gone. Order of events: copied (the caller's memory is free
// again) < released, where the caller asked to hold the seal < sealed. What a crash between any two leaves: the lease, which ends with this process; sealed or not is in the daemon's ledger.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "client/client_core.h"
#include "client/copy_engine.h"
#include "format/messages.h"

namespace sp {

struct SealInfo {
  uint64_t static_offset = 0;  // In the header.
  Hash256 structure;
  int threads = 0;    // For the copy; 0: the copy engine's default.
  bool hold = false;  // Seal only after Transfer::Release.
};

struct TransferPlan {
  Origin origin;
  uint64_t lease = 0;
  Nanos lease_period = 0;       // How long the daemon waits without a renewal.
  SlotCache::Handle slot;
  uint64_t length = 0;          // Of the shard; its checksum list lies behind it.
  std::vector<uint8_t> header;  // Bytes [0, header.size()) of the shard.
  std::vector<CopySegment> segments;  // The rest, or with `in_place` the part of it that is not there yet. Checked by the caller.
  SealInfo seal;
  bool in_place = false;
};

// State of one transfer. Owners: the handles, the task that runs it, the renewal of its lease.
class TransferState : public std::enable_shared_from_this<TransferState> {
 public:
  explicit TransferState(TransferPlan plan) : plan_(std::move(plan)) {}

  // Begins. kLimit, kClosed: not begun, the lease is still the caller's.
  Status Start(ClientCore& core);
  // Ends the copy or the hold soon, with `why` as the error; without effect once the seal has begun.
  void Cancel(const Status& why) noexcept;
  // Ends the hold: the seal follows the copy. Without effect on a transfer that is not held.
  Status Release();

  Status WaitCopied(Nanos deadline) const;
  Result<SealReply> WaitSealed(Nanos deadline) const;
  bool copied() const;
  bool sealed() const;
  double copy_seconds() const;

 private:
  void Run(ClientCore& core);
  Status Copy(ClientCore& core, std::vector<uint32_t>* crcs);
  Status WaitReleased();
  Result<SealReply> Seal(ClientCore& core, const std::vector<uint32_t>& crcs);
  bool Renew(ClientCore& core);

  TransferPlan plan_;
  const ForkGuard guard_;
  std::atomic<bool> cancel_ = false;
  mutable std::mutex mutex_;  // Guards everything below.
  mutable std::condition_variable changed_;
  std::optional<Status> copied_;
  std::optional<Result<SealReply>> sealed_;
  Status cancelled_;  // Why `cancel_` is set.
  bool released_ = false;
  Nanos copy_time_ = 0;
};

// Handle. Waiting takes an absolute deadline; kDeadline means "still running".
class Transfer {
 public:
  explicit Transfer(std::shared_ptr<TransferState> state) : state_(std::move(state)) {}

  // The caller's memory may change, or go, from here on. The copy's error if there was one.
  Status WaitCopied(Nanos deadline) const { return state_->WaitCopied(deadline); }
  Result<SealReply> WaitSealed(Nanos deadline) const { return state_->WaitSealed(deadline); }
  // The caller has decided that the shard shall count. To decide otherwise: Lease::Abort.
  Status Release() { return state_->Release(); }
  bool copied() const { return state_->copied(); }
  bool sealed() const { return state_->sealed(); }
  double copy_seconds() const { return state_->copy_seconds(); }  // 0 while it runs.

 private:
  std::shared_ptr<TransferState> state_;
};

// Tells the daemon that nothing writes into the lease any more. An error: it could not be told, and finds out when this process ends.
Status AbortLease(ClientCore& core, const Origin& origin, uint64_t lease, const std::string& reason);

}  // namespace sp
