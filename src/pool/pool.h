// Pool: which extent belongs to whom. Pure bookkeeping; the memory itself is the keeper's.
//
// Extent: creating -> free -> in a slot -> free ... Slot: idle -> leased -> sealed -> idle, or zombie while a writer that lost its lease may still
// store into it. A slot's extents belong to one process until that process is known dead (reliability I-10), and to one uid for ever: a process may
// have passed descriptors and mappings on to others that nobody knows of, so for another uid an extent is dropped and a new one made (I-38).
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/status.h"
#include "format/ledger.h"

namespace sp {

enum class ExtentState : uint8_t { kCreating, kFree, kPending, kInSlot };
enum class SlotState : uint8_t { kIdle, kPending, kLeased, kSealed, kZombie };

struct Extent {
  ExtentState state = ExtentState::kFree;
  std::optional<uint32_t> uid;  // Under which it was ever lent, and will be; none: never lent, all zeros.
  SessionKey writer;            // The session that was last lent it writable, until that is known dead; id zero: none.
  std::set<Id128> lent_to;      // Living sessions that hold a descriptor or mapping of it, readers included. After a restart not all readers.
};

struct PoolSlot {
  ledger::Slot entry;
  SlotState state = SlotState::kIdle;
};

// Owned by the event loop.
class Pool {
 public:
  Pool(uint64_t extent_bytes, uint32_t extents_max) : extent_bytes_(extent_bytes), extents_max_(extents_max) {}

  // What a slot of `extents` extents for this session would be made of. kNoSpace says which numbers do not fit.
  struct Plan {
    std::vector<uint64_t> dissolve;   // Idle slots of the session, too small, or of the process's ended ones: their extents come first.
    std::vector<uint32_t> ready;      // Free, usable as they are.
    std::vector<uint32_t> replace;    // Free, but not to be had by this uid: dropped, as many are created instead.
    uint32_t create = 0;              // New ones (the replacements included), ids from next_extent().
  };
  Result<Plan> PlanSlot(const SessionKey& session, uint32_t extents, const std::set<Id128>& ended_sessions) const;
  // The smallest idle slot of this session with at least `extents` extents.
  std::optional<uint64_t> FindIdleSlot(const Id128& session, uint32_t extents) const;
  // An idle slot of another, ended session of the same living process.
  std::optional<uint64_t> FindAdoptableSlot(const SessionKey& session, uint32_t extents, const std::set<Id128>& ended_sessions) const;

  // --- extents
  void AddExtent(uint32_t id);              // Free, never lent.
  void BeginCreate(uint32_t id);
  void RemoveExtent(uint32_t id);
  void SetPending(uint32_t id);             // Part of a slot being built.
  void ReturnPending(uint32_t id);          // -> free, as it was.
  void Lend(const std::vector<uint32_t>& ids, const Id128& session);
  // The session's process is dead (or has promised to hold nothing): it lends nothing any more.
  void Forget(const Id128& session);
  // `to` is a session of the same process: what was lent to `from` is its own from now on.
  void TransferLent(const Id128& from, const Id128& to);
  bool HoldsLent(const Id128& session) const;
  // Nobody will ever say when the session's process dies. Free extents that it may still write to leave the pool and are returned, to be
  // dropped.
  std::vector<uint32_t> Abandon(const Id128& session);
  // Extents that a slot lent which cannot be adopted as a whole: whoever had them may still hold them.
  void MarkLent(const ledger::Slot& slot);
  // Slots that own one of these extents.
  std::vector<uint64_t> SlotsWith(const std::vector<uint32_t>& extents) const;
  const Extent* FindExtent(uint32_t id) const;
  std::vector<uint32_t> NeverLent() const;
  // Extents in no slot that were lent, as slots that are gone: by who may still write to them, or by uid where nobody can. For a snapshot.
  std::vector<ledger::Slot> FreeAsLent() const;

  // --- slots (by applying ledger entries)
  bool AddSlot(const ledger::Slot& entry);  // False: an extent is unknown or in another slot; nothing changed.
  void RemoveSlot(uint64_t slot);
  void SetSlotState(uint64_t slot, SlotState state);
  const PoolSlot* FindSlot(uint64_t slot) const;
  const std::map<uint64_t, PoolSlot>& slots() const { return slots_; }
  std::vector<uint64_t> SlotsOf(const Id128& session) const;

  struct Totals {
    uint32_t extents = 0, creating = 0, free = 0, pending = 0, idle = 0, leased = 0, sealed = 0, zombie = 0;
  };
  Totals totals() const;
  uint32_t next_extent() const { return next_extent_; }
  uint64_t extent_bytes() const { return extent_bytes_; }
  uint32_t extents_max() const { return extents_max_; }
  uint64_t CapacityOf(uint64_t slot) const;
  // kInternal names the first broken rule: every extent in at most one slot, states agree, never more than extents_max.
  Status CheckInvariants() const;

 private:
  static void Lent(Extent& extent, const SessionKey& session);
  static bool Usable(const Extent& extent, const SessionKey& session);
  static bool Replaceable(const Extent& extent, const SessionKey& session);

  uint64_t extent_bytes_;
  uint32_t extents_max_;
  uint32_t next_extent_ = 1;
  std::map<uint32_t, Extent> extents_;
  std::map<uint64_t, PoolSlot> slots_;
};

}  // namespace sp
