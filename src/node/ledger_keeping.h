// The worker's use of the ledger: append, compact when it is full, and stop taking on work before even that fails. Owned by the event loop.
#pragma once

#include <functional>
#include <vector>

#include "base/clock.h"
#include "format/ledger.h"
#include "format/messages.h"
#include "os/mapping.h"

namespace sp {

class LedgerKeeping {
 public:
  // Requests that make the ledger grow are refused when a compacted log fills so much of its area: writers first, readers when it becomes
  // really tight. The rest is for finishing and undoing what has begun, which must never fail.
  static constexpr double kRefuseWriters = 0.90, kRefuseReaders = 0.97;

  // Maps `fd`. kProtocol: another format or version, left untouched (I-35).
  static Result<LedgerKeeping> Open(int fd, uint64_t size_bytes);

  Ledger::Contents Read() const { return ledger_.Read(); }

  // For the entries of one step, in order: BeginStep, then Append for each. When one does not fit, the log is replaced by `snapshot()`, which
  // includes every entry of the step, so its later ones are done with already. An error: nothing of this step may be acknowledged.
  void BeginStep() { in_snapshot_ = false; }
  Status Append(const LedgerEntry& entry, const std::function<std::vector<LedgerEntry>()>& snapshot);

  // OK, or the kNoSpace with which to answer a request of this type. Compacts first when that may help.
  Status Admit(MessageType type, Nanos now, const std::function<std::vector<LedgerEntry>()>& snapshot);

  uint64_t used_bytes() const { return ledger_.used_bytes(); }
  uint64_t area_bytes() const { return ledger_.area_bytes(); }
  uint64_t compactions() const { return compactions_; }

 private:
  Status Compact(const std::function<std::vector<LedgerEntry>()>& snapshot);
  LedgerKeeping(Mapping mapping, Ledger ledger) : mapping_(std::move(mapping)), ledger_(std::move(ledger)) {}

  Mapping mapping_;
  Ledger ledger_;
  bool in_snapshot_ = false;
  uint64_t compactions_ = 0;
  Nanos compacted_at_ = 0;
  uint64_t compacted_bytes_ = 0;  // Used right after the last compaction.
};

}  // namespace sp
