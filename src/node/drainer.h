// Carries out the core's orders to the durable tier, on threads of its own that wait for everybody else. Nothing it does can hold up the event loop.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "base/clock.h"
#include "durable/object_store.h"
#include "durable/rate_limit.h"
#include "durable/retention.h"
#include "node/core_types.h"
#include "node/executor.h"
#include "node/extent_set.h"

namespace sp {

// How long one of `threads` shards may take that share `bytes_per_second` (0: as much as there is): at half of its share, there and back, and never so long
// that a sweep could take its upload for a dead writer's.
Nanos ShardWithin(uint64_t bytes, uint32_t threads, uint64_t bytes_per_second);

// Owned by the event loop, like the callback `post`, which is called there with the answers.
class Drainer {
 public:
  // `bytes_per_second`: at most, of all shards together; 0: no limit. `rule`: what PlanRetention goes by.
  static Result<std::unique_ptr<Drainer>> Create(const std::string& url, uint32_t threads, uint64_t bytes_per_second, const RetentionRule& rule,
                                                 const Clock& clock, std::function<void(Event)> post);
  // Cancels what is under way and waits for it: to the end of a system call, or of a request to the store.
  ~Drainer();

  void StoreShard(const SealRecord& record, ExtentSet lease);
  void StoreManifest(const Id128& attempt, const StoredStep& step);
  void List(uint32_t uid, const std::string& ns);
  void PlanRetention(uint32_t uid, const std::string& ns);  // Not before the last one was answered.
  void DeleteSteps(uint32_t uid, const std::string& ns, const std::vector<StepName>& steps);
  // Aborts what dead writers left (I-24), the first time and once a day.
  void SweepIfDue();

  int fd() const { return executor_->fd(); }  // Readable: call RunCompletions.
  void RunCompletions() { executor_->RunCompletions(); }
  // Posts how far each shard has come, and sweeps if that is due.
  void PostProgress();

 private:
  // The store, opened and probed by the first job that needs it, and again by the next one where that failed. On the executor's threads.
  struct OpenedStore {
    std::shared_ptr<ObjectStore> store;
    StoreAbilities abilities;
  };
  class Door;
  struct Counts {
    std::atomic<uint64_t> bytes = 0;   // That have reached the store.
    std::atomic<bool> alive = false;   // event::ShardProgress.
  };
  using Progress = std::shared_ptr<Counts>;

  Drainer(std::string url, uint32_t threads, uint64_t bytes_per_second, const RetentionRule& rule, const Clock& clock, std::function<void(Event)> post);
  void WaitForTurn(uint64_t bytes, Counts& counts);
  void Submit(std::function<Event()> job, const std::function<Event(const Status&)>& refused);
  CallLimits Limits(Nanos within, const Progress& progress) const;

  const Clock& clock_;
  const std::function<void(Event)> post_;
  const std::shared_ptr<Door> door_;
  const uint32_t threads_;
  const uint64_t bytes_per_second_;
  RateLimit rate_;
  const RetentionRule rule_;
  KnownKeys keys_;  // Of the one plan that is made at a time.
  Nanos sweep_at_ = 0;
  std::atomic<bool> cancelled_ = false;
  std::map<Hash256, Progress> progress_;
  std::unique_ptr<Executor> executor_;  // Last: its threads use the others, so it goes first.
};

}  // namespace sp
