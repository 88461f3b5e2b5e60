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

namespace sp::sim {

// The memory of one extent. It lives as long as somebody maps it, like a memfd; one word stands for its content, 0 for zeros.
struct Memory {
  uint32_t id = 0;
  uint32_t word = 0;
  std::optional<uint32_t> uid;  // Under which it was ever lent.
};
using MemoryRef = std::shared_ptr<Memory>;

// What a shard's block checksum list is made of here: the words of the extents it fills.
Hash256 RootOf(const std::vector<MemoryRef>& extents, size_t count);
inline uint32_t ExtentsFor(uint64_t length, uint64_t extent_bytes) {
  return static_cast<uint32_t>((LeaseBytes(length) + extent_bytes - 1) / extent_bytes);
}

class Host {
 public:
  virtual ~Host() = default;
  virtual void OnFrame(ConnectionId c, const Frame& frame, const std::vector<MemoryRef>& memory, bool read_only) = 0;
  virtual void OnClosed(ConnectionId c) = 0;
  virtual void OnAppended(const LedgerEntry& entry) = 0;  // From here on it survives the worker.
  virtual void OnSealChecked(uint64_t lease, bool passed) = 0;
  virtual void OnRestarted(bool keeper_lost) = 0;
  virtual bool IsProcessDead(const SessionKey& session) const = 0;
  virtual bool IsWatchable(const SessionKey& session) const = 0;
  virtual const ShardIndex* FindStructure(const Hash256& hash) const = 0;  // Null: malformed.
};

class SimNode {
 public:
  SimNode(Host& host, CoreConfig config, uint64_t ledger_bytes, uint64_t ledger_soft_limit);

  void Start();
  void Deliver(const Event& event);  // And carries out what comes of it; may kill and restart the worker on the way.
  // Jobs are what the daemon has asked for and not heard of yet: checks, extents being made, watched processes.
  size_t jobs() const { return jobs_.size(); }
  void RunJob(size_t index);
  void RunAllJobs();
  void ProcessDied(uint32_t pid);  // Watches on its sessions become jobs.
  void KillWorkerAfter(uint64_t actions, uint64_t random);  // SIGKILL when that many more actions have been carried out.
  void CallOffKill() { kill_after_.reset(); }
  void LoseKeeper();
  void Compact();
  void FailNextExtents(uint32_t count) { failing_extents_ = count; }

  void Advance(Nanos by) { now_ += by; }
  void RunTimers();  // Tick as often as something is due.
  Nanos now() const { return now_; }
  const NodeCore& core() const { return *core_; }
  const CoreConfig& config() const { return config_; }
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
  std::map<Id128, SessionKey> watched_;
  Nanos now_ = kNanosPerSecond;
  uint32_t failing_extents_ = 0;
  std::optional<uint64_t> kill_after_;
  uint64_t kill_random_ = 0;
  uint64_t trace_ = 0, restarts_ = 0;
};

}  // namespace sp::sim
