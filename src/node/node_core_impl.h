// Parts of NodeCore, in files by idea: sessions, writing (leases and seals), reading (pins and queries), replay (ledger), status.
#pragma once

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "catalog/catalog.h"
#include "node/node_core.h"
#include "pool/pool.h"

namespace sp {

// Deadlines that clients ask for are bounded, so that additions cannot overflow.
inline Nanos Until(Nanos now, uint64_t timeout_ns) {
  return now + static_cast<Nanos>(std::min<uint64_t>(timeout_ns, uint64_t{3600} * kNanosPerSecond));
}

using ShardKey = std::pair<Id128, uint32_t>;  // Attempt, rank.

class NodeCore::Impl {
 public:
  explicit Impl(CoreConfig config);

  std::vector<Action> Restore(Nanos now, const Ledger::Contents& contents, const std::vector<uint32_t>& extents);
  std::vector<Action> Step(Nanos now, const Event& event);
  std::optional<Nanos> NextDeadline() const;
  std::vector<LedgerEntry> Snapshot() const;
  bool IsDraining() const { return !drains_.empty() || AwaitsDurable(); }
  std::string StatusJson(Nanos now, uint32_t uid, bool all_uids) const;
  Status CheckInvariants() const;

 private:
  struct Connection {
    uint32_t uid = 0, pid = 0;
    uint64_t start_time = 0;
    std::optional<Id128> session;
    Nanos connected_at = 0;
  };
  struct Session {
    SessionKey key;
    std::set<ConnectionId> connections;
    bool ended = false;        // Said Bye: its idle slots may go to another session of the same process.
    bool unwatchable = false;  // Nobody will tell us when it dies: its extents are dropped, never reused.
    Nanos silent_since = 0;    // When the last connection went.
  };
  struct OpenLease {
    ledger::Lease entry;
    Id128 attempt;
    Id128 session;
    Nanos expires = 0;
    bool checking = false;  // A CheckSeal is under way for `seal`.
    bool structure_wanted = false;  // And is to read the structure.
    SealRequest seal;
    ConnectionId seal_connection = 0;
    uint64_t seal_request = 0;
  };
  struct SealedShard {
    uint64_t slot = 0;
    uint64_t lease = 0;
    Hash256 record;
  };
  struct Zombie {  // A lease that ended while its writer may still store into the slot.
    uint64_t slot = 0;
    NamespaceKey ns;
    Id128 attempt;
    bool expired = false;  // Fenced by time (F5), not closed for another reason. Not kept over a restart.
  };
  // A slot that waits for extents to be created.
  struct Build {
    SessionKey session;
    std::vector<uint64_t> dissolve;
    std::vector<uint32_t> extents;  // Taken from the free list or being created.
    std::set<uint32_t> waiting;
    ConnectionId connection = 0;
    uint64_t request_id = 0;
    Nanos deadline = 0;
    std::optional<ReserveRequest> reserve;  // Else: one slot of a PrepareSlots.
    uint64_t prepare = 0;
  };
  struct Prepare {
    ConnectionId connection = 0;
    uint64_t request_id = 0;
    uint32_t builds = 0;  // Outstanding.
    std::vector<SlotInfo> slots;
  };
  struct Waiter {
    ConnectionId connection = 0;
    uint64_t request_id = 0;
    NamespaceKey ns;
    WaitRequest request;
    Nanos deadline = 0;
  };
  struct Pin {
    ledger::ReadPin entry;
    NamespaceKey ns;
    Nanos expires = 0;
  };
  struct GroupChoice {
    Id128 attempt;
    Nanos expires = 0;
  };
  struct BlockCheck {
    ConnectionId connection = 0;
    uint64_t request_id = 0;
    NamespaceKey ns;
    Id128 attempt;
    Hash256 record;
    uint32_t rank = 0;
    uint64_t block = 0;
  };
  // A complete attempt on its way to the store.
  struct Drain {
    NamespaceKey ns;
    std::map<uint32_t, uint64_t> under_way;  // Ranks, and the bytes of them that have arrived.
    bool manifest_under_way = false;
    uint32_t failures = 0;  // In a row.
    uint32_t mismatches = 0;  // In a row.
    Nanos retry_at = 0;  // 0: now, or when its turn comes.
    Nanos began = 0;
    Nanos progressed_at = 0;  // Something arrived, or was sent on its way.
    Status last;
  };
  using GroupKey = std::tuple<NamespaceKey, Id128, uint32_t>;  // Namespace, nonce, sequence.
  using WriterKey = std::tuple<NamespaceKey, uint64_t, uint32_t>;  // Namespace, generation, rank.

  // --- events
  void On(const event::Connected& e);
  void On(const event::Received& e);
  void On(const event::Disconnected& e);
  void On(const event::SessionDied& e);
  void On(const event::SessionUnwatchable& e);
  void On(const event::SealChecked& e);
  void On(const event::BlockChecked& e);
  void On(const event::StructureRead& e);
  void On(const event::ShardStored& e);
  void On(const event::ShardProgress& e);
  void On(const event::ManifestStored& e);
  void On(const event::StoreListed& e);
  void On(const event::RetentionPlanned& e);
  void On(const event::StepsDeleted& e);
  void On(const event::StoreSwept& e);
  void On(const event::ExtentCreated& e);
  void On(const event::ExtentFailed& e);
  void On(const event::Tick& e);
  void On(const event::Shutdown& e);

  // --- requests (node_core_sessions.cc, _writing.cc, _slots.cc, _attempts.cc, _reading.cc); an error Status becomes the reply
  Status Hello(ConnectionId c, const Frame& f);
  Status Bye(ConnectionId c, const Frame& f);
  Status OpenGeneration(ConnectionId c, const Frame& f);
  Status PrepareSlots(ConnectionId c, const Frame& f);
  Status Reserve(ConnectionId c, const Frame& f);
  Status FetchExtents(ConnectionId c, const Frame& f);
  Status Seal(ConnectionId c, const Frame& f);
  Status Abort(ConnectionId c, const Frame& f);
  Status Renew(ConnectionId c, const Frame& f);
  Status Wait(ConnectionId c, const Frame& f);
  Status Latest(ConnectionId c, const Frame& f);
  Status ListSteps(ConnectionId c, const Frame& f);
  Status ListNamespaces(ConnectionId c, const Frame& f);
  Status OpenRead(ConnectionId c, const Frame& f);
  Status ShardInfo(ConnectionId c, const Frame& f);
  Status Unpin(ConnectionId c, const Frame& f);
  Status PinStep(ConnectionId c, const Frame& f);
  Status ReportCorrupt(ConnectionId c, const Frame& f);
  Status StatusOf(ConnectionId c, const Frame& f);
  Status MakeDurable(ConnectionId c, const Frame& f);

  // --- state changes that survive: append the entry, then apply it
  void Commit(LedgerEntry entry);
  void Apply(const LedgerEntry& entry);

  // --- sessions
  Session* SessionOf(ConnectionId c);
  void EndSessionUse(const Id128& session, bool dead);
  void DropSessionIfUnused(const Id128& session);
  bool IsAlive(const Id128& session) const;
  // When an unwatchable session that nobody is connected to counts as gone: a lease's time after it fell silent, if it holds no lease.
  std::optional<Nanos> SilenceEnds(const Id128& id, const Session& session) const;
  // The attempt waits for a rank that has not begun and whose process is not known to live.
  bool LacksAWriter(const NamespaceKey& ns, const Attempt& attempt, const Id128& dead) const;

  // --- writing
  bool WasFenced(const NamespaceKey& ns, const Attempt& attempt) const;  // A closed attempt that a later launch superseded.
  Status CheckTries(const NamespaceKey& ns, const ReserveRequest& r);
  std::vector<uint32_t> RanksOf(const Attempt& attempt) const;  // Those that have sealed, write, or wait for memory to write.
  Status NoteWriter(const NamespaceKey& ns, uint64_t generation, uint32_t rank, const Id128& session);
  void GiveUpTry(const SessionKey& session, const ReserveRequest& r, const Status& why);
  Status CheckWriter(const NamespaceKey& ns, uint64_t generation, const Id128& nonce) const;
  std::set<Id128> EndedSessions() const;
  Result<Pool::Plan> PlanSlot(const SessionKey& session, uint32_t extents) const;
  Status StartBuild(uint32_t extents, Build build);  // Finished at once when nothing has to be created.
  void FinishBuild(Build build);
  void AdvanceBuilds(uint32_t extent);  // It is ready: builds that wait for it may be finished.
  void CancelBuild(uint64_t id, const Status& why);
  void GrantLease(ConnectionId c, uint64_t request_id, const SessionKey& session, const ReserveRequest& r, uint64_t slot,
                  std::vector<uint64_t> gone);
  uint64_t MakeSlot(const SessionKey& session, const std::vector<uint32_t>& extents);
  std::optional<uint64_t> IdleSlotFor(const SessionKey& session, uint32_t extents);
  void FinishPrepare(uint64_t id);
  uint32_t ExtentsFor(uint64_t bytes) const { return static_cast<uint32_t>((bytes + config_.extent_bytes - 1) / config_.extent_bytes); }
  void EndLease(uint64_t lease, bool writer_may_write);
  void DropExtents(const SessionKey& owner, std::vector<uint32_t> extents);
  void DropReferencesTo(uint64_t slot);
  void StartSealCheck(const OpenLease& lease);
  Status CheckStructure(const ledger::Lease& lease, const SealRequest& seal, const std::shared_ptr<PackedIndex>& read);
  void ReadMissing(const NamespaceKey& ns, const Id128& attempt);
  void CloseAttempt(const NamespaceKey& ns, const Id128& attempt, const std::string& reason);
  void TryComplete(const NamespaceKey& ns, const Id128& attempt);
  void CloseOvertaken(const NamespaceKey& ns, const Attempt& completed);
  void ReleaseSlot(uint64_t slot);  // Its shard is gone: idle for a living owner, else back to the pool.
  void AnswerWaiters(const NamespaceKey& ns, const Id128& attempt);
  std::optional<std::pair<Status, Level>> WaitOutcome(const NamespaceKey& ns, const WaitRequest& r) const;

  // --- what memory lets go of (node_core_retire.cc)
  void RetireOld(const NamespaceKey& ns);
  void Retire(const NamespaceKey& ns, const Id128& attempt);
  std::set<Id128> Spared(const NamespaceKey& ns) const;
  uint32_t MostRetained() const { return config_.retain_every > 0 || config_.retain_for > 0 ? std::max(config_.retain, config_.retain_max) : config_.retain; }
  void Evict(const NamespaceKey& ns, const Attempt& attempt);
  bool HasMemory(const Id128& attempt) const;  // This node has a shard of it, in whatever condition.

  // --- the durable tier (node_core_durable.cc)
  void WantDurable(const NamespaceKey& ns, const Id128& attempt, const std::string& why);
  void ApplyPolicy(const NamespaceKey& ns, const Attempt& completed);
  std::string PolicyFor(const NamespaceKey& ns, const Attempt& attempt) const;  // Why a setting would have it durable; empty: none would.
  void AddDrain(const NamespaceKey& ns, const Attempt& attempt);
  void PumpDrains();
  void DrainFailed(const Id128& attempt, const std::string& what, const Status& why);
  void GiveUpDrain(Id128 attempt, const std::string& why);  // By value: callers name it by its entry, which goes.
  bool IsInTrouble(const Drain& drain, Nanos now) const;
  std::string TroubleOf(const Drain& drain, Nanos now) const;  // For people; empty: none.
  bool AwaitsDurable() const;  // A step is still being written that shall be durable, and all its ranks are at it.
  bool DrainGivesWay(const SessionKey& session);  // To a save, where the store is in trouble. True: memory has become free.
  bool MemoryHelps(const Id128& attempt, const SessionKey& session) const;
  bool IsMine(const NamespaceKey& ns) const;        // Memory knows more of it than the store.
  bool NeedsListing(const NamespaceKey& ns) const;  // What the store has of it is not known, or not any more.
  Status AnswerLater(ConnectionId c, const Frame& f, const NamespaceKey& ns);
  void AnswerLate();
  Status NewestDamaged(const NamespaceKey& ns) const;
  void EndIfDrained();

  // --- what goes from the durable tier (node_core_retention.cc)
  void WantRetention(const NamespaceKey& ns);
  void PumpRetention();
  void RetentionEnded(const NamespaceKey& ns, const Status& status, bool progress);

  // --- reading
  Result<const Attempt*> Choose(const NamespaceKey& ns, const OpenReadRequest& r) const;
  Status NothingComplete(const NamespaceKey& ns) const;  // NotFound, Lost or Unavailable.
  void DropPin(uint64_t pin);
  std::set<Id128> AttemptsBeingRead(const NamespaceKey& ns) const;
  std::set<Id128> PinnedAttempts(const NamespaceKey& ns) const;  // Those, and what is on its way to the store.
  Result<const Pin*> FindPin(ConnectionId c, uint64_t pin) const;

  // --- output
  template <typename T>
  Status Reply(ConnectionId c, const Frame& request, const T& body) {
    Send(c, MakeFrame(request.type, request.request_id, body));
    return Status();
  }
  void Send(ConnectionId c, Frame frame) { actions_.push_back(action::Send{c, std::move(frame), {}, false}); }
  void SendError(ConnectionId c, MessageType type, uint64_t request_id, const Status& status);
  using Fields = std::vector<std::pair<std::string, std::string>>;
  void Log(action::Log::Severity severity, std::string name, Fields fields);
  // A line for a transition, before whoever asked for it is answered; the log alone then shows that it was allowed.
  void Evidence(action::Log::Severity severity, std::string name, const AttemptKey& key, Fields more);
  uint64_t NewId() { return config_.incarnation << 32 | ++next_id_; }

  CoreConfig config_;
  Catalog catalog_;
  Pool pool_;
  Nanos now_ = 0;
  Nanos busy_at_ = 0;  // Last time a client was connected or something was being written.
  uint64_t next_id_ = 0;
  bool stopping_ = false;
  bool exit_asked_ = false;
  std::map<ConnectionId, Connection> connections_;
  std::map<Id128, Session> sessions_;
  std::map<uint64_t, OpenLease> leases_;
  std::map<ShardKey, uint64_t> lease_of_;  // Open leases by attempt and rank.
  std::map<ShardKey, SealedShard> sealed_;
  std::map<Hash256, ShardKey> shard_of_record_;
  std::map<uint64_t, Build> builds_;
  std::map<uint64_t, Prepare> prepares_;
  std::map<Hash256, std::pair<uint32_t, Hash256>> reading_;  // ReadStructure under way: record -> its uid and structure.
  std::vector<Waiter> waiters_;
  std::map<uint64_t, Pin> pins_;
  std::map<GroupKey, GroupChoice> groups_;
  std::map<uint64_t, BlockCheck> block_checks_;
  std::map<WriterKey, Id128> writers_;  // Which session is a rank of the current generation. Bounded by NoteWriter.
  std::set<Id128> unwatchable_gone_;        // Ended sessions whose extents may still be mapped by who knows whom: dropped when released.
  std::set<Hash256> markers_;
  std::map<uint64_t, Zombie> zombies_;       // By lease, until the writer aborts (then the slot is idle again) or dies.
  std::map<Id128, uint64_t> opened_order_;   // Attempts by when their first lease was granted.
  uint64_t opened_count_ = 0;
  std::map<Id128, NamespaceKey> half_closed_;  // Attempts that lost a lease and have no tombstone yet: only between two entries.
  // Extents dropped in this step. A snapshot says whose they were, for the kill that comes before the keeper hears of it.
  std::vector<ledger::Slot> dropped_;
  std::vector<uint64_t> not_adopted_;          // Slots of the ledger whose extents the keeper does not have: only while replaying.
  // Shards in the store whose slot was not adopted, because the extents went after memory had let go of the step. It is durable then; a StoredManifest
  // that follows says so. By attempt; only while replaying.
  std::map<Id128, std::vector<ledger::StoredShard>> without_slot_;
  bool trim_ = false;                          // An attempt ended in this step.
  std::vector<Action> actions_;
  std::map<Id128, Drain> drains_;
  // When a step that memory has became complete, or this worker started, whichever is later. Only where retain_for asks for it.
  std::map<NamespaceKey, std::map<Id128, Nanos>> complete_at_;
  std::map<NamespaceKey, Nanos> durable_at_;  // When a step was last chosen by durable_interval.
  struct Listing {
    bool under_way = false;
    Nanos done_at = 0;  // When the last one ended, if one has.
    Status status;      // How.
    Status newest;      // Not OK: the newest step of the store is damaged.
  };
  struct Unanswered {
    ConnectionId connection = 0;
    Frame frame;
    NamespaceKey ns;
    Nanos deadline = 0;
  };
  std::map<NamespaceKey, Listing> listings_;
  Nanos drain_told_at_ = 0, list_told_at_ = 0;
  std::vector<Unanswered> unanswered_;  // Until their namespace has been listed.
  struct Retention {
    bool wanted = false;
    Nanos retry_at = 0;
    uint32_t failures = 0;                // In a row.
    std::map<StepName, std::string> why;  // Of what is being deleted.
  };
  std::map<NamespaceKey, Retention> retentions_;
  bool retaining_ = false;  // One at a time: the threads are there for what goes to the store.
  NamespaceKey retained_last_;
  struct Counters {
    uint64_t durable = 0, drain_failures = 0, drain_bytes = 0, stored_deleted = 0;
    uint64_t seals = 0, completed = 0, retired = 0, closed = 0, quarantined = 0, refused = 0;
  } counters_;
};

std::string HeaderTooLarge(uint64_t header_bytes, uint64_t header_max);
std::string StepText(const AttemptKey& key);  // "step 40 (generation 2, try 0)" for messages.

}  // namespace sp
