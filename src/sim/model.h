// Reference model: what must be true, said a second time and as plainly as possible. It hears every ledger entry that was really written and says
// which rule an entry breaks; the simulator compares the daemon's answers with its own. Pure.
#pragma once

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/clock.h"
#include "catalog/catalog.h"
#include "format/ledger.h"
#include "format/stored_step.h"

namespace sp::sim {

// Thrown where an invariant does not hold; `what()` begins with its number in the reliability reference, e.g. "I-14: ...".
struct Violation {
  std::string what;
};
[[noreturn]] inline void Fail(std::string what) { throw Violation{std::move(what)}; }
inline void Require(bool holds, const char* what) {
  if (!holds) Fail(what);
}

enum class Use { kIdle, kLeased, kSealed, kZombie };

struct ModelShard {
  SealRecord record;
  uint64_t slot = 0, lease = 0;
  bool here = false;  // In this node's memory.
};
struct ModelAttempt {
  NamespaceKey ns;
  AttemptKey key;
  uint32_t world_size = 0;
  std::map<uint32_t, ModelShard> shards;
  bool manifest = false, operator_pin = false;
  std::optional<ledger::TombstoneWhy> tombstone;
  std::optional<bool> wish;   // The last word: asked for, or given up.
  bool was_given_up = false;  // Once at least.
  std::set<uint32_t> stored;  // Ranks whose shard the store has.
  bool durable = false;       // And the manifest.
  bool WantsDurable() const { return wish.value_or(false) && !durable; }
  bool HasMemory() const {
    return std::any_of(shards.begin(), shards.end(), [](const auto& s) { return s.second.here; });
  }
};
struct ModelSlot {
  ledger::Slot entry;
  Use use = Use::kIdle;
  Id128 attempt;  // Sealed: whose.
};
struct ModelPin {
  ledger::ReadPin entry;
  Nanos expires = 0;
};

class Model {
 public:
  // `durable_keeps` 0: nothing goes from the store.
  Model(uint32_t retain, bool has_store, uint32_t durable_keeps = 0) : retain_(retain), has_store_(has_store), durable_keeps_(durable_keeps) {}

  void Append(Nanos now, Nanos pin_ns, const LedgerEntry& entry);  // Throws Violation.
  // Facts that are in no entry.
  void SealCheckPassed(uint64_t lease) { checked_.insert(lease); }
  void WriterPromised(uint64_t lease) { promised_.insert(lease); }  // Abort, goodbye, death or a refused seal: it stores no more into the lease.
  void SessionGone(const Id128& session);                          // Dead, or said goodbye.
  void PinGivenBack(uint64_t pin) { given_back_.insert(pin); }
  void PinUsed(uint64_t pin, Nanos expires);
  void WorkerRestarted(Nanos now, Nanos pin_ns);
  void KeeperLost();
  void ForgetUnmarked(const std::vector<Hash256>& markers);  // That these namespaces ever had a complete step.
  void SetGoodCoverage(const Hash256& structure, bool good) { good_coverage_[structure] = good; }
  // Facts that a node finds in the store, and not in its memory (model_durable.cc).
  void TakeOver(const ledger::Generation& generation);
  void TakeOver(const StoredStep& step);

  bool Complete(const ModelAttempt& a) const;
  const ModelAttempt* Find(const Id128& attempt) const;
  // Complete ones, newest first; of each step the latest try.
  std::vector<const ModelAttempt*> Lineage(const NamespaceKey& ns, bool durable_only = false) const;
  const ModelAttempt* Latest(const NamespaceKey& ns) const;
  // What must be said when there is no latest: kNotFound or kLost.
  StatusCode NothingLeft(const NamespaceKey& ns) const;
  uint64_t CurrentGeneration(const NamespaceKey& ns) const;
  const ledger::Generation* FindGeneration(const NamespaceKey& ns, uint64_t number) const;
  // Memory knows more of it than the store: what is said of it needs no store.
  bool IsMine(const NamespaceKey& ns) const;
  // The rule that would be broken if the step left memory now; null: none. That it is on its way to the store is for the caller to look at.
  const char* WhyKept(const ModelAttempt& a) const;
  const char* WhyKeptInStore(const ModelAttempt& a) const;  // The same of one that only the store has.
  const std::map<uint64_t, ModelSlot>& slots() const { return slots_; }
  const std::map<Id128, ModelAttempt>& attempts() const { return attempts_; }
  const std::set<Hash256>& quarantined() const { return quarantined_; }
  bool had_complete(const NamespaceKey& ns) const { return had_complete_.contains(ns); }
  const std::map<uint64_t, ledger::Lease>& leases() const { return leases_; }
  const std::map<uint64_t, ModelPin>& pins() const { return pins_; }

 private:
  void On(const ledger::Generation& e);
  void On(const ledger::Slot& e);
  void On(const ledger::SlotGone& e);
  void On(const ledger::Lease& e);
  void On(const ledger::LeaseEnded& e);
  void On(const ledger::Sealed& e);
  void On(const ledger::Manifest& e);
  void On(const ledger::Tombstone& e);
  void On(const ledger::Quarantine& e);
  void On(const ledger::OperatorPin& e);
  void On(const ledger::ReadPin& e);
  void On(const ledger::DurableWish& e);
  void On(const ledger::StoredShard& e);
  void On(const ledger::StoredManifest& e);
  void On(const ledger::Evicted& e);
  void LeaveMemory(ModelAttempt& a);
  const char* WhyHeld(const ModelAttempt& a) const;  // By somebody.

  uint32_t retain_;
  bool has_store_;
  uint32_t durable_keeps_;
  Nanos now_ = 0, pin_ns_ = 0;
  std::map<NamespaceKey, std::map<uint64_t, ledger::Generation>> generations_;
  std::map<Id128, ModelAttempt> attempts_;
  std::map<uint64_t, ModelSlot> slots_;
  std::map<uint64_t, ledger::Lease> leases_;
  std::map<uint64_t, ModelPin> pins_;
  std::set<Hash256> quarantined_, records_;
  std::set<NamespaceKey> had_complete_;  // Ever, on any keeper: the marker.
  std::map<Hash256, bool> good_coverage_;
  std::set<uint64_t> checked_, promised_, given_back_;
  std::set<Id128> gone_;
};

}  // namespace sp::sim
