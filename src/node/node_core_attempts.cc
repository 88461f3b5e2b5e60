// Attempts: completed, closed, retired; and whoever waits for that.
#include <algorithm>

#include "base/plant.h"
#include "format/manifest.h"
#include "format/names.h"
#include "node/node_core_impl.h"

namespace sp {

using Severity = action::Log::Severity;

namespace {
constexpr ptrdiff_t kReadsAtOnce = 16;
}

void NodeCore::Impl::TryComplete(const NamespaceKey& ns, const Id128& id) {
  const Attempt* attempt = catalog_.FindAttempt(ns, id);
  if (!attempt || attempt->manifest || attempt->tombstone) return;
  auto records = catalog_.Completable(ns, id);
  if (!records) {
    if (records.error().code() == StatusCode::kCorrupt) CloseAttempt(ns, id, "it can never be complete: " + records.error().message());
    else ReadMissing(ns, id);
    return;
  }
  const Hash256 marker = MarkerOf(ns.uid, ns.ns);
  const bool first_ever = !markers_.contains(marker);
  ApplyPolicy(ns, *attempt);  // Before: a kill in between forgets nothing, and whoever waits for level durable is not told that nobody wants it.
  ledger::Manifest manifest;
  manifest.record.bytes = ManifestRecord(*records, MakeManifest(*records)).Encode();
  Commit(manifest);
  ++counters_.completed;
  if (config_.retain_for > 0) complete_at_[ns][id] = now_;
  uint64_t bytes = 0;
  for (const SealRecord& r : *records) bytes += r.length_bytes;
  Evidence(Severity::kInfo, "attempt_complete", attempt->key,
           {{"world_size", std::to_string(attempt->world_size)}, {"bytes", std::to_string(bytes)}, {"reached", "memory"},
            {"manifest", attempt->manifest->Identity().ToHex()}});
  if (first_ever) actions_.push_back(action::WriteMarker{marker});
  AnswerWaiters(ns, id);
  // All ranks of this launch have saved, so none of them is still choosing what to restore: what the launch resumed from may go.
  std::erase_if(groups_, [&](const auto& g) { return std::get<0>(g.first) == ns && std::get<1>(g.first) == attempt->key.nonce; });
  CloseOvertaken(ns, *attempt);
  if (attempt->WantsDurable()) AddDrain(ns, *attempt);
  RetireOld(ns);
  PumpDrains();
}

// Structures that were not kept (catalog/structures.h) or are not known since a restart. Few of one user at once: the others' checks wait in the same
// queue. Each answer comes back to TryComplete.
void NodeCore::Impl::ReadMissing(const NamespaceKey& ns, const Id128& id) {
  auto under_way = std::count_if(reading_.begin(), reading_.end(), [&](const auto& r) { return r.second.first == ns.uid; });
  for (const SealRecord& record : catalog_.Unread(ns, id)) {
    const std::pair<uint32_t, Hash256> wanted(ns.uid, record.structure);
    const auto same = [&](const auto& r) { return r.second == wanted; };
    if (std::any_of(reading_.begin(), reading_.end(), same)) continue;
    if (under_way++ >= kReadsAtOnce) return;
    const Hash256 identity = record.Identity();
    reading_[identity] = wanted;
    const PoolSlot* slot = pool_.FindSlot(sealed_.at({id, record.rank}).slot);
    actions_.push_back(action::ReadStructure{identity, slot->entry.extents, record.header_bytes, record.static_offset, record.structure});
  }
}

// An attempt of the same generation that began earlier, and whose missing ranks have no lease on it, will never be whole: those ranks went on.
void NodeCore::Impl::CloseOvertaken(const NamespaceKey& ns, const Attempt& completed) {
  const Id128 completed_id = completed.key.AttemptId();
  for (const Attempt* a : catalog_.OpenAttempts(ns)) {
    const Id128 id = a->key.AttemptId();
    if (a->key.generation != completed.key.generation || opened_order_[id] >= opened_order_[completed_id]) continue;
    std::string missing;
    for (uint32_t rank = 0; rank < a->world_size && missing.empty(); ++rank) {
      if (!a->records.contains(rank) && !lease_of_.contains({id, rank})) missing = std::to_string(rank);
    }
    if (missing.empty()) continue;
    CloseAttempt(ns, id, "rank " + missing + " never sealed it and went on to " + StepText(completed.key));
  }
}

void NodeCore::Impl::CloseAttempt(const NamespaceKey& ns, const Id128& id, const std::string& reason) {
  const Attempt* attempt = catalog_.FindAttempt(ns, id);
  if (!attempt || attempt->tombstone || attempt->manifest) return;
  std::vector<uint64_t> slots;
  for (const auto& [rank, record] : attempt->records) {
    if (auto s = sealed_.find({id, rank}); s != sealed_.end()) slots.push_back(s->second.slot);
  }
  std::vector<uint64_t> leases;
  for (auto it = lease_of_.lower_bound({id, 0}); it != lease_of_.end() && it->first.first == id; ++it) leases.push_back(it->second);
  Commit(ledger::Tombstone{ns.uid, ns.ns, id, ledger::TombstoneWhy::kClosed, reason.substr(0, 400)});
  if (SP_PLANTED(tombstone_forgotten)) actions_.pop_back();
  trim_ = true;
  ++counters_.closed;
  Evidence(Severity::kWarning, "attempt_closed", attempt->key, {{"why", reason}});
  // The writers have not promised to stop: their slots stay theirs until they do, or die (F5).
  for (uint64_t lease : leases) EndLease(lease, IsAlive(leases_.at(lease).session));
  for (uint64_t slot : slots) ReleaseSlot(slot);
  AnswerWaiters(ns, id);
}

std::optional<std::pair<Status, Level>> NodeCore::Impl::WaitOutcome(const NamespaceKey& ns, const WaitRequest& r) const {
  const Attempt* attempt = catalog_.FindAttempt(ns, r.attempt);
  if (!attempt) return std::nullopt;
  switch (catalog_.StateOf(*attempt)) {
    case AttemptState::kOpen: return std::nullopt;
    case AttemptState::kComplete:
      if (catalog_.LevelOf(*attempt) < r.level) {
        if (r.level != Level::kDurable || attempt->WantsDurable()) return std::nullopt;
        if (!attempt->wish) {
          return std::pair(Status(StatusCode::kInvalidArgument, StepText(attempt->key) + " was not asked to be durable: save it with durable=True"),
                           Level::kNone);
        }
        return std::pair(Status(StatusCode::kClosed, StepText(attempt->key) + " was not made durable: " + attempt->wish->reason), Level::kNone);
      }
      return std::pair(Status(), catalog_.LevelOf(*attempt));
    case AttemptState::kRetired:
      if (r.level != Level::kDurable) return std::pair(Status(), Level::kNone);
      if (attempt->durable) return std::pair(Status(), Level::kDurable);  // The store has it, or had it until its rule let go.
      return std::pair(Status(StatusCode::kClosed, "the step was retired before it was durable"), Level::kNone);
    case AttemptState::kCorrupt:
      return std::pair(Status(StatusCode::kCorrupt, StepText(attempt->key) + ": " + catalog_.InfoOf(*attempt).reason), Level::kNone);
    case AttemptState::kClosed: break;
  }
  return std::pair(Status(WasFenced(ns, *attempt) ? StatusCode::kFenced : StatusCode::kClosed, StepText(attempt->key) + " was closed: " + attempt->tombstone->reason),
                   Level::kNone);
}

void NodeCore::Impl::AnswerWaiters(const NamespaceKey& ns, const Id128& id) {
  for (size_t i = 0; i < waiters_.size();) {
    const Waiter& w = waiters_[i];
    std::optional<std::pair<Status, Level>> outcome;
    if (w.ns == ns && w.request.attempt == id) outcome = WaitOutcome(ns, w.request);
    if (!outcome) {
      ++i;
      continue;
    }
    if (outcome->first.ok()) Send(w.connection, MakeFrame(MessageType::kWait, w.request_id, WaitReply{outcome->second}));
    else SendError(w.connection, MessageType::kWait, w.request_id, outcome->first);
    waiters_.erase(waiters_.begin() + static_cast<ptrdiff_t>(i));
  }
}

Status NodeCore::Impl::Wait(ConnectionId c, const Frame& f) {
  SP_ASSIGN_OR_RETURN(auto r, Decode<WaitRequest>(f.body));
  SP_RETURN_IF_ERROR(CheckNamespace(r.ns));
  const NamespaceKey ns{SessionOf(c)->key.uid, r.ns};
  if (r.level > Level::kMemory && (r.level != Level::kDurable || config_.store.empty())) {
    return Status(StatusCode::kInvalidArgument, "level " + std::string(LevelName(r.level)) + " cannot be reached: this daemon has no " +
                                                    (r.level == Level::kReplicated ? "peers to replicate to" : "durable tier (setting store)"));
  }
  if (auto outcome = WaitOutcome(ns, r)) {
    if (!outcome->first.ok()) return outcome->first;
    return Reply(c, f, WaitReply{outcome->second});
  }
  if (!catalog_.FindAttempt(ns, r.attempt)) return Status(StatusCode::kNotFound, "namespace " + r.ns + " has no such attempt");
  const auto of_uid = std::count_if(waiters_.begin(), waiters_.end(), [&](const Waiter& w) { return w.ns.uid == ns.uid; });
  if (static_cast<uint32_t>(of_uid) >= config_.connections_per_uid_max * 4) return Status(StatusCode::kLimit, "too many calls are waiting");
  waiters_.push_back(Waiter{c, f.request_id, ns, r, Until(now_, r.timeout_ns)});
  return Status();
}

}  // namespace sp
