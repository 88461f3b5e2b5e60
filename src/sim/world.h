// One history: a simulated node, the processes around it, and the checks. Owned by one thread.
//
// A history is a list of operations, each a kind and a random number; what a number selects (which process, how long) depends on the state it meets,
// so that any part of a history is a history again and a failing one can be shrunk. An operation that has nothing to act on does nothing.
#pragma once

#include <deque>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "sim/model.h"
#include "sim/sim_node.h"

namespace sp::sim {

enum class OpKind : uint8_t {
  kClient,      // A process takes its next step: connect, ask, write, seal, read.
  kDeliver,     // One message from a socket's queue reaches the daemon.
  kJob,         // One thing that the daemon waits for comes about.
  kAdvance,     // Time passes, a little.
  kLeap,        // Time passes, more than a lease.
  kLaunch,      // A job starts (again) in a namespace, with another generation.
  kReader,      // A process starts that restores.
  kKill,        // SIGKILL for a process.
  kKillLaunch,  // For all processes of a job.
  kStop,        // SIGSTOP, or SIGCONT for a stopped one.
  kScribble,    // A process stores into memory that it has already sealed.
  kDisconnect,  // A connection breaks.
  kRepeat,      // An old message comes again.
  kGarbage,     // A message with invented ids, or bytes that do not decode.
  kBye,         // A process says goodbye and goes on living.
  kKillWorker,  // SIGKILL for the worker, now or some actions later.
  kCompact,     // The ledger is compacted.
  kNoMemory,    // The next extents cannot be made.
  kOperator,    // A pin is set or taken away.
  kLoseKeeper,  // The node's memory is gone; the markers are left.
  kForge,       // A well-formed message that the process was never meant to send, with the ids of anybody (fuzz/fuzz_node_core.cc).
  kAudit,       // Latest, listing and a replay of the ledger are compared with the model.
  kStore,       // The store refuses, hangs, or comes back.
  kStoreFault,  // Single requests to it go wrong; or late ones arrive.
  kWish,        // Somebody asks that a complete step be durable.
  kTerminate,   // SIGTERM for the daemon.
};
inline constexpr int kOpKinds = static_cast<int>(OpKind::kTerminate) + 1;
const char* OpName(OpKind kind);

struct Op {
  OpKind kind;
  uint32_t arg;
};

struct WorldConfig {
  uint64_t seed = 0;
  uint32_t uids = 1, namespaces = 1, ranks_max = 2, extents_max = 8, retain = 2, shard_extents_max = 2;
  bool unwatchable = false;  // Some processes cannot be watched.
  bool store = false, store_verifies = false;
  uint32_t durable_every = 0, durable_interval_s = 0, drains_max = 2;
  uint32_t durable_keeps = 0;  // 0: nothing is deleted.
  uint32_t retain_every = 0, retain_for_s = 0, spared_max = 0;  // 0: no such rule.
};
WorldConfig MakeConfig(uint64_t seed);
Id128 MakeId(uint64_t a, uint64_t b);

class World : public Host {
 public:
  explicit World(const WorldConfig& config);
  void Run(const Op& op);  // Throws Violation.
  // Faults stop: everybody dies, all time limits pass; what is left is what must be left, and a new job can save (I-28, I-30).
  void Finish();
  uint64_t trace() const { return node_.trace(); }
  uint64_t acknowledged() const { return acknowledged_; }
  uint64_t restores() const { return restores_; }
  uint64_t durable() const { return durable_; }      // Steps that came to the store.
  uint64_t resumed() const { return resumed_; }      // Audits in which what is known came from the store.
  uint64_t deleted() const { return node_.drainer().deleted(); }  // Steps that went from there.

 private:
  struct Save {
    enum class Phase { kNone, kReserved, kMapped, kWritten, kSealed } phase = Phase::kNone;
    uint64_t step = 0, lease = 0, slot = 0, length = 0;
    uint32_t try_number = 0, extents = 0;
    Id128 attempt;
    bool durable = false, asked = false;  // To be durable; and the daemon was told.
  };
  struct Reading {
    uint64_t pin = 0;
    AttemptInfo info;
    uint32_t rank = 0;
    std::optional<SealRecord> record;
    uint32_t extents = 0;
    bool from_store = false;  // The client fetches it there itself.
    std::vector<MemoryRef> memory;
    bool done = false;
  };
  struct Process {
    SessionKey key;                // Its session is the current one of
    std::vector<Id128> sessions;   // these.
    bool alive = true, stopped = false, watchable = true, reader = false;
    ConnectionId connection = 0;
    bool greeted = false;
    std::optional<Frame> awaiting;  // Asked, not answered; asked again after a reconnect.
    std::map<uint64_t, Frame> sent; // By request id, the newest few.
    uint64_t next_request = 1;
    size_t launch = 0;
    uint32_t rank = 0;
    uint64_t generation = 0;
    uint32_t saves = 0, tries = 0;
    Save save;
    std::optional<uint64_t> abort;  // A lease to give up next.
    std::map<uint64_t, std::vector<MemoryRef>> slots;
    std::vector<MemoryRef> read_only;  // Everything it ever mapped for reading.
    Reading reading;
    Id128 boot;
  };
  struct Launch {
    NamespaceKey ns;
    Id128 nonce;
    uint32_t world_size = 1;
    ParentMode mode = ParentMode::kLatest;
    Id128 parent;
    uint64_t first_step = 0;
    bool bad_coverage = false;
    std::vector<size_t> processes;
    uint32_t readers = 0;
  };
  struct Socket {
    size_t process;
    std::deque<Frame> queue;
    bool broken = false;  // The daemon hears of it when the queue is empty.
  };

  // --- Host
  void OnFrame(ConnectionId c, const Frame& frame, const std::vector<MemoryRef>& memory, bool read_only) override;
  void OnClosed(ConnectionId c) override;
  void OnAppended(const LedgerEntry& entry) override;
  void OnDeleting(const action::DeleteSteps& order) override;
  void OnSealChecked(uint64_t lease, bool passed) override;
  void OnRestarted(bool keeper_lost) override;
  void OnExit() override;
  bool IsProcessDead(const SessionKey& session) const override;
  bool IsWatchable(const SessionKey& session) const override;
  const ShardIndex* FindStructure(const Hash256& hash) const override;

  // --- processes (world_clients.cc)
  void Step(size_t p, uint32_t arg);
  void StepWriter(size_t p, uint32_t arg);
  void StepReader(size_t p, uint32_t arg);
  void BeginSave(size_t p, uint32_t arg);
  void SealNow(size_t p, uint32_t arg);
  template <typename T>
  void Ask(size_t p, MessageType type, const T& body);
  void Put(size_t p, Frame frame);
  void OnReply(size_t p, const Frame& request, const Frame& reply, const std::vector<MemoryRef>& memory, bool awaited);
  void OnReadReply(size_t p, const Frame& request, const Frame& reply, const std::vector<MemoryRef>& memory);
  void CheckReadBytes(Process& process);
  void CheckOpenRead(const Process& process, const OpenReadRequest& r, const Frame& reply);
  void SayGoodbye(size_t p);
  void SaveFailed(Process& process, StatusCode code);
  void CheckNoSpace(size_t p, const Frame& reply) const;
  void OnWaitReply(const WaitRequest& request, const Frame& reply);
  uint32_t WordOf(const Id128& attempt, uint32_t rank, uint32_t index) const;
  Hash256 StructureOf(uint32_t world_size, uint32_t rank, bool bad);

  // --- operations (world.cc)
  size_t NewProcess(uint32_t uid, uint32_t arg);
  void StartLaunch(uint32_t arg, bool plain);
  void StartReader(uint32_t arg);
  void Kill(size_t p);
  void Stopped(size_t p);
  void Scribble(size_t p, uint32_t arg);
  void Garbage(size_t p, uint32_t arg);
  void Forge(size_t p, uint32_t arg);  // world_forge.cc
  void Break(ConnectionId c);
  void DeliverFrom(ConnectionId c);
  void DeliverAll();
  template <typename F>
  std::optional<size_t> Pick(uint32_t arg, F&& wanted) const;  // One of the processes for which `wanted` holds.
  NamespaceKey NamespaceAt(uint32_t arg) const;
  void CheckNoForeignWriter(const ledger::Slot& slot);

  // --- audits (world_audit.cc)
  void Audit();
  void AuditNamespace(const NamespaceKey& ns);
  void CompareReplay();
  // kDeadline: the daemon waits for the store.
  Frame AskDirectly(uint32_t uid, MessageType type, std::vector<uint8_t> body);

  // --- the durable tier (world_durable.cc)
  void RunDurable(const Op& op);
  bool TakenOver(const LedgerEntry& entry);  // It repeats what the store says; checked against it.
  void CheckStored(const LedgerEntry& entry) const;
  void CheckGivenUp(const ledger::DurableWish& wish) const;
  bool IsChosen(const Id128& attempt) const;  // By a group of readers, some of which may not have opened it yet.
  void CheckLevel(const Id128& attempt, Level level) const;  // Somebody was told.
  void CheckUnavailable(MessageType type, const NamespaceKey& ns) const;
  void CheckGaveWay(const Process& process) const;
  void CheckAllDurable(const char* when) const;
  void CheckWishAnswer(const Frame& request, const Frame& reply) const;
  // What must be known of the namespace: by memory or, where memory does not know more, by memory and store.
  const Model& KnownOf(const NamespaceKey& ns, std::optional<Model>& both) const;
  void ReadStored(Process& process);

  WorldConfig config_;
  SimStore store_;
  SimNode node_;
  Model model_;
  std::vector<Process> processes_;
  std::vector<Launch> launches_;
  std::map<ConnectionId, Socket> sockets_;
  ConnectionId next_connection_ = 1;
  std::map<Hash256, ShardIndex> structures_;
  std::set<Hash256> scribbled_;                  // Records whose bytes their own writer changed.
  std::map<uint64_t, Hash256> seal_replies_;     // By lease.
  struct Choice {
    Id128 attempt;
    Nanos expires;
  };
  std::map<std::pair<Id128, uint32_t>, Choice> choices_;  // By nonce and sequence.
  std::optional<Frame> audit_reply_;
  ConnectionId audit_connection_ = 0;
  uint64_t audits_ = 0, acknowledged_ = 0, restores_ = 0, durable_ = 0, resumed_ = 0;
};

}  // namespace sp::sim
