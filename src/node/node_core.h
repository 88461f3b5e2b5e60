// NodeCore: the daemon's whole behaviour as a step function. Pure: no I/O, threads, clock or randomness; the simulator runs this very code.
//
// State changes that must survive a SIGKILL happen only by applying a ledger entry, live or replayed: the same function does both.
#pragma once

#include <memory>
#include <optional>

#include "node/core_types.h"

namespace sp {

// Owned by the event loop.
class NodeCore {
 public:
  explicit NodeCore(CoreConfig config);
  ~NodeCore();
  NodeCore(NodeCore&&) noexcept;

  // Once, before the first Step: what the ledger and the keeper still hold after a restart (or nothing). Returns the actions that finish
  // or close what was open. Extents that no entry mentions were never lent.
  std::vector<Action> Restore(Nanos now, const Ledger::Contents& contents, const std::vector<uint32_t>& extents);

  std::vector<Action> Step(Nanos now, const Event& event);
  // Something that was asked to be durable is on its way: a daemon that is to end waits for it, within its grace.
  bool IsDraining() const;
  // When Tick is due at the latest; nullopt: nothing is timed.
  std::optional<Nanos> NextDeadline() const;
  // The shortest log that replays to this state.
  std::vector<LedgerEntry> Snapshot() const;
  // For /metrics and the status reply.
  std::string StatusJson(Nanos now, uint32_t uid, bool all_uids) const;
  // For tests: kInternal names the first rule that the bookkeeping breaks. Holds between steps.
  Status CheckInvariants() const;

  class Impl;

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace sp
