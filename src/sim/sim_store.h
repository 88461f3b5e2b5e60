// The object store behind the simulated node. It outlives workers and keepers, loses nothing that no order named, and overwrites nothing. What it does
// wrong, by the rows of the fault matrix: it refuses (F57, F64) or hangs (F58) until it comes back; and single requests fail, happen although their
// answer is lost (F60), happen after whoever sent them has given up (F58), keep or send a shard with a flipped word (F66). Owned by one thread.
#pragma once

#include <deque>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "catalog/catalog.h"
#include "format/stored_step.h"

namespace sp::sim {

enum class StoreHealth { kUp, kRefuses, kHangs };
enum class StoreFault { kFails, kAnswerLost, kArrivesLate, kFlipsStored, kFlipsRead };

class SimStore {
 public:
  struct Object {
    std::vector<uint32_t> words;  // Of a shard, or of its checksum list.
    std::string text;             // Of a document.
    friend bool operator==(const Object&, const Object&) = default;
  };

  // Without `verifies_checksums` whoever writes a shard must read it back.
  explicit SimStore(bool verifies_checksums) : verifies_(verifies_checksums) {}

  // --- requests; kUnavailable and kDeadline: it may have happened all the same
  Result<bool> Write(const std::string& key, Object object);  // False: there is one already, which is left as it is.
  Result<Object> Read(const std::string& key);
  Result<std::vector<StoredStep>> List(const NamespaceKey& ns);  // Newest first.
  struct Listing {
    std::vector<StoredStep> steps;  // Of the user, all of them, newest first.
    std::vector<StepName> remains;  // Of deletions that were cut short, whoever's.
  };
  Result<Listing> ListAll(const NamespaceKey& ns);
  Result<std::vector<std::string>> ListKeys(const StepName& step);
  Status Delete(const std::string& key);  // Also of what is not there.
  bool verifies_checksums() const { return verifies_; }

  // --- what goes wrong
  StoreHealth health() const { return health_; }
  void SetHealth(StoreHealth health) { health_ = health; }
  void SpoilNext(StoreFault fault, size_t requests);
  void WriteLate(const std::string& key, Object object) { late_.emplace_back(key, std::move(object)); }
  void DeleteLate(const std::string& key) { late_.emplace_back(key, std::nullopt); }
  void DeliverLate();
  void DropLate() { late_.clear(); }
  void Heal();  // From here on nothing goes wrong.

  // The core has ordered that it go: only now may something of it. What was sent for it long ago and is under way arrives before that, if at all.
  void Name(const StepName& step);

  // --- facts, for the checks; nobody who takes part may ask them
  bool HasShard(const SealRecord& record) const;  // And its checksums, and both are right.
  bool IsWhole(const Id128& attempt) const { return steps_.contains(attempt); }
  // Of one user's namespace the newest by generation, step and try, as many as a node whose memory is new takes over.
  std::vector<StoredStep> Steps(const NamespaceKey& ns) const;
  std::vector<StoredStep> AllSteps(const NamespaceKey& ns) const;
  size_t objects() const { return objects_.size(); }

 private:
  struct Kept {
    Object object;
    bool flipped = false;
  };
  std::optional<StoreFault> Take();
  bool Keep(const std::string& key, Object object, bool flipped);
  void LetGo(const std::string& key);
  void AddStep(const StepName& name, const std::string& manifest);

  const bool verifies_;
  StoreHealth health_ = StoreHealth::kUp;
  std::map<std::string, Kept> objects_;
  std::map<Id128, StoredStep> steps_;  // Those whose manifest is there.
  std::deque<StoreFault> faults_;      // Of the next requests, in order.
  std::vector<std::pair<std::string, std::optional<Object>>> late_;  // nullopt: a deletion.
  std::set<StepName> named_;
};

}  // namespace sp::sim
