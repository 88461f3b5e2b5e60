// What memory lets go of: complete steps that newer ones have replaced, by the rules of the settings, and what these spare when a save needs room.
#include <algorithm>

#include "base/plant.h"
#include "node/node_core_impl.h"

namespace sp {

using Severity = action::Log::Severity;

namespace {
constexpr size_t kStoredKept = 16;  // Durable steps of one namespace that are listed after memory let go of them; the store keeps all.
}

void NodeCore::Impl::RetireOld(const NamespaceKey& ns) {
  const uint32_t retain = SP_PLANTED(retire_early) && config_.retain > 1 ? config_.retain - 1 : config_.retain;
  std::vector<Id128> ids;
  for (const Attempt* a : catalog_.Retirable(ns, retain, PinnedAttempts(ns))) {
    if (!IsSpared(ns, *a)) ids.push_back(a->key.AttemptId());
  }
  for (const Id128& id : ids) Retire(ns, id);
  if (auto times = complete_at_.find(ns); times != complete_at_.end()) {
    std::erase_if(times->second, [&](const auto& t) {
      const Attempt* attempt = catalog_.FindAttempt(ns, t.first);
      return !attempt || attempt->tombstone || !HasMemory(t.first);
    });
  }
}

void NodeCore::Impl::Retire(const NamespaceKey& ns, const Id128& id) {
  const Attempt* attempt = catalog_.FindAttempt(ns, id);
  if (attempt->durable) {
    if (HasMemory(id)) Evict(ns, *attempt);
    return;
  }
  std::vector<uint64_t> slots;
  for (const auto& [rank, record] : attempt->records) {
    if (auto s = sealed_.find({id, rank}); s != sealed_.end()) slots.push_back(s->second.slot);
  }
  Evidence(Severity::kInfo, "attempt_retired", attempt->key, {});
  Commit(ledger::Tombstone{ns.uid, ns.ns, id, ledger::TombstoneWhy::kRetired, "newer complete steps took its place"});
  trim_ = true;
  ++counters_.retired;
  for (uint64_t slot : slots) ReleaseSlot(slot);
  AnswerWaiters(ns, id);
}

// Beyond the newest `retain` steps, and kept all the same while there is memory.
bool NodeCore::Impl::IsSpared(const NamespaceKey& ns, const Attempt& attempt) const {
  if (catalog_.StateOf(attempt) != AttemptState::kComplete) return false;
  if (config_.retain_every > 0 && attempt.key.step % config_.retain_every == 0) return true;
  const auto times = complete_at_.find(ns);
  const std::vector<const Attempt*> lineage = catalog_.Lineage(ns, Level::kMemory);
  if (times == complete_at_.end() || lineage.empty()) return false;
  // Before the newest, and not before now: a job that stands still loses nothing.
  const auto newest = times->second.find(lineage.front()->key.AttemptId()), own = times->second.find(attempt.key.AttemptId());
  return newest != times->second.end() && own != times->second.end() && newest->second - own->second <= config_.retain_for;
}

// The memory of this attempt is, or would be, something that the session can have: its own, or that of the dead (I-10).
bool NodeCore::Impl::MemoryHelps(const Id128& attempt, const SessionKey& session) const {
  for (auto it = sealed_.lower_bound({attempt, 0}); it != sealed_.end() && it->first.first == attempt; ++it) {
    const Id128& owner = pool_.FindSlot(it->second.slot)->entry.session.session;
    if (owner == session.session || !IsAlive(owner)) return true;
  }
  return false;
}

// Of what retain_every and retain_for keep, the oldest of a namespace.
bool NodeCore::Impl::SparedGivesWay(const SessionKey& session) {
  if (config_.retain_every == 0 && config_.retain_for == 0) return false;
  for (const NamespaceKey& ns : catalog_.Namespaces()) {
    if (ns.uid != session.uid) continue;
    const std::vector<const Attempt*> retirable = catalog_.Retirable(ns, config_.retain, PinnedAttempts(ns));
    const std::vector<const Attempt*> all = catalog_.Attempts(ns);  // Newest first.
    const auto goes = [&](const Attempt* a) { return std::ranges::find(retirable, a) != retirable.end() && MemoryHelps(a->key.AttemptId(), session); };
    const auto oldest = std::find_if(all.rbegin(), all.rend(), goes);
    if (oldest == all.rend()) continue;
    Retire(ns, (*oldest)->key.AttemptId());
    return true;
  }
  return false;
}

bool NodeCore::Impl::HasMemory(const Id128& attempt) const {
  const auto it = sealed_.lower_bound({attempt, 0});
  return it != sealed_.end() && it->first.first == attempt;
}

void NodeCore::Impl::Evict(const NamespaceKey& ns, const Attempt& attempt) {
  const Id128 id = attempt.key.AttemptId();
  std::vector<uint64_t> slots;
  for (auto it = sealed_.lower_bound({id, 0}); it != sealed_.end() && it->first.first == id; ++it) slots.push_back(it->second.slot);
  Evidence(Severity::kInfo, "attempt_evicted", attempt.key, {{"still_in", config_.store}});
  Commit(ledger::Evicted{ns.uid, ns.ns, id});
  trim_ = true;
  ++counters_.retired;
  for (uint64_t slot : slots) ReleaseSlot(slot);
  const std::set<Id128> in_use = PinnedAttempts(ns);
  std::vector<Id128> stored;  // Newest first.
  for (const Attempt* a : catalog_.Attempts(ns)) {
    const bool pinned = a->operator_pin || in_use.contains(a->key.AttemptId());
    if (a->durable && !a->tombstone && !pinned && !HasMemory(a->key.AttemptId())) stored.push_back(a->key.AttemptId());
  }
  for (size_t i = kStoredKept; i < stored.size(); ++i) {
    Commit(ledger::Tombstone{ns.uid, ns.ns, stored[i], ledger::TombstoneWhy::kRetired, "forgotten here; the store still has it"});
  }
}

}  // namespace sp
