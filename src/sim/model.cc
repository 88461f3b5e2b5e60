#include "sim/model.h"

#include <algorithm>
#include <tuple>

#include "node/core_types.h"

namespace sp::sim {
namespace {
auto Age(const ModelAttempt* a) { return std::tie(a->key.generation, a->key.step, a->key.try_number); }
}  // namespace

void Model::Append(Nanos now, Nanos pin_ns, const LedgerEntry& entry) {
  now_ = now;
  pin_ns_ = pin_ns;
  std::visit([this](const auto& e) { On(e); }, entry);
}

void Model::On(const ledger::Generation& e) {
  auto& of_ns = generations_[{e.uid, e.ns}];
  Require(of_ns.empty() || e.generation > of_ns.rbegin()->first, "I-21: a generation does not grow");
  for (const auto& [number, g] : of_ns) Require(g.nonce != e.nonce, "I-32: one launch opened two generations");
  if (e.has_parent) {
    const ModelAttempt* parent = Find(e.parent);
    Require(parent && Complete(*parent), "I-1: the parent of a generation is not complete");
    Require(parent->key.step == e.parent_step && parent->key.generation == e.parent_generation, "I-6: the parent is named wrongly");
  }
  of_ns.emplace(e.generation, e);
}

void Model::On(const ledger::Slot& e) {
  const std::set<uint32_t> mine(e.extents.begin(), e.extents.end());
  Require(mine.size() == e.extents.size(), "I-10: an extent twice in one slot");
  for (const auto& [id, slot] : slots_) {
    for (uint32_t extent : slot.entry.extents) Require(!mine.contains(extent), "I-10: an extent in two slots");
  }
  Require(slots_.emplace(e.slot, ModelSlot{e, Use::kIdle, {}}).second, "I-10: a slot id was used again");
}

void Model::On(const ledger::SlotGone& e) {
  auto it = slots_.find(e.slot);
  if (it == slots_.end()) return;
  Require(it->second.use == Use::kIdle, "I-16: a slot was given up while a shard, a lease or a late writer is in it");
  slots_.erase(it);
}

void Model::On(const ledger::Lease& e) {
  auto slot = slots_.find(e.slot);
  Require(slot != slots_.end() && slot->second.use == Use::kIdle, "I-10: a lease on a slot that is not idle");
  Require(e.key.generation == CurrentGeneration({e.key.uid, e.key.ns}), "I-21: a lease for a superseded generation");
  Require(slot->second.entry.session.uid == e.key.uid, "I-38: a lease in another identity's namespace");
  ModelAttempt& a = attempts_[e.key.AttemptId()];
  Require(!a.tombstone && !a.manifest && !a.shards.contains(e.rank), "I-3: a lease for a shard that is final");
  Require(a.world_size == 0 || a.world_size == e.world_size, "I-1: one attempt, two world sizes");
  for (const auto& [id, lease] : leases_) {
    Require(lease.key != e.key || lease.rank != e.rank, "I-32: two leases for one shard");
  }
  a.ns = {e.key.uid, e.key.ns};
  a.key = e.key;
  a.world_size = e.world_size;
  slot->second.use = Use::kLeased;
  leases_[e.lease] = e;
}

void Model::On(const ledger::LeaseEnded& e) {
  auto slot = slots_.find(e.slot);
  Require(slot != slots_.end(), "I-10: a lease ended in a slot that is gone");
  Require(slot->second.use != Use::kSealed, "I-3: the lease of a sealed shard ended");
  if (!e.writer_may_write) {
    Require(promised_.contains(e.lease) || gone_.contains(slot->second.entry.session.session),
            "I-10: a slot is reused although its writer neither stopped nor died");
  }
  slot->second.use = e.writer_may_write ? Use::kZombie : Use::kIdle;
  leases_.erase(e.lease);
}

void Model::On(const ledger::Sealed& e) {
  auto decoded = SealRecord::Decode(e.record.span());
  Require(decoded.has_value(), "I-3: a seal record that cannot be decoded");
  auto lease = leases_.find(e.lease);
  Require(lease != leases_.end(), "I-2: a seal without a lease");
  Require(checked_.contains(e.lease), "I-2: a seal whose bytes were not checked");
  const SealRecord& r = *decoded;
  Require(r.key == lease->second.key && r.rank == lease->second.rank && r.world_size == lease->second.world_size && e.slot == lease->second.slot,
          "I-3: a seal record that differs from its lease");
  Require(r.key.generation == CurrentGeneration({r.key.uid, r.key.ns}), "I-21: a seal in a superseded generation");
  ModelAttempt& a = attempts_.at(r.attempt);
  Require(!a.tombstone, "I-21: a seal in a closed attempt");
  Require(a.shards.emplace(r.rank, ModelShard{r, e.slot, e.lease, true}).second, "I-3: a second seal record for one shard");
  ModelSlot& slot = slots_.at(e.slot);
  Require(slot.use == Use::kLeased, "I-10: a seal in a slot that was not leased");
  slot.use = Use::kSealed;
  slot.attempt = r.attempt;
  leases_.erase(lease);
}

void Model::On(const ledger::Manifest& e) {
  auto decoded = SealRecord::Decode(e.record.span());
  Require(decoded.has_value() && decoded->kind == ShardKind::kManifest, "I-3: a manifest's record that cannot be decoded");
  auto it = attempts_.find(decoded->attempt);
  Require(it != attempts_.end(), "I-1: a manifest of an unknown attempt");
  ModelAttempt& a = it->second;
  Require(!a.tombstone, "I-16: a manifest of a closed attempt");
  Require(!a.manifest, "I-3: a second manifest");
  Require(a.shards.size() == a.world_size && a.shards.rbegin()->first == a.world_size - 1, "I-1: complete without all ranks");
  for (const auto& [rank, shard] : a.shards) {
    Require(shard.record.key == a.key && shard.record.world_size == a.world_size, "I-1: complete with shards of different attempts");
    Require(good_coverage_[shard.record.structure], "I-1: complete although a tensor is not covered");
  }
  a.manifest = true;
  had_complete_.insert(a.ns);
  generations_[a.ns].at(a.key.generation).ever_complete = true;
}

void Model::On(const ledger::Tombstone& e) {
  auto it = attempts_.find(e.attempt);
  if (it == attempts_.end()) it = attempts_.emplace(e.attempt, ModelAttempt{.ns = {e.uid, e.ns}}).first;
  ModelAttempt& a = it->second;
  Require(!a.tombstone, "I-32: a second tombstone");
  if (e.why == ledger::TombstoneWhy::kClosed) {
    Require(!a.manifest, "I-14: a complete step was closed");
  } else {
    Require(a.manifest, "I-15: a step was retired that was never complete");
    Require(!a.WantsDurable(), "I-17: a step was retired while it was on its way to the store");
    Require(!a.durable || !a.HasMemory(), "I-14: a durable step was forgotten before memory let go of it");
    const bool by_rule = a.durable && durable_keeps_ > 0;
    if (const char* rule = by_rule ? WhyKeptInStore(a) : WhyKept(a)) Fail(rule);
  }
  a.tombstone = e.why;
  LeaveMemory(a);
}

void Model::LeaveMemory(ModelAttempt& a) {
  for (auto& [rank, shard] : a.shards) {
    if (shard.here) slots_.at(shard.slot).use = Use::kIdle;
    shard.here = false;
  }
}

const char* Model::WhyHeld(const ModelAttempt& a) const {
  if (a.operator_pin) return "I-17: an operator's pinned step was retired";
  const Id128 id = a.key.AttemptId();
  for (const auto& [pin, read] : pins_) {
    if (read.entry.attempt == id) return "I-17: a step was retired while it was being restored";
  }
  return nullptr;
}

const char* Model::WhyKeptInStore(const ModelAttempt& a) const {
  if (const char* held = WhyHeld(a)) return held;
  const std::vector<const ModelAttempt*> lineage = Lineage(a.ns, true);
  const auto kept = lineage.begin() + static_cast<ptrdiff_t>(std::min<size_t>(lineage.size(), durable_keeps_));
  return std::find(lineage.begin(), kept, &a) == kept ? nullptr : "I-14: one of the newest durable steps was let go";
}

const char* Model::WhyKept(const ModelAttempt& a) const {
  if (const char* held = WhyHeld(a)) return held;
  const std::vector<const ModelAttempt*> lineage = Lineage(a.ns);
  if (lineage.empty()) return "I-14: a step was retired and none is left";
  const auto kept = lineage.begin() + static_cast<ptrdiff_t>(std::min<size_t>(lineage.size(), retain_));
  if (std::find(lineage.begin(), kept, &a) != kept) return "I-14: one of the newest steps was retired";
  const bool overtaken = std::any_of(lineage.begin(), kept, [&](auto* k) { return Age(k) > Age(&a); });
  return overtaken ? nullptr : "I-14: a step was retired before a newer one was complete";
}

void Model::On(const ledger::Quarantine& e) { quarantined_.insert(e.record); }

void Model::On(const ledger::OperatorPin& e) {
  Require(attempts_.contains(e.attempt), "I-17: a pin on an unknown attempt");
  attempts_[e.attempt].operator_pin = e.on;
}

void Model::On(const ledger::ReadPin& e) {
  if (e.on) {
    const ModelAttempt* a = Find(e.attempt);
    Require(a && Complete(*a), "I-1: something that is not complete is being restored");
    Require(a->ns.uid == e.session.uid, "I-38: another identity's step is being restored");
    pins_[e.pin] = ModelPin{e, now_ + pin_ns_};
  } else if (auto it = pins_.find(e.pin); it != pins_.end()) {
    Require(given_back_.contains(e.pin) || gone_.contains(e.session.session) || it->second.expires <= now_,
            "I-17: a pin ended although its reader lives and its time is not over");
    pins_.erase(it);
  }
}

void Model::SessionGone(const Id128& session) { gone_.insert(session); }

void Model::PinUsed(uint64_t pin, Nanos expires) {
  if (auto it = pins_.find(pin); it != pins_.end()) it->second.expires = expires;
}

void Model::WorkerRestarted(Nanos now, Nanos pin_ns) {
  for (auto& [id, pin] : pins_) pin.expires = now + pin_ns;
}

void Model::KeeperLost() {
  generations_.clear();
  attempts_.clear();
  slots_.clear();
  leases_.clear();
  pins_.clear();
  quarantined_.clear();
  checked_.clear();  // Ids begin again.
  promised_.clear();
  given_back_.clear();
}

void Model::ForgetUnmarked(const std::vector<Hash256>& markers) {
  std::erase_if(had_complete_, [&](const NamespaceKey& ns) { return std::find(markers.begin(), markers.end(), MarkerOf(ns.uid, ns.ns)) == markers.end(); });
}

bool Model::Complete(const ModelAttempt& a) const {
  if (!a.manifest || a.tombstone) return false;
  if (a.durable) return a.shards.size() == a.world_size;
  return std::none_of(a.shards.begin(), a.shards.end(), [&](const auto& s) { return quarantined_.contains(s.second.record.Identity()); });
}

const ModelAttempt* Model::Find(const Id128& attempt) const {
  auto it = attempts_.find(attempt);
  return it == attempts_.end() ? nullptr : &it->second;
}

std::vector<const ModelAttempt*> Model::Lineage(const NamespaceKey& ns, bool durable_only) const {
  std::vector<const ModelAttempt*> lineage;
  auto of_ns = generations_.find(ns);
  if (of_ns == generations_.end()) return lineage;
  uint64_t generation = of_ns->second.rbegin()->first, step_max = UINT64_MAX;
  while (true) {
    std::map<uint64_t, const ModelAttempt*, std::greater<>> by_step;  // Of each step the latest try.
    for (const auto& [id, a] : attempts_) {
      if (a.ns != ns || a.key.generation != generation || a.key.step > step_max || !Complete(a) || (durable_only && !a.durable)) continue;
      const ModelAttempt*& best = by_step[a.key.step];
      if (!best || best->key.try_number < a.key.try_number) best = &a;
    }
    for (const auto& [step, a] : by_step) lineage.push_back(a);
    const ledger::Generation* g = FindGeneration(ns, generation);
    if (!g || !g->has_parent) return lineage;
    generation = g->parent_generation;
    step_max = g->parent_step;
  }
}

const ModelAttempt* Model::Latest(const NamespaceKey& ns) const {
  const auto lineage = Lineage(ns);
  return lineage.empty() ? nullptr : lineage.front();
}

StatusCode Model::NothingLeft(const NamespaceKey& ns) const {
  auto of_ns = generations_.find(ns);
  if (of_ns != generations_.end()) {
    // Back to where somebody said that what came before does not count.
    for (auto g = of_ns->second.rbegin(); g != of_ns->second.rend(); ++g) {
      if (g->second.ever_complete || g->second.has_parent) return StatusCode::kLost;
      if (g->second.fresh) return StatusCode::kNotFound;
    }
  }
  return had_complete_.contains(ns) ? StatusCode::kLost : StatusCode::kNotFound;
}

uint64_t Model::CurrentGeneration(const NamespaceKey& ns) const {
  auto of_ns = generations_.find(ns);
  return of_ns == generations_.end() ? 0 : of_ns->second.rbegin()->first;
}

const ledger::Generation* Model::FindGeneration(const NamespaceKey& ns, uint64_t number) const {
  auto of_ns = generations_.find(ns);
  if (of_ns == generations_.end()) return nullptr;
  auto it = of_ns->second.find(number);
  return it == of_ns->second.end() ? nullptr : &it->second;
}

}  // namespace sp::sim
