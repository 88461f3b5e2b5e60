#include "catalog/catalog.h"

#include <algorithm>
#include <tuple>

#include "base/plant.h"

namespace sp {
namespace {

NamespaceKey KeyOf(const AttemptKey& key) { return {key.uid, key.ns}; }

// Newer first.
bool NewerThan(const Attempt* a, const Attempt* b) {
  return std::tie(a->key.generation, a->key.step, a->key.try_number) > std::tie(b->key.generation, b->key.step, b->key.try_number);
}

}  // namespace

const Catalog::Namespace* Catalog::Find(const NamespaceKey& ns) const {
  auto it = namespaces_.find(ns);
  return it == namespaces_.end() ? nullptr : &it->second;
}

void Catalog::AddGeneration(const ledger::Generation& g) {
  auto [it, inserted] = namespaces_[{g.uid, g.ns}].generations.emplace(g.generation, g);
  if (!inserted) it->second.ever_complete |= g.ever_complete;
}

void Catalog::AddAttempt(const AttemptKey& key, uint32_t world_size) {
  Attempt& attempt = namespaces_[KeyOf(key)].attempts[key.AttemptId()];
  attempt.key = key;
  if (attempt.world_size == 0) attempt.world_size = world_size;
}

void Catalog::AddRecord(const SealRecord& record) {
  AddAttempt(record.key, record.world_size);
  Attempt& attempt = namespaces_[KeyOf(record.key)].attempts[record.attempt];
  if (attempt.tombstone) return;
  auto [it, inserted] = attempt.records.emplace(record.rank, record);
  if (inserted) attempt.identities.emplace(record.rank, record.Identity());
  if ((!inserted && it->second != record) || record.world_size != attempt.world_size) attempt.conflicting = true;
}

void Catalog::AddManifest(const SealRecord& record) {
  AddAttempt(record.key, record.world_size);
  Namespace& ns = namespaces_[KeyOf(record.key)];
  Attempt& attempt = ns.attempts[record.attempt];
  if (attempt.manifest && *attempt.manifest != record) attempt.conflicting = true;
  attempt.manifest = record;
  if (auto g = ns.generations.find(record.key.generation); g != ns.generations.end()) g->second.ever_complete = true;
}

void Catalog::AddTombstone(const ledger::Tombstone& t) {
  Namespace& ns = namespaces_[{t.uid, t.ns}];
  Attempt& attempt = ns.attempts[t.attempt];
  if (attempt.tombstone) return;
  attempt.tombstone = t;
  attempt.records.clear();
  attempt.identities.clear();
  attempt.stored.clear();
  attempt.wish.reset();
  ns.tombstoned.push_back(t.attempt);
  if (ns.tombstoned.size() > kTombstonesKept) {
    if (ns.forgotten_ids.insert(ns.tombstoned.front()).second) ns.forgotten.push_back(ns.tombstoned.front());
    if (ns.forgotten.size() > kForgottenKept) {
      ns.forgotten_ids.erase(ns.forgotten.front());
      ns.forgotten.pop_front();
    }
    ns.attempts.erase(ns.tombstoned.front());
    ns.tombstoned.erase(ns.tombstoned.begin());
  }
}

void Catalog::AddCopyReport(const CopyReport& report) {
  if (report.held) copies_[report.record].insert({report.node, report.boot});
  else if (auto it = copies_.find(report.record); it != copies_.end()) it->second.erase({report.node, report.boot});
}

void Catalog::AddQuarantine(const Hash256& record, const CopyReport& withdrawn) {
  quarantined_.insert(record);
  if (!SP_PLANTED(quarantine_keeps_copy)) AddCopyReport(withdrawn);
}

void Catalog::SetOperatorPin(const ledger::OperatorPin& pin) {
  Namespace& ns = namespaces_[{pin.uid, pin.ns}];
  if (auto it = ns.attempts.find(pin.attempt); it != ns.attempts.end()) it->second.operator_pin = pin.on;
}

void Catalog::SetWish(const ledger::DurableWish& wish) {
  Namespace& ns = namespaces_[{wish.uid, wish.ns}];
  if (auto it = ns.attempts.find(wish.attempt); it != ns.attempts.end()) it->second.wish = wish;
}

void Catalog::AddStoredShard(const SealRecord& record, bool read_back) {
  AddRecord(record);
  Attempt& attempt = namespaces_[KeyOf(record.key)].attempts[record.attempt];
  if (!attempt.tombstone) attempt.stored.emplace(record.rank, read_back);
}

void Catalog::AddStoredManifest(const SealRecord& record) {
  AddManifest(record);
  Attempt& attempt = namespaces_[KeyOf(record.key)].attempts[record.attempt];
  attempt.durable = !attempt.tombstone;
}

std::vector<ledger::Generation> Catalog::Ancestry(const NamespaceKey& key, uint64_t generation) const {
  std::vector<ledger::Generation> out;
  const Namespace* ns = Find(key);
  if (!ns) return out;
  for (auto it = ns->generations.find(generation); it != ns->generations.end();) {
    out.push_back(it->second);
    // Parents are older: a damaged entry cannot make this go round in circles.
    if (!it->second.has_parent || it->second.parent_generation >= it->first) break;
    it = ns->generations.find(it->second.parent_generation);
  }
  return out;
}

Status Catalog::AddStructure(uint32_t uid, const Hash256& hash, const std::shared_ptr<PackedIndex>& index) {
  return structures_[uid].Add(hash, index, structures_max_);
}

std::optional<uint64_t> Catalog::StructureDataBytes(uint32_t uid, const Hash256& hash) const {
  auto it = structures_.find(uid);
  return it == structures_.end() ? std::nullopt : it->second.DataBytes(hash);
}

size_t Catalog::CountGenerations(uint32_t uid) const {
  size_t count = 0;
  for (const auto& [key, ns] : namespaces_) count += key.uid == uid ? ns.generations.size() : 0;
  return count;
}

const ledger::Generation* Catalog::CurrentGeneration(const NamespaceKey& key) const {
  const Namespace* ns = Find(key);
  return ns && !ns->generations.empty() ? &ns->generations.rbegin()->second : nullptr;
}

const ledger::Generation* Catalog::FindGenerationByNonce(const NamespaceKey& key, const Id128& nonce) const {
  if (const Namespace* ns = Find(key)) {
    for (auto it = ns->generations.rbegin(); it != ns->generations.rend(); ++it) {
      if (it->second.nonce == nonce) return &it->second;
    }
  }
  return nullptr;
}

const Attempt* Catalog::FindAttempt(const NamespaceKey& key, const Id128& attempt) const {
  const Namespace* ns = Find(key);
  if (!ns) return nullptr;
  auto it = ns->attempts.find(attempt);
  return it == ns->attempts.end() ? nullptr : &it->second;
}

bool Catalog::WasForgotten(const NamespaceKey& key, const Id128& attempt) const {
  const Namespace* ns = Find(key);
  return ns && ns->forgotten_ids.contains(attempt);
}

Result<std::vector<SealRecord>> Catalog::Completable(const NamespaceKey& key, const Id128& id) {
  const Attempt* attempt = FindAttempt(key, id);
  if (!attempt) return Error(StatusCode::kNotFound, "no such attempt");
  if (attempt->tombstone) return Error(StatusCode::kClosed, attempt->tombstone->reason);
  if (attempt->conflicting) return Error(StatusCode::kCorrupt, "two different seal records for one rank");
  if (attempt->records.size() < attempt->world_size) {
    return Error(StatusCode::kIncomplete, std::to_string(attempt->records.size()) + " of " + std::to_string(attempt->world_size) + " ranks sealed");
  }
  std::vector<SealRecord> records;
  std::vector<Hash256> structures;
  for (const auto& [rank, record] : attempt->records) {  // Ranks are < W and distinct, so W of them are 0..W-1.
    records.push_back(record);
    structures.push_back(record.structure);
  }
  const std::optional<Status> coverage = structures_[key.uid].Coverage(structures);
  if (!coverage) return Error(StatusCode::kIncomplete, "the structure of a shard has not been read yet");
  if (!coverage->ok() && !SP_PLANTED(coverage_ignored)) return Error(StatusCode::kCorrupt, coverage->message());
  return records;
}

std::vector<SealRecord> Catalog::Unread(const NamespaceKey& key, const Id128& id) const {
  std::vector<SealRecord> unread;
  const Attempt* attempt = FindAttempt(key, id);
  if (!attempt || attempt->manifest || attempt->records.size() < attempt->world_size) return unread;
  const auto known = structures_.find(key.uid);
  std::set<Hash256> seen;
  for (const auto& [rank, record] : attempt->records) {
    const bool kept = known != structures_.end() && known->second.IsKept(record.structure);
    if (!kept && seen.insert(record.structure).second) unread.push_back(record);
  }
  return unread;
}

Level Catalog::LevelOf(const Attempt& attempt) const {
  if (!attempt.manifest || attempt.tombstone || attempt.conflicting || attempt.records.size() < attempt.world_size) return Level::kNone;
  if (attempt.durable) return Level::kDurable;
  size_t fewest = SIZE_MAX;
  for (const auto& [rank, identity] : attempt.identities) {
    auto it = copies_.find(identity);
    fewest = std::min(fewest, it == copies_.end() ? 0 : it->second.size());
  }
  if (fewest == 0) return Level::kNone;
  return replicas_ > 0 && fewest > replicas_ ? Level::kReplicated : Level::kMemory;
}

AttemptState Catalog::StateOf(const Attempt& attempt) const {
  if (attempt.tombstone) return attempt.tombstone->why == ledger::TombstoneWhy::kRetired ? AttemptState::kRetired : AttemptState::kClosed;
  if (attempt.conflicting) return AttemptState::kCorrupt;
  if (!attempt.manifest) return SP_PLANTED(listed_without_manifest) && !attempt.records.empty() ? AttemptState::kComplete : AttemptState::kOpen;
  return LevelOf(attempt) == Level::kNone ? AttemptState::kCorrupt : AttemptState::kComplete;
}

AttemptInfo Catalog::InfoOf(const Attempt& attempt) const {
  AttemptInfo info;
  info.attempt = attempt.tombstone ? attempt.tombstone->attempt : attempt.key.AttemptId();
  info.nonce = attempt.key.nonce;
  info.generation = attempt.key.generation;
  info.step = attempt.key.step;
  info.try_number = attempt.key.try_number;
  info.world_size = attempt.world_size;
  info.sealed_ranks = static_cast<uint32_t>(attempt.records.size());
  for (const auto& [rank, record] : attempt.records) info.bytes += record.length_bytes;
  info.state = StateOf(attempt);
  info.level = LevelOf(attempt);
  info.pinned = attempt.operator_pin;
  if (attempt.tombstone) {
    info.reason = attempt.tombstone->reason;
  } else if (info.state == AttemptState::kCorrupt) {
    info.reason = "conflicting seal records";
    for (const auto& [rank, identity] : attempt.identities) {
      if (quarantined_.contains(identity)) info.reason = "the shard of rank " + std::to_string(rank) + " is corrupt";
    }
  }
  return info;
}

bool Catalog::Listed(const Attempt& attempt, Level level) const {
  return StateOf(attempt) == AttemptState::kComplete && (LevelOf(attempt) >= level || SP_PLANTED(listed_without_manifest));
}

std::vector<const Attempt*> Catalog::Lineage(const NamespaceKey& key, Level level) const {
  std::vector<const Attempt*> lineage;
  const Namespace* ns = Find(key);
  if (!ns || ns->generations.empty()) return lineage;
  const ledger::Generation* generation = &ns->generations.rbegin()->second;
  uint64_t step_max = kStepMax;
  while (generation) {
    std::vector<const Attempt*> here;
    for (const auto& [id, attempt] : ns->attempts) {
      if (attempt.key.generation == generation->generation && attempt.key.step <= step_max && Listed(attempt, level)) here.push_back(&attempt);
    }
    std::sort(here.begin(), here.end(), NewerThan);
    for (const Attempt* a : here) {
      if (lineage.empty() || lineage.back()->key.generation != a->key.generation || lineage.back()->key.step != a->key.step) lineage.push_back(a);
    }
    if (!generation->has_parent) break;
    step_max = SP_PLANTED(latest_ignores_lineage) ? kStepMax : generation->parent_step;
    auto parent = ns->generations.find(generation->parent_generation);
    generation = parent == ns->generations.end() || parent->first >= generation->generation ? nullptr : &parent->second;
  }
  return lineage;
}

bool Catalog::LineageEverComplete(const NamespaceKey& key) const {
  const Namespace* ns = Find(key);
  if (!ns || ns->generations.empty()) return false;
  for (auto it = ns->generations.rbegin(); it != ns->generations.rend(); ++it) {
    if (it->second.ever_complete || it->second.has_parent) return true;  // A parent is always an attempt that was complete.
    if (it->second.fresh) return false;
  }
  return false;
}

bool Catalog::LineageBeginsFresh(const NamespaceKey& key) const {
  const Namespace* ns = Find(key);
  if (!ns || ns->generations.empty()) return false;
  auto it = std::prev(ns->generations.end());
  while (it->second.has_parent) {
    auto parent = ns->generations.find(it->second.parent_generation);
    if (parent == ns->generations.end() || parent->first >= it->first) return false;
    it = parent;
  }
  return it->second.fresh;
}

std::vector<const Attempt*> Catalog::Retirable(const NamespaceKey& key, uint32_t retain, const std::set<Id128>& pinned) const {
  std::vector<const Attempt*> out;
  const Namespace* ns = Find(key);
  if (!ns) return out;
  std::vector<const Attempt*> kept = Lineage(key, Level::kMemory);
  if (kept.size() > retain) kept.resize(retain);
  if (kept.empty()) return out;
  for (const auto& [id, attempt] : ns->attempts) {
    const AttemptState state = StateOf(attempt);
    if (state != AttemptState::kComplete && state != AttemptState::kCorrupt) continue;
    if (attempt.operator_pin || pinned.contains(id)) continue;
    if (std::find(kept.begin(), kept.end(), &attempt) != kept.end()) continue;
    // Only after a newer one is complete; an abandoned branch stays until the new one has overtaken it (I-14).
    if (!std::any_of(kept.begin(), kept.end(), [&](const Attempt* k) { return NewerThan(k, &attempt); })) continue;
    out.push_back(&attempt);
  }
  return out;
}

std::vector<const Attempt*> Catalog::OpenAttempts(const NamespaceKey& key) const {
  std::vector<const Attempt*> out;
  if (const Namespace* ns = Find(key)) {
    for (const auto& [id, attempt] : ns->attempts) {
      if (StateOf(attempt) == AttemptState::kOpen) out.push_back(&attempt);
    }
  }
  return out;
}

std::vector<const Attempt*> Catalog::Attempts(const NamespaceKey& key) const {
  std::vector<const Attempt*> out;
  if (const Namespace* ns = Find(key)) {
    for (const auto& [id, attempt] : ns->attempts) out.push_back(&attempt);
  }
  std::sort(out.begin(), out.end(), NewerThan);
  return out;
}

std::vector<NamespaceKey> Catalog::Namespaces() const {
  std::vector<NamespaceKey> out;
  for (const auto& [key, ns] : namespaces_) out.push_back(key);
  return out;
}

std::vector<ledger::Generation> Catalog::Generations(const NamespaceKey& key) const {
  std::vector<ledger::Generation> out;
  if (const Namespace* ns = Find(key)) {
    for (const auto& [number, generation] : ns->generations) out.push_back(generation);
  }
  return out;
}

std::vector<ledger::Tombstone> Catalog::Tombstones(const NamespaceKey& key) const {
  std::vector<ledger::Tombstone> out;
  if (const Namespace* ns = Find(key)) {
    for (const Id128& id : ns->tombstoned) out.push_back(*ns->attempts.at(id).tombstone);
  }
  return out;
}

void Catalog::Trim() {
  std::map<uint32_t, std::set<Hash256>> live, open;  // Structures by uid.
  std::set<Hash256> identities;
  for (auto& [key, ns] : namespaces_) {
    for (auto& [id, attempt] : ns.attempts) {
      for (const auto& [rank, record] : attempt.records) {
        live[key.uid].insert(record.structure);
        if (!attempt.manifest) open[key.uid].insert(record.structure);
      }
      for (const auto& [rank, identity] : attempt.identities) identities.insert(identity);
    }
  }
  for (auto& [uid, structures] : structures_) structures.Trim(live[uid], open[uid]);
  std::erase_if(structures_, [](const auto& s) { return s.second.empty(); });
  std::erase_if(copies_, [&](const auto& c) { return !identities.contains(c.first); });
  std::erase_if(quarantined_, [&](const Hash256& record) { return !identities.contains(record); });
}

}  // namespace sp
