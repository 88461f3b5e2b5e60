// One simulated node: the real NodeCore and the real Ledger around simulated memory, keeper, jobs and kills. Owned by one thread.
//
// The world outside (processes, sockets) is the Host. A cluster simulator has N of these and a network between them.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "node/node_core.h"
#include "sim/random.h"
#include "sim/sim_drainer.h"
#include "sim/sim_memory.h"

namespace sp::sim {

class Host {
 public:
  virtual ~Host() = default;
  virtual void OnFrame(ConnectionId c, const Frame& frame, const std::vector<MemoryRef>& memory, bool read_only) = 0;
  virtual void OnClosed(ConnectionId c) = 0;
  virtual void OnAppended(const LedgerEntry& entry) = 0;  // From here on it survives the worker.
  virtual void OnDeleting(const action::DeleteSteps& order) = 0;
  virtual void OnSealChecked(uint64_t lease, bool passed) = 0;
  virtual void OnRestarted(bool keeper_lost) = 0;
  virtual void OnExit() = 0;  // The daemon was asked to stop, and ends by itself.
  virtual bool IsProcessDead(const SessionKey& session) const = 0;
  virtual bool IsWatchable(const SessionKey& session) const = 0;
  virtual const ShardIndex* FindStructure(const Hash256& hash) const = 0;  // Null: malformed.
};

class SimNode {
 public:
  // `store` null: no durable tier.
  SimNode(Host& host, CoreConfig config, SimStore* store, uint64_t ledger_bytes, uint64_t ledger_soft_limit);

  void Start();
  void Deliver(const Event& event);  // And carries out what comes of it; may kill and restart the worker on the way.
  // Jobs are what the daemon has asked for and not heard of yet: checks, extents being made, watched processes, requests to the store.
  size_t jobs() const { return jobs_.size() + drainer_.ready(now_); }
  void RunJob(size_t index);
  void RunAllJobs();
  bool RunListing();  // False: none that the store answers is under way.
  void ProcessDied(uint32_t pid);  // Watches on its sessions become jobs.
  void KillWorkerAfter(uint64_t actions, uint64_t random);  // SIGKILL when that many more actions have been carried out.
  void CallOffKill() { kill_after_.reset(); }
  void LoseKeeper();
  void Terminate();  // SIGTERM for the daemon: what it has in memory is gone when it ends, by itself or when its grace is over.
  bool stopping() const { return stop_by_.has_value(); }
  void Compact();
  void FailNextExtents(uint32_t count) { failing_extents_ = count; }

  void Advance(Nanos by);
  void RunTimers();  // Tick as often as something is due.
  Nanos now() const { return now_; }
  const NodeCore& core() const { return *core_; }
  const CoreConfig& config() const { return config_; }
  const SimDrainer& drainer() const { return drainer_; }
  size_t extents() const { return extents_.size(); }
  std::vector<uint32_t> ExtentIds() const;
  Ledger::Contents LedgerContents() const { return ledger_->Read(); }
  MemoryRef FindExtent(uint32_t id) const;
  uint64_t trace() const { return trace_; }
  uint64_t restarts() const { return restarts_; }

 private:
  struct Job {
    enum class Kind { kSeal, kBlock, kStructure, kCreate, kWatch, kDied } kind;
    action::CheckSeal seal;
    action::CheckBlock block;
    action::ReadStructure structure;
    std::vector<uint32_t> extents;
    std::vector<MemoryRef> memory;  // Open descriptors: they outlive a drop of the extent.
    SessionKey session;
  };
  bool Execute(const std::vector<Action>& actions);  // False: the worker was killed between two of them.
  void Perform(const Action& action);
  bool Write(const LedgerEntry& entry);  // True: by compacting; the snapshot has what the whole step did.
  void Restart();
  void WorkerDied();
  void Add(Job job) { jobs_.push_back(std::move(job)); }
  std::vector<MemoryRef> Extents(const std::vector<uint32_t>& ids) const;
  void CheckSealJob(const action::CheckSeal& check, const std::vector<MemoryRef>& extents);
  void Note(uint64_t what) { trace_ = Mix(trace_, what); }

  Host& host_;
  CoreConfig config_;
  std::unique_ptr<NodeCore> core_;
  std::vector<uint64_t> ledger_memory_;
  std::optional<Ledger> ledger_;
  uint64_t ledger_soft_limit_;
  std::map<uint32_t, MemoryRef> extents_;  // The keeper's.
  std::vector<Job> jobs_;
  SimDrainer drainer_;
  std::map<Id128, SessionKey> watched_;
  Nanos now_ = kNanosPerSecond;
  uint32_t failing_extents_ = 0;
  std::optional<uint64_t> kill_after_;
  uint64_t kill_random_ = 0;
  std::optional<Nanos> stop_by_;
  bool exits_ = false;  // The core has asked for it.
  uint64_t trace_ = 0, restarts_ = 0;
};

}  // namespace sp::sim
