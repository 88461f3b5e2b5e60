// What stands for node/drainer in the simulated node: the core's orders to the store, one request at a time, so that kills, faults and time can come
// between any two. Owned by one thread.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <variant>
#include <vector>

#include "node/core_types.h"
#include "sim/sim_memory.h"
#include "sim/sim_store.h"

namespace sp::sim {

class SimDrainer {
 public:
  // `store` null: there is no durable tier, and nobody may ask for it.
  SimDrainer(SimStore* store, uint64_t extent_bytes, uint64_t keep_last) : store_(store), extent_bytes_(extent_bytes), keep_last_(keep_last) {}

  void Do(Nanos now, const action::StoreShard& order, std::vector<MemoryRef> memory);
  void Do(Nanos now, const action::StoreManifest& order);
  void Do(Nanos now, const action::ListStore& order);
  void Do(Nanos now, const action::PlanRetention& order);
  void Do(Nanos now, const action::DeleteSteps& order);
  // Orders whose next request is answered now, or given up. With a store that hangs only those whose time is over.
  size_t ready(Nanos now) const { return Ready(now).size(); }
  // The next request of one of them, and what the core is told then.
  std::optional<Event> Run(Nanos now, size_t index);
  // The same of a listing, if one is ready.
  std::optional<Event> RunListing(Nanos now);
  // What has been sent may arrive all the same.
  void WorkerDied();

  // --- what excuses the core; by what it has heard
  bool IsInTrouble(Nanos now, const Id128& attempt) const;     // The last of its requests failed, or nothing comes back.
  bool IsUnlistable(Nanos now, const NamespaceKey& ns) const;
  // Something of a plan is under way, or has failed and was not tried again.
  bool IsRetaining() const;
  uint64_t deleted() const { return deleted_; }  // Steps.

 private:
  struct Job {
    std::variant<action::StoreShard, action::StoreManifest, action::ListStore, action::PlanRetention, action::DeleteSteps> order;
    std::vector<MemoryRef> memory;
    Nanos began = 0, deadline = 0;
    uint32_t answered = 0;        // Requests.
    std::vector<uint32_t> words;  // Of the shard, as they were compared and sent.
    bool written = false;         // It was not there before.
    // Of a deletion: the step it is at, that one's objects behind its manifest as far as they are there, and what has been done.
    size_t at = 0;
    uint32_t asked = 0;  // Requests, for this step.
    std::vector<std::string> keys;
    Status failed;  // The first one.
    std::vector<StepName> gone;
    const Id128* Attempt() const;
  };
  struct Heard {
    uint32_t failures = 0;  // In a row.
    Nanos progressed_at = 0;
  };
  using Answer = std::optional<Event>;

  void Add(Job job);
  std::vector<size_t> Ready(Nanos now) const;
  Answer Request(Nanos now, Job& job, const action::StoreShard& order);
  Answer Request(Nanos now, Job& job, const action::StoreManifest& order);
  Answer Request(Nanos now, Job& job, const action::ListStore& order);
  Answer Request(Nanos now, Job& job, const action::PlanRetention& order);
  Answer Request(Nanos now, Job& job, const action::DeleteSteps& order);
  Answer End(Nanos now, const action::StoreShard& order, const Status& status, bool read_back = false);
  Answer End(Nanos now, const action::StoreManifest& order, const Status& status);
  Answer End(Nanos now, const action::ListStore& order, const Status& status, std::vector<StoredStep> steps = {});
  Answer End(Nanos now, const action::PlanRetention& order, const Status& status, std::vector<Departure> departures = {});
  Answer End(Nanos now, const action::DeleteSteps& order, const Status& status, std::vector<StepName> gone = {});
  void Hear(Nanos now, const Id128& attempt, const Status& status);
  std::optional<std::vector<uint32_t>> Compare(const Job& job, const SealRecord& record) const;
  void SendLate(const Job& job);

  SimStore* store_;
  uint64_t extent_bytes_, keep_last_;
  uint64_t deleted_ = 0;
  std::vector<Job> jobs_;
  std::map<Id128, Heard> heard_;
  std::map<NamespaceKey, Nanos> list_failed_at_;
  std::set<NamespaceKey> retention_failed_;
};

}  // namespace sp::sim
