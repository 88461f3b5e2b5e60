// What memory lets go of: complete steps that newer ones have replaced, by the rules of the settings.
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
  const std::set<Id128> spared = Spared(ns);
  std::vector<Id128> ids;
  for (const Attempt* a : catalog_.Retirable(ns, retain, PinnedAttempts(ns))) {
    if (const Id128 id = a->key.AttemptId(); !spared.contains(id)) ids.push_back(id);
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
  if (!attempt || attempt->tombstone) return;  // Forgotten meanwhile, to make room for one that went before it.
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

// Older than the newest `retain` of the lineage, and kept all the same: by retain_every and retain_for, and retain_max steps in all. So a pool that holds
// retain_max steps and the one that is being written never lacks room for them.
std::set<Id128> NodeCore::Impl::Spared(const NamespaceKey& ns) const {
  std::set<Id128> spared;
  if (config_.retain_every == 0 && config_.retain_for == 0) return spared;
  const std::vector<const Attempt*> lineage = catalog_.Lineage(ns, Level::kMemory);
  const auto times = complete_at_.find(ns);
  const auto age = [&](const Attempt* a) -> std::optional<Nanos> {  // Before the newest, and not before now: a job that stands still loses nothing.
    if (times == complete_at_.end()) return std::nullopt;
    const auto newest = times->second.find(lineage.front()->key.AttemptId()), own = times->second.find(a->key.AttemptId());
    if (newest == times->second.end() || own == times->second.end()) return std::nullopt;
    return newest->second - own->second;
  };
  for (size_t i = config_.retain; i < lineage.size() && config_.retain + spared.size() < config_.retain_max; ++i) {
    if (!HasMemory(lineage[i]->key.AttemptId())) continue;
    const bool by_number = config_.retain_every > 0 && lineage[i]->key.step % config_.retain_every == 0;
    if (by_number || age(lineage[i]).value_or(config_.retain_for) < config_.retain_for) spared.insert(lineage[i]->key.AttemptId());
  }
  return spared;
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
  // First what a restore may begin from: a launch that was rolled back goes on from a step that is older than what it left behind.
  const std::vector<const Attempt*> lineage = catalog_.Lineage(ns, Level::kDurable);
  std::ranges::stable_partition(stored, [&](const Id128& step) {
    return std::ranges::any_of(lineage, [&](const Attempt* a) { return a->key.AttemptId() == step; });
  });
  for (size_t i = kStoredKept; i < stored.size(); ++i) {
    Commit(ledger::Tombstone{ns.uid, ns.ns, stored[i], ledger::TombstoneWhy::kRetired, "forgotten here; the store still has it"});
  }
}

}  // namespace sp
