// Catalog: facts about attempts -> complete? which level? latest? what may go? A pure function of facts: no I/O, threads or clock.
//
// Facts are generations, seal records, copy reports, tombstones, quarantines and pins. Records merge by set union; a tombstone beats the records
// of its attempt; two different records for one (attempt, rank, kind) make the attempt corrupt, never a choice (reliability, section 2).
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/status.h"
#include "catalog/structures.h"
#include "format/ledger.h"
#include "format/messages.h"
#include "format/seal_record.h"

namespace sp {

struct NamespaceKey {
  uint32_t uid = 0;
  std::string ns;
  friend auto operator<=>(const NamespaceKey&, const NamespaceKey&) = default;
};

struct Attempt {
  AttemptKey key;
  uint32_t world_size = 0;
  std::map<uint32_t, SealRecord> records;    // Data records by rank. None behind a tombstone: only that it is gone matters then.
  std::map<uint32_t, Hash256> identities;    // Of `records`, hashed once.
  std::optional<SealRecord> manifest;
  std::optional<ledger::Tombstone> tombstone;
  bool conflicting = false;  // Two different records for one rank.
  bool operator_pin = false;
  std::optional<ledger::DurableWish> wish;  // The last one.
  std::map<uint32_t, bool> stored;          // Ranks whose shard is confirmed in the store, and whether by reading it back.
  bool durable = false;                     // And the manifest object: whatever happens to memory, it can be read from there. Stays behind a tombstone.
  bool WantsDurable() const { return wish && wish->on && !durable; }
};

// Owned by the event loop.
class Catalog {
 public:
  // `replicas`: further verified copies that level `replicated` asks for (0 on a node without peers: the level does not exist).
  // `structures_max`: bytes that the structures of one user may take.
  explicit Catalog(uint32_t replicas = 0, uint64_t structures_max = uint64_t{32} << 20) : replicas_(replicas), structures_max_(structures_max) {}

  // --- facts
  void AddGeneration(const ledger::Generation& g);
  // A rank has begun this attempt; it is open from now on.
  void AddAttempt(const AttemptKey& key, uint32_t world_size);
  void AddRecord(const SealRecord& record);
  void AddManifest(const SealRecord& record);
  void AddTombstone(const ledger::Tombstone& t);
  void AddCopyReport(const CopyReport& report);
  void AddQuarantine(const Hash256& record, const CopyReport& withdrawn);
  void SetOperatorPin(const ledger::OperatorPin& pin);
  void SetWish(const ledger::DurableWish& wish);
  void AddStoredShard(const SealRecord& record, bool read_back);
  void AddStoredManifest(const SealRecord& record);
  Status AddStructure(uint32_t uid, const Hash256& hash, const std::shared_ptr<PackedIndex>& index);  // kLimit: no room.

  // --- answers
  size_t CountGenerations(uint32_t uid) const;  // Of all namespaces of that user.
  const ledger::Generation* CurrentGeneration(const NamespaceKey& ns) const;
  const ledger::Generation* FindGenerationByNonce(const NamespaceKey& ns, const Id128& nonce) const;
  const Attempt* FindAttempt(const NamespaceKey& ns, const Id128& attempt) const;
  // It was closed or retired, and its tombstone has made room for newer ones since: it must not be opened again. Known for a bounded time.
  bool WasForgotten(const NamespaceKey& ns, const Id128& attempt) const;
  std::optional<uint64_t> StructureDataBytes(uint32_t uid, const Hash256& hash) const;  // nullopt: not read yet.

  // Records of ranks 0..W-1 if they are all there and fill every tensor. kIncomplete: something is missing (also a structure that has not been
  // read yet); kCorrupt: it can never become whole.
  Result<std::vector<SealRecord>> Completable(const NamespaceKey& ns, const Id128& attempt);
  // Of an attempt that all ranks have sealed: one record for each structure that has to be read (again) before Completable can answer.
  std::vector<SealRecord> Unread(const NamespaceKey& ns, const Id128& attempt) const;

  // The generations below which the lineage of this one goes on, itself first.
  std::vector<ledger::Generation> Ancestry(const NamespaceKey& ns, uint64_t generation) const;
  AttemptState StateOf(const Attempt& attempt) const;
  Level LevelOf(const Attempt& attempt) const;
  AttemptInfo InfoOf(const Attempt& attempt) const;

  // Complete attempts at `level` or above, newest first: the current generation's by falling step, then its parent and what is below it in the
  // parent's generation, and so on. Of one (generation, step) only the latest try. `latest` is its first element.
  std::vector<const Attempt*> Lineage(const NamespaceKey& ns, Level level) const;
  // Some attempt of the current lineage was complete once (so that an empty Lineage means lost, not new).
  bool LineageEverComplete(const NamespaceKey& ns) const;
  // The lineage begins with a generation that was opened parentless on purpose.
  bool LineageBeginsFresh(const NamespaceKey& ns) const;
  // Complete (or corrupt) attempts beyond the newest `retain` of the lineage, older than one of those, and not pinned.
  std::vector<const Attempt*> Retirable(const NamespaceKey& ns, uint32_t retain, const std::set<Id128>& pinned) const;
  std::vector<const Attempt*> OpenAttempts(const NamespaceKey& ns) const;
  std::vector<const Attempt*> Attempts(const NamespaceKey& ns) const;
  std::vector<NamespaceKey> Namespaces() const;
  std::vector<ledger::Generation> Generations(const NamespaceKey& ns) const;
  std::vector<ledger::Tombstone> Tombstones(const NamespaceKey& ns) const;  // Oldest first.
  const std::set<Hash256>& quarantined() const { return quarantined_; }

  // Drops what nothing refers to any more: structures, copy reports and quarantines of gone attempts.
  void Trim();
  static constexpr size_t kTombstonesKept = 128;   // The newest per namespace; older ones go when a new one comes.
  static constexpr size_t kForgottenKept = 1024;  // Of those that went, the ids; not over a restart.

 private:
  struct Namespace {
    std::map<uint64_t, ledger::Generation> generations;
    std::map<Id128, Attempt> attempts;
    std::vector<Id128> tombstoned;  // Oldest first.
    std::deque<Id128> forgotten;    // Oldest first, and the same ids to look one up.
    std::set<Id128> forgotten_ids;
  };
  const Namespace* Find(const NamespaceKey& ns) const;
  bool Listed(const Attempt& attempt, Level level) const;

  uint32_t replicas_;
  uint64_t structures_max_;
  std::map<NamespaceKey, Namespace> namespaces_;
  std::map<Hash256, std::set<std::pair<Id128, Id128>>> copies_;  // Record identity -> (node, boot) with a verified copy.
  std::set<Hash256> quarantined_;
  std::map<uint32_t, Structures> structures_;  // By uid.
};

}  // namespace sp
