// The ledger: what every entry does, live and replayed; what a restarted worker makes of what it finds.
#include <algorithm>

#include "base/check.h"
#include "base/plant.h"
#include "node/node_core_impl.h"

namespace sp {

using Severity = action::Log::Severity;

void NodeCore::Impl::Commit(LedgerEntry entry) {
  Apply(entry);
  actions_.push_back(action::Append{std::move(entry)});
}

void NodeCore::Impl::Apply(const LedgerEntry& any) {
  if (const auto* e = std::get_if<ledger::Generation>(&any)) {
    catalog_.AddGeneration(*e);
  } else if (const auto* e = std::get_if<ledger::Slot>(&any)) {
    bool added = pool_.AddSlot(*e);
    if (!added && !pool_.FindSlot(e->slot)) {
      // Only a damaged ledger, or a kill while extents were being dropped, says such a thing. The later entry is right: an extent that it names
      // has left its old slot, whose end is one of the damaged entries.
      for (uint64_t old : pool_.SlotsWith(e->extents)) {
        DropReferencesTo(old);
        pool_.RemoveSlot(old);
      }
      added = pool_.AddSlot(*e);
      if (!added) {
        pool_.MarkLent(*e);
        not_adopted_.push_back(e->slot);
      }
      Log(Severity::kError, added ? "slot_conflict" : "slot_not_adopted", {{"slot", std::to_string(e->slot)}});
    }
    if (!e->session.session.is_zero()) sessions_.try_emplace(e->session.session, Session{e->session, {}, false, false, now_});
  } else if (const auto* e = std::get_if<ledger::SlotGone>(&any)) {
    DropReferencesTo(e->slot);
    pool_.RemoveSlot(e->slot);
  } else if (const auto* e = std::get_if<ledger::Lease>(&any)) {
    const PoolSlot* slot = pool_.FindSlot(e->slot);
    if (!slot || leases_.contains(e->lease)) return;
    DropReferencesTo(e->slot);
    OpenLease lease;
    lease.entry = *e;
    lease.attempt = e->key.AttemptId();
    lease.session = slot->entry.session.session;
    pool_.SetSlotState(e->slot, SlotState::kLeased);
    catalog_.AddAttempt(e->key, e->world_size);
    lease_of_[{lease.attempt, e->rank}] = e->lease;
    if (opened_order_.try_emplace(lease.attempt, opened_count_).second) ++opened_count_;
    leases_[e->lease] = std::move(lease);
  } else if (const auto* e = std::get_if<ledger::LeaseEnded>(&any)) {
    Zombie zombie{e->slot, {}, {}};
    if (auto z = zombies_.find(e->lease); z != zombies_.end()) zombie = z->second;
    if (auto it = leases_.find(e->lease); it != leases_.end()) {
      zombie.ns = {it->second.entry.key.uid, it->second.entry.key.ns};
      zombie.attempt = it->second.attempt;
      lease_of_.erase({it->second.attempt, it->second.entry.rank});
      const Attempt* attempt = catalog_.FindAttempt(zombie.ns, zombie.attempt);
      if (attempt && !attempt->tombstone) half_closed_[zombie.attempt] = zombie.ns;
      leases_.erase(it);
    }
    DropReferencesTo(e->slot);  // Its zombie that has stopped; anything else only after damage.
    pool_.SetSlotState(e->slot, e->writer_may_write ? SlotState::kZombie : SlotState::kIdle);
    if (e->writer_may_write && pool_.FindSlot(e->slot)) zombies_[e->lease] = zombie;
  } else if (const auto* e = std::get_if<ledger::Sealed>(&any)) {
    auto record = SealRecord::Decode(e->record.span());
    if (!record || !pool_.FindSlot(e->slot)) {
      Log(Severity::kError, "seal_not_adopted", {{"slot", std::to_string(e->slot)}, {"why", record ? "its slot is gone" : record.error().message()}});
      return;
    }
    const ShardKey shard{record->attempt, record->rank};
    const Attempt* attempt = catalog_.FindAttempt({record->key.uid, record->key.ns}, record->attempt);
    if (sealed_.contains(shard) || (attempt && attempt->tombstone)) return;  // Again, behind a snapshot that has it already.
    lease_of_.erase(shard);
    if (leases_.erase(e->lease) == 0) DropReferencesTo(e->slot);
    pool_.SetSlotState(e->slot, SlotState::kSealed);
    const Hash256 identity = record->Identity();
    sealed_[shard] = SealedShard{e->slot, e->lease, identity};
    shard_of_record_[identity] = shard;
    if (opened_order_.try_emplace(record->attempt, opened_count_).second) ++opened_count_;
    catalog_.AddRecord(*record);
    catalog_.AddCopyReport(CopyReport{identity, config_.node, config_.boot, true});
  } else if (const auto* e = std::get_if<ledger::Manifest>(&any)) {
    if (auto record = SealRecord::Decode(e->record.span())) {
      catalog_.AddManifest(*record);
      markers_.insert(MarkerOf(record->key.uid, record->key.ns));
    }
  } else if (const auto* e = std::get_if<ledger::Tombstone>(&any)) {
    catalog_.AddTombstone(*e);
    for (auto it = sealed_.lower_bound({e->attempt, 0}); it != sealed_.end() && it->first.first == e->attempt; it = sealed_.erase(it)) {
      shard_of_record_.erase(it->second.record);
      pool_.SetSlotState(it->second.slot, SlotState::kIdle);
    }
    opened_order_.erase(e->attempt);
    half_closed_.erase(e->attempt);
  } else if (const auto* e = std::get_if<ledger::Quarantine>(&any)) {
    catalog_.AddQuarantine(e->record, CopyReport{e->record, config_.node, config_.boot, false});
  } else if (const auto* e = std::get_if<ledger::OperatorPin>(&any)) {
    catalog_.SetOperatorPin(*e);
  } else if (const auto* e = std::get_if<ledger::ReadPin>(&any)) {
    if (e->on) {
      sessions_.try_emplace(e->session.session, Session{e->session, {}, false, false, now_});
      pins_[e->pin] = Pin{*e, {e->session.uid, e->ns}, now_ + config_.pin_ns};
      for (auto it = sealed_.lower_bound({e->attempt, 0}); it != sealed_.end() && it->first.first == e->attempt; ++it) {
        pool_.Lend(pool_.FindSlot(it->second.slot)->entry.extents, e->session.session);
      }
    } else {
      pins_.erase(e->pin);
    }
  } else if (const auto* e = std::get_if<ledger::DurableWish>(&any)) {
    catalog_.SetWish(*e);
  } else if (const auto* e = std::get_if<ledger::StoredShard>(&any)) {
    auto record = SealRecord::Decode(e->record.span());
    const Attempt* attempt = record ? catalog_.FindAttempt({record->key.uid, record->key.ns}, record->attempt) : nullptr;
    if (attempt && (attempt->durable || sealed_.contains({record->attempt, record->rank}))) catalog_.AddStoredShard(*record, e->read_back);
    else if (record) without_slot_[record->attempt].push_back(*e);  // Only while replaying.
  } else if (const auto* e = std::get_if<ledger::StoredManifest>(&any)) {
    if (auto record = SealRecord::Decode(e->record.span())) {
      catalog_.AddStoredManifest(*record);
      if (const auto shards = without_slot_.extract(record->attempt)) {
        for (const ledger::StoredShard& shard : shards.mapped()) Apply(shard);
      }
      markers_.insert(MarkerOf(record->key.uid, record->key.ns));
    }
  } else if (const auto* e = std::get_if<ledger::Evicted>(&any)) {
    for (auto it = sealed_.lower_bound({e->attempt, 0}); it != sealed_.end() && it->first.first == e->attempt; it = sealed_.erase(it)) {
      catalog_.AddCopyReport(CopyReport{it->second.record, config_.node, config_.boot, false});
      shard_of_record_.erase(it->second.record);
      pool_.SetSlotState(it->second.slot, SlotState::kIdle);
    }
    opened_order_.erase(e->attempt);
  }
}

std::vector<Action> NodeCore::Impl::Restore(Nanos now, const Ledger::Contents& contents, const std::vector<uint32_t>& extents) {
  SP_CHECK(connections_.empty() && sealed_.empty());
  now_ = busy_at_ = now;
  actions_.clear();
  const bool first_start = contents.entries.empty() && contents.damaged_entries == 0 && config_.incarnation == 1;
  for (uint32_t id : extents) pool_.AddExtent(id);
  for (const LedgerEntry& entry : contents.entries) Apply(entry);
  for (auto& [id, lease] : leases_) lease.expires = now + config_.lease_ns;
  if (contents.damaged_entries > 0) {
    Log(Severity::kError, "ledger_damaged",
        {{"entries", std::to_string(contents.damaged_entries)}, {"consequence", "extents that no entry explains are replaced"}});
    // Somebody unknown may be able to write to them.
    std::vector<uint32_t> unexplained = pool_.NeverLent();
    for (uint32_t e : unexplained) pool_.RemoveExtent(e);
    if (!unexplained.empty()) actions_.push_back(action::DropExtents{std::move(unexplained)});
  }
  if (!first_start) {
    Log(Severity::kInfo, "readopted",
        {{"sealed_shards", std::to_string(sealed_.size())}, {"open_leases", std::to_string(leases_.size())},
         {"extents", std::to_string(extents.size())}, {"incarnation", std::to_string(config_.incarnation)}});
  }
  for (const auto& [id, lease] : leases_) {
    Log(Severity::kInfo, "open_lease_readopted",
        {{"namespace", lease.entry.key.ns}, {"step", std::to_string(lease.entry.key.step)}, {"rank", std::to_string(lease.entry.rank)},
         {"lease", std::to_string(id)}});
  }
  for (const auto& [id, session] : sessions_) actions_.push_back(action::WatchSession{session.key, 0});
  for (uint64_t slot : not_adopted_) Commit(ledger::SlotGone{slot});
  not_adopted_.clear();
  without_slot_.clear();
  // Slots whose session is not known any more are idle ones of the dead; finish what a kill interrupted.
  std::vector<uint64_t> slots;
  for (const auto& [id, slot] : pool_.slots()) slots.push_back(id);
  for (uint64_t slot : slots) ReleaseSlot(slot);
  std::vector<uint64_t> ended;  // Their attempt was closed, and the kill came before their own end was written.
  for (const auto& [id, lease] : leases_) {
    const Attempt* attempt = catalog_.FindAttempt({lease.entry.key.uid, lease.entry.key.ns}, lease.attempt);
    if (!attempt || attempt->tombstone || attempt->manifest) ended.push_back(id);  // The last: the seal's entry was damaged.
  }
  for (uint64_t lease : ended) EndLease(lease, true);
  for (const auto& [id, ns] : std::map(half_closed_)) CloseAttempt(ns, id, "a lease ended without a seal");
  half_closed_.clear();
  for (const Hash256& marker : markers_) {
    if (std::find(config_.markers.begin(), config_.markers.end(), marker) == config_.markers.end() && !SP_PLANTED(marker_not_rewritten)) {
      actions_.push_back(action::WriteMarker{marker});
    }
  }
  for (const NamespaceKey& ns : catalog_.Namespaces()) {
    for (const Attempt* a : catalog_.Attempts(ns)) {  // First: what is on its way to the store is not retired.
      if (a->WantsDurable() && a->manifest && !SP_PLANTED(drain_not_resumed)) AddDrain(ns, *a);
      if (config_.retain_for > 0 && a->manifest && !a->tombstone) complete_at_[ns][a->key.AttemptId()] = now_;
    }
    for (const Attempt* a : catalog_.OpenAttempts(ns)) {
      const Id128 id = a->key.AttemptId();
      if (const ledger::Generation* g = catalog_.CurrentGeneration(ns); g && a->key.generation < g->generation) {
        CloseAttempt(ns, id, "generation " + std::to_string(a->key.generation) + " was superseded by generation " + std::to_string(g->generation));
        continue;
      }
      // What is too large was sealed under another setting; to read it again could end this worker, too.
      const auto large = std::ranges::find_if(a->records, [&](const auto& r) { return r.second.header_bytes > config_.header_max; });
      if (large != a->records.end()) {
        CloseAttempt(ns, id, "rank " + std::to_string(large->first) + ": " + HeaderTooLarge(large->second.header_bytes, config_.header_max));
        continue;
      }
      TryComplete(ns, id);
    }
    RetireOld(ns);
  }
  PumpDrains();
  catalog_.Trim();
  trim_ = false;
  return std::move(actions_);
}

// The slot goes although something still refers to it: entries in between were damaged.
void NodeCore::Impl::DropReferencesTo(uint64_t slot) {
  const PoolSlot* s = pool_.FindSlot(slot);
  if (!s || s->state == SlotState::kIdle || s->state == SlotState::kPending) return;
  std::erase_if(zombies_, [&](const auto& z) { return z.second.slot == slot; });
  for (auto it = leases_.begin(); it != leases_.end();) {
    if (it->second.entry.slot != slot) {
      ++it;
      continue;
    }
    lease_of_.erase({it->second.attempt, it->second.entry.rank});
    half_closed_[it->second.attempt] = {it->second.entry.key.uid, it->second.entry.key.ns};
    it = leases_.erase(it);
  }
  for (auto it = sealed_.begin(); it != sealed_.end();) {
    if (it->second.slot != slot) {
      ++it;
      continue;
    }
    catalog_.AddCopyReport(CopyReport{it->second.record, config_.node, config_.boot, false});
    for (const NamespaceKey& ns : catalog_.Namespaces()) {
      if (catalog_.FindAttempt(ns, it->first.first)) half_closed_[it->first.first] = ns;
    }
    shard_of_record_.erase(it->second.record);
    it = sealed_.erase(it);
  }
}

void NodeCore::Impl::On(const event::StructureRead& e) {
  const auto reading = reading_.find(e.record);
  if (reading == reading_.end()) return;
  const auto [uid, structure] = reading->second;
  reading_.erase(reading);
  std::vector<std::pair<NamespaceKey, Id128>> open;  // Several may wait for this structure, or for their turn.
  for (const NamespaceKey& ns : catalog_.Namespaces()) {
    if (ns.uid != uid) continue;
    for (const Attempt* a : catalog_.OpenAttempts(ns)) open.emplace_back(ns, a->key.AttemptId());
  }
  if (auto shard = shard_of_record_.find(e.record); shard != shard_of_record_.end()) {
    Status status = e.status;
    if (status.ok() && !e.structure) status = Status(StatusCode::kProtocol, "the structure of the shard could not be read");
    if (status.ok()) status = catalog_.AddStructure(uid, structure, e.structure);
    const auto [id, rank] = shard->second;
    for (const auto& [ns, attempt] : open) {
      if (attempt == id && !status.ok()) CloseAttempt(ns, id, "rank " + std::to_string(rank) + ": " + status.message());
    }
  }
  for (const auto& [ns, attempt] : open) TryComplete(ns, attempt);
}

std::vector<LedgerEntry> NodeCore::Impl::Snapshot() const {
  std::vector<LedgerEntry> out;
  for (const NamespaceKey& ns : catalog_.Namespaces()) {
    for (const ledger::Generation& g : catalog_.Generations(ns)) out.push_back(g);
  }
  // Free extents that were lent: a replay must know under which uid, and to whom if that one lives (a kill came while its slots became another one).
  for (const ledger::Slot& lent : pool_.FreeAsLent()) {
    out.push_back(lent);
    out.push_back(ledger::SlotGone{lent.slot});
  }
  for (const ledger::Slot& dropped : dropped_) {
    out.push_back(dropped);
    out.push_back(ledger::SlotGone{dropped.slot});
  }
  for (const auto& [id, slot] : pool_.slots()) out.push_back(slot.entry);
  for (const auto& [id, zombie] : zombies_) out.push_back(ledger::LeaseEnded{id, zombie.slot, true});
  // In the order in which their attempts began, which replay keeps.
  std::vector<std::pair<uint64_t, ShardKey>> order;
  const auto began = [&](const Id128& attempt) {
    auto o = opened_order_.find(attempt);
    return o == opened_order_.end() ? 0 : o->second;
  };
  for (const auto& [shard, sealed] : sealed_) order.emplace_back(began(shard.first), shard);
  for (const auto& [shard, lease] : lease_of_) order.emplace_back(began(shard.first), shard);
  std::sort(order.begin(), order.end());
  for (const auto& [when, shard] : order) {
    if (auto lease = lease_of_.find(shard); lease != lease_of_.end()) {
      out.push_back(leases_.at(lease->second).entry);
      continue;
    }
    const SealedShard& sealed = sealed_.at(shard);
    for (const NamespaceKey& ns : catalog_.Namespaces()) {
      const Attempt* attempt = catalog_.FindAttempt(ns, shard.first);
      if (!attempt || !attempt->records.contains(shard.second)) continue;
      ledger::Sealed entry{sealed.lease, sealed.slot, {}};
      entry.record.bytes = attempt->records.at(shard.second).Encode();
      out.push_back(entry);
    }
  }
  for (const NamespaceKey& ns : catalog_.Namespaces()) {
    for (const Attempt* a : catalog_.Attempts(ns)) {
      if (a->tombstone) continue;
      if (a->manifest) {
        ledger::Manifest entry;
        entry.record.bytes = a->manifest->Encode();
        out.push_back(entry);
      }
      if (a->wish && !a->durable) out.push_back(*a->wish);  // Else it is granted.
      if (a->durable && !SP_PLANTED(snapshot_drops_stored)) {  // Before its shards, which memory may not have any more.
        ledger::StoredManifest entry;
        entry.record.bytes = a->manifest->Encode();
        out.push_back(entry);
      }
      for (const auto& [rank, record] : a->records) {
        const auto stored = a->stored.find(rank);
        if (stored == a->stored.end() && !a->durable) continue;
        ledger::StoredShard entry;
        entry.read_back = stored != a->stored.end() && stored->second;
        entry.record.bytes = record.Encode();
        out.push_back(entry);
      }
      if (a->operator_pin && !SP_PLANTED(snapshot_drops_pins)) out.push_back(ledger::OperatorPin{ns.uid, ns.ns, a->key.AttemptId(), true});
    }
    for (ledger::Tombstone& t : catalog_.Tombstones(ns)) out.push_back(std::move(t));
  }
  for (const Hash256& record : catalog_.quarantined()) out.push_back(ledger::Quarantine{record, 0});
  for (const auto& [id, pin] : pins_) out.push_back(pin.entry);
  return out;
}

}  // namespace sp
