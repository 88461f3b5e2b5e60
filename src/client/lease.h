// Room for one shard, granted by the daemon: a mapped slot to copy into. Thread-safe.
//
// Either Start hands it over to a transfer, or Abort, also done by the destructor, gives it back.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "client/client_core.h"
#include "client/transfer.h"

namespace sp {

class Lease {
 public:
  Lease(CoreHandle core, Origin origin, const ReserveReply& reply, SlotCache::Handle slot, uint64_t length)
      : core_(std::move(core)), origin_(origin), reply_(reply), slot_(std::move(slot)), length_(length) {}
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  ~Lease();

  const Id128& attempt() const { return reply_.attempt; }
  uint64_t length() const { return length_; }
  uint64_t slot() const { return reply_.slot; }
  uint64_t mapping() const { return slot_->number(); }
  uint64_t capacity() const { return slot_->bytes().size(); }
  // The mapped slot. Valid while this object lives; to be written only before Start, or by devices until StartInPlace.
  uint8_t* data() const { return slot_->bytes().data(); }

  // Copies header and segments, which tile [0, length) in order, then seals, on a thread of the client. The memory behind the segments stays
  // valid and unchanged until Transfer::WaitCopied returned. kInvalidArgument: they do not tile, or the lease was used already;
  // kLimit, kClosed: no thread for it. After an error of Start the lease is as before.
  Result<Transfer> Start(ByteSpan header, std::vector<CopySegment> segments, const SealInfo& seal);
  // The same, but what header and segments leave is in the lease already.
  Result<Transfer> StartInPlace(ByteSpan header, std::vector<CopySegment> segments, const SealInfo& seal);

  // Promises that nothing writes into the slot any more; other ranks see `reason`. Cancels a transfer in progress and waits for its end.
  // Doing it again, or after the seal, has no effect.
  Status Abort(const std::string& reason);

 private:
  enum class Use { kNone, kStarted, kAborted };

  Result<Transfer> Begin(ByteSpan header, std::vector<CopySegment> segments, const SealInfo& seal, bool in_place);

  CoreHandle core_;
  const Origin origin_;
  const ReserveReply reply_;
  const SlotCache::Handle slot_;
  const uint64_t length_;
  std::mutex mutex_;  // Guards what follows.
  Use use_ = Use::kNone;
  std::shared_ptr<TransferState> transfer_;
};

}  // namespace sp
