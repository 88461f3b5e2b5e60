// The status reply (docs/operating/status.md). An identity sees its own namespaces only.
#include <nlohmann/json.hpp>

#include "node/node_core_impl.h"

namespace sp {

using Json = nlohmann::ordered_json;

Status NodeCore::Impl::StatusOf(ConnectionId c, const Frame& f) {
  return Reply(c, f, StatusReply{StatusJson(now_, SessionOf(c)->key.uid, false)});
}

Status NodeCore::Impl::CheckInvariants() const {
  SP_RETURN_IF_ERROR(pool_.CheckInvariants());
  const auto broken = [](const std::string& what, uint64_t id) { return Status(StatusCode::kInternal, what + " " + std::to_string(id)); };
  std::map<uint64_t, SlotState> used;
  const auto use = [&](uint64_t slot, SlotState state) {
    const PoolSlot* s = pool_.FindSlot(slot);
    return s && s->state == state && used.emplace(slot, state).second;
  };
  for (const auto& [id, lease] : leases_) {
    if (!use(lease.entry.slot, SlotState::kLeased)) return broken("a lease without a slot of its own:", id);
    auto back = lease_of_.find({lease.attempt, lease.entry.rank});
    if (back == lease_of_.end() || back->second != id) return broken("a lease that its shard does not know:", id);
    if (!IsAlive(lease.session)) return broken("a lease of a session that is gone:", id);
    const Attempt* attempt = catalog_.FindAttempt({lease.entry.key.uid, lease.entry.key.ns}, lease.attempt);
    if (!attempt || attempt->tombstone || attempt->manifest) return broken("a lease of an attempt that is not open:", id);
  }
  if (lease_of_.size() != leases_.size()) return broken("shards being written without a lease:", lease_of_.size());
  for (const auto& [id, zombie] : zombies_) {
    if (!use(zombie.slot, SlotState::kZombie)) return broken("a zombie without a slot of its own:", id);
  }
  for (const auto& [shard, sealed] : sealed_) {
    if (!use(sealed.slot, SlotState::kSealed)) return broken("a sealed shard without a slot of its own:", sealed.slot);
    auto back = shard_of_record_.find(sealed.record);
    if (back == shard_of_record_.end() || back->second != shard) return broken("a sealed shard that its record does not know:", sealed.slot);
  }
  for (const auto& [id, slot] : pool_.slots()) {
    if (slot.state != SlotState::kIdle && slot.state != SlotState::kPending && !used.contains(id)) return broken("a slot in use by nothing:", id);
    if (slot.state == SlotState::kIdle && !IsAlive(slot.entry.session.session)) return broken("an idle slot of a session that is gone:", id);
  }
  for (const auto& [id, drain] : drains_) {
    const Attempt* attempt = catalog_.FindAttempt(drain.ns, id);
    if (!attempt || !attempt->manifest || !attempt->WantsDurable()) return broken("a drain of a step that nobody wants durable:", drain.failures);
  }
  if (!half_closed_.empty()) return broken("attempts that lost a lease and are not closed:", half_closed_.size());
  return Status();
}

std::string NodeCore::Impl::StatusJson(Nanos now, uint32_t uid, bool all_uids) const {
  const Pool::Totals t = pool_.totals();
  const uint64_t e = config_.extent_bytes;
  Json j;
  j["version"] = config_.version;
  j["node"] = config_.node.ToHex();
  j["boot"] = config_.boot.ToHex();
  j["incarnation"] = config_.incarnation;
  j["pid"] = config_.daemon_pid;
  j["private"] = config_.is_private;
  j["retain"] = MostRetained();
  j["pool"] = {{"extent_bytes", e},          {"bytes_max", e * config_.extents_max}, {"bytes", e * t.extents},     {"creating", e * t.creating},
               {"free", e * t.free},         {"pending", e * t.pending},             {"idle", e * t.idle},         {"leased", e * t.leased},
               {"sealed", e * t.sealed},     {"zombie", e * t.zombie}};
  j["connections"] = connections_.size();
  j["sessions"] = sessions_.size();
  j["read_pins"] = pins_.size();
  j["totals"] = {{"seals", counters_.seals},     {"completed", counters_.completed},     {"retired", counters_.retired},
                 {"closed", counters_.closed},   {"quarantined", counters_.quarantined}, {"refused", counters_.refused},
                 {"open_leases", leases_.size()}, {"sealed_shards", sealed_.size()}};
  j["durable"] = Json();
  if (!config_.store.empty()) {
    const auto troubled = std::ranges::count_if(drains_, [this, now](const auto& d) { return IsInTrouble(d.second, now); });
    j["durable"] = {{"store", config_.store}, {"steps_waiting", drains_.size()}, {"steps_in_trouble", troubled}, {"completed", counters_.durable},
                    {"failures", counters_.drain_failures}, {"bytes", counters_.drain_bytes}, {"deleted", counters_.stored_deleted}};
  }
  if (all_uids) {  // Totals only: names belong to their tenants (I-38).
    uint64_t open = 0, complete = 0, durable = 0, corrupt = 0;
    for (const NamespaceKey& ns : catalog_.Namespaces()) {
      for (const Attempt* a : catalog_.Attempts(ns)) {
        const AttemptState s = catalog_.StateOf(*a);
        open += s == AttemptState::kOpen;
        complete += s == AttemptState::kComplete;
        durable += s == AttemptState::kComplete && a->durable;
        corrupt += s == AttemptState::kCorrupt;
      }
    }
    j["attempts"] = {{"open", open}, {"complete", complete}, {"durable", durable}, {"corrupt", corrupt}};
    return j.dump();
  }
  j["drains"] = Json::array();
  for (const auto& [id, drain] : drains_) {
    const Attempt* attempt = catalog_.FindAttempt(drain.ns, id);
    if (drain.ns.uid != uid || !attempt || j["drains"].size() >= 64) continue;
    uint64_t bytes = 0, done = 0;
    for (const auto& [rank, record] : attempt->records) {
      bytes += record.length_bytes;
      const auto on_its_way = drain.under_way.find(rank);
      done += attempt->stored.contains(rank) ? record.length_bytes : on_its_way == drain.under_way.end() ? 0 : on_its_way->second;
    }
    j["drains"].push_back({{"namespace", drain.ns.ns}, {"step", attempt->key.step}, {"attempt", id.ToHex()}, {"bytes", bytes}, {"bytes_done", done},
                           {"seconds", static_cast<double>(now - drain.began) / kNanosPerSecond}, {"failures", drain.failures},
                           {"trouble", TroubleOf(drain, now)},
                           {"again_in_ms", drain.retry_at > now ? (drain.retry_at - now) / kNanosPerMilli : 0}});
  }
  j["not_listed"] = Json::array();
  for (const auto& [ns, listing] : listings_) {
    if (ns.uid != uid || listing.status.ok() || j["not_listed"].size() >= 64) continue;
    j["not_listed"].push_back({{"namespace", ns.ns}, {"why", listing.status.ToString()}});
  }
  j["leases"] = Json::array();
  for (const auto& [id, lease] : leases_) {
    if (lease.entry.key.uid != uid || j["leases"].size() >= 64) continue;
    auto session = sessions_.find(lease.session);
    j["leases"].push_back({{"lease", id},
                           {"namespace", lease.entry.key.ns},
                           {"generation", lease.entry.key.generation},
                           {"step", lease.entry.key.step},
                           {"rank", lease.entry.rank},
                           {"pid", session == sessions_.end() ? 0 : session->second.key.pid},
                           {"expires_ms", (lease.expires - now) / kNanosPerMilli}});
  }
  j["namespaces"] = Json::array();
  for (const NamespaceKey& ns : catalog_.Namespaces()) {
    const ledger::Generation* g = catalog_.CurrentGeneration(ns);
    if (ns.uid != uid || !g || j["namespaces"].size() >= 64) continue;
    const auto lineage = catalog_.Lineage(ns, Level::kMemory);
    Json n = {{"namespace", ns.ns}, {"generation", g->generation}, {"world_size", g->world_size}, {"complete_steps", lineage.size()},
              {"open_attempts", catalog_.OpenAttempts(ns).size()}};
    n["latest_step"] = lineage.empty() ? Json() : Json(lineage.front()->key.step);
    j["namespaces"].push_back(std::move(n));
  }
  return j.dump();
}

}  // namespace sp
