// The durable tier: what was asked to be durable, on its way to the store; and what a node whose memory is new finds there.
//
// A drain, and what a SIGKILL of this worker leaves behind between any two steps:
//   wish       DurableWish is in the ledger before the reply: the restarted worker goes on with it.
//   shard      its objects are written and confirmed, then StoredShard: a restarted worker writes it again, finds it there, and confirms it.
//   manifest   created when all shards are confirmed, then StoredManifest: a restarted worker creates it again and finds its own.
//   evict      Evicted first (readers are sent to the store), then the slots go back.
// Trouble with the store is told once per interval and tried again later; it holds up nothing but the drain (I-22).
#include <algorithm>

#include "base/plant.h"
#include "format/manifest.h"
#include "format/names.h"
#include "node/node_core_impl.h"

namespace sp {

using Severity = action::Log::Severity;

namespace {
constexpr Nanos kRetryFirst = kNanosPerSecond;
constexpr Nanos kRetryMost = 60 * kNanosPerSecond;
constexpr Nanos kTellEvery = 60 * kNanosPerSecond;
constexpr size_t kUnansweredMax = 4096;
constexpr size_t kStoredKept = 64;  // Durable steps of one namespace that are listed after memory let go of them; the store keeps all.

// Doubled with every failure, and spread by a quarter so that many nodes do not come back at once. Pure: by the attempt's id.
Nanos RetryDelay(const Id128& id, uint32_t failures) {
  const Nanos base = std::min(kRetryMost, kRetryFirst << std::min<uint32_t>(failures - 1, 6));
  return base - base / 4 * (id.bytes[failures % id.bytes.size()] % 16) / 16;
}
}  // namespace

Status NodeCore::Impl::MakeDurable(ConnectionId c, const Frame& f) {
  SP_ASSIGN_OR_RETURN(auto r, Decode<MakeDurableRequest>(f.body));
  SP_RETURN_IF_ERROR(CheckNamespace(r.ns));
  if (config_.store.empty()) {
    return Status(StatusCode::kUnavailable, "this daemon has no durable tier: start it with the setting store, e.g. store = \"file:///mnt/checkpoints\"");
  }
  const NamespaceKey ns{SessionOf(c)->key.uid, r.ns};
  const Attempt* attempt = catalog_.FindAttempt(ns, r.attempt);
  if (!attempt) return Status(StatusCode::kNotFound, "namespace " + r.ns + " has no such attempt");
  if (attempt->tombstone) {
    return Status(StatusCode::kClosed, (attempt->key.ns.empty() ? "the attempt" : StepText(attempt->key)) + " is closed: " + attempt->tombstone->reason);
  }
  WantDurable(ns, r.attempt, "asked for");
  PumpDrains();
  return Reply(c, f, Empty{});
}

void NodeCore::Impl::WantDurable(const NamespaceKey& ns, const Id128& id, const std::string& why) {
  const Attempt* attempt = catalog_.FindAttempt(ns, id);
  if (attempt->durable || attempt->WantsDurable()) return;
  Evidence(Severity::kInfo, "durable_wanted", attempt->key, {{"why", why}});
  Commit(ledger::DurableWish{ns.uid, ns.ns, id, true, ""});
  if (attempt->manifest) AddDrain(ns, *attempt);
}

void NodeCore::Impl::ApplyPolicy(const NamespaceKey& ns, const Attempt& completed) {
  if (config_.store.empty()) return;
  const Id128 id = completed.key.AttemptId();
  const auto last = durable_at_.find(ns);
  if (config_.durable_every > 0 && completed.key.step % config_.durable_every == 0) {
    WantDurable(ns, id, "every " + std::to_string(config_.durable_every) + " steps");
  } else if (config_.durable_interval > 0 && (last == durable_at_.end() || now_ >= last->second + config_.durable_interval)) {
    WantDurable(ns, id, "every " + std::to_string(config_.durable_interval / kNanosPerSecond) + " s");
  }
  if (completed.WantsDurable()) durable_at_[ns] = now_;
}

void NodeCore::Impl::AddDrain(const NamespaceKey& ns, const Attempt& attempt) {
  if (config_.store.empty()) return;  // It was configured when the wish was made.
  auto [it, inserted] = drains_.try_emplace(attempt.key.AttemptId());
  if (!inserted) return;
  it->second.ns = ns;
  it->second.began = now_;
}

// Starts what may start: oldest attempts first, a bounded number of shards at once over all of them.
void NodeCore::Impl::PumpDrains() {
  size_t under_way = 0;
  std::vector<std::pair<std::tuple<uint64_t, uint64_t>, Id128>> order;
  std::vector<std::pair<Id128, std::string>> gone;
  for (const auto& [id, drain] : drains_) {
    under_way += drain.under_way.size();
    const Attempt* attempt = catalog_.FindAttempt(drain.ns, id);
    const auto there = [&](const auto& r) { return attempt->stored.contains(r.first) || sealed_.contains({id, r.first}); };
    if (!attempt || attempt->tombstone || !attempt->manifest || !std::ranges::all_of(attempt->records, there)) {
      gone.emplace_back(id, "this node's memory does not have the whole step any more");
      continue;
    }
    order.emplace_back(std::tuple(attempt->key.generation, attempt->key.step), id);
  }
  for (const auto& [id, why] : gone) {
    if (catalog_.FindAttempt(drains_.at(id).ns, id)) GiveUpDrain(id, why);
    else drains_.erase(id);
  }
  std::sort(order.begin(), order.end());
  for (const auto& [key, id] : order) {
    Drain& drain = drains_.at(id);
    const Attempt* attempt = catalog_.FindAttempt(drain.ns, id);
    if (drain.retry_at > now_ || drain.manifest_under_way) continue;
    for (const auto& [rank, record] : attempt->records) {
      if (under_way >= config_.drains_max) break;
      if (attempt->stored.contains(rank) || drain.under_way.contains(rank)) continue;
      drain.under_way[rank] = 0;
      ++under_way;
      actions_.push_back(action::StoreShard{record, pool_.FindSlot(sealed_.at({id, rank}).slot)->entry.extents});
    }
    if (attempt->stored.size() < attempt->world_size || !drain.under_way.empty()) continue;
    drain.manifest_under_way = true;
    StoredStep step;
    for (const auto& [rank, record] : attempt->records) step.records.push_back(record);
    step.lineage = catalog_.Ancestry(drain.ns, attempt->key.generation);
    actions_.push_back(action::StoreManifest{id, std::move(step)});
  }
}

void NodeCore::Impl::On(const event::ShardProgress& e) {
  const auto shard = shard_of_record_.find(e.record);
  if (shard == shard_of_record_.end()) return;
  const auto drain = drains_.find(shard->second.first);
  if (drain == drains_.end()) return;
  if (auto rank = drain->second.under_way.find(shard->second.second); rank != drain->second.under_way.end()) rank->second = e.bytes;
}

void NodeCore::Impl::On(const event::ShardStored& e) {
  const auto shard = shard_of_record_.find(e.record);
  if (shard == shard_of_record_.end()) return PumpDrains();  // Its memory was damaged or given up meanwhile.
  const auto [id, rank] = shard->second;
  const auto it = drains_.find(id);
  if (it == drains_.end() || it->second.under_way.erase(rank) == 0) return PumpDrains();
  if (!e.status.ok()) {
    DrainFailed(id, "the shard of rank " + std::to_string(rank), e.status);
    return PumpDrains();
  }
  Drain& drain = it->second;
  drain.failures = 0;
  drain.retry_at = 0;
  drain.last = Status();
  const Attempt* attempt = catalog_.FindAttempt(drain.ns, id);
  ledger::StoredShard entry;
  entry.record.bytes = attempt->records.at(rank).Encode();
  entry.read_back = e.read_back;
  Commit(entry);
  counters_.drain_bytes += attempt->records.at(rank).length_bytes;
  Evidence(Severity::kInfo, "shard_stored", attempt->key, {{"rank", std::to_string(rank)}, {"record", e.record.ToHex()},
                                                                 {"confirmed_by", e.read_back ? "reading it back" : "the store"}});
  PumpDrains();
}

void NodeCore::Impl::On(const event::ManifestStored& e) {
  const auto it = drains_.find(e.attempt);
  if (it == drains_.end()) return PumpDrains();
  it->second.manifest_under_way = false;
  if (!e.status.ok() && !SP_PLANTED(durable_unconfirmed)) {
    DrainFailed(e.attempt, "the manifest", e.status);
    return PumpDrains();
  }
  const NamespaceKey ns = it->second.ns;
  const Nanos began = it->second.began;
  const Attempt* attempt = catalog_.FindAttempt(ns, e.attempt);
  drains_.erase(it);
  ledger::StoredManifest entry;
  entry.record.bytes = attempt->manifest->Encode();
  Commit(entry);
  ++counters_.durable;
  busy_at_ = now_;
  Evidence(Severity::kInfo, "attempt_durable", attempt->key,
           {{"reached", "durable"}, {"store", config_.store}, {"ms", std::to_string((now_ - began) / kNanosPerMilli)}});
  AnswerWaiters(ns, e.attempt);
  RetireOld(ns);
  PumpDrains();
  EndIfDrained();
}

void NodeCore::Impl::DrainFailed(const Id128& id, const std::string& what, const Status& why) {
  Drain& drain = drains_.at(id);
  ++counters_.drain_failures;
  ++drain.failures;
  drain.last = why;
  // What does not match cannot be mended by sending it again, and nothing is ever overwritten.
  if (why.code() == StatusCode::kCorrupt) return GiveUpDrain(id, what + ": " + why.message());
  drain.retry_at = now_ + RetryDelay(id, drain.failures);
  if (drain_told_at_ != 0 && now_ < drain_told_at_ + kTellEvery) return;
  drain_told_at_ = now_;
  const Attempt* attempt = catalog_.FindAttempt(drain.ns, id);
  Log(Severity::kWarning, "drain_in_trouble",
      {{"namespace", drain.ns.ns}, {"step", std::to_string(attempt->key.step)}, {"what", what}, {"store", config_.store}, {"why", why.ToString()},
       {"failures", std::to_string(drain.failures)}, {"again_in_ms", std::to_string((drain.retry_at - now_) / kNanosPerMilli)},
       {"steps_waiting", std::to_string(drains_.size())}});
}

void NodeCore::Impl::GiveUpDrain(const Id128& id, const std::string& why) {
  const NamespaceKey ns = drains_.at(id).ns;
  drains_.erase(id);
  const Attempt* attempt = catalog_.FindAttempt(ns, id);
  Evidence(Severity::kError, "durable_given_up", attempt->key, {{"why", why}});
  Commit(ledger::DurableWish{ns.uid, ns.ns, id, false, why.substr(0, 400)});
  busy_at_ = now_;
  AnswerWaiters(ns, id);
  RetireOld(ns);
  EndIfDrained();
}

// A save that finds no memory because steps wait for a store that does not take them: the save goes first (I-22). While the store takes them, the
// step on its way there does (F70), which lasts a bounded time.
bool NodeCore::Impl::DrainGivesWay(uint32_t uid) {
  for (const auto& [id, drain] : drains_) {
    if (drain.failures == 0 || drain.ns.uid != uid || !drain.under_way.empty() || drain.manifest_under_way) continue;
    std::set<Id128> pinned = PinnedAttempts(drain.ns);
    pinned.erase(id);
    const auto retirable = catalog_.Retirable(drain.ns, config_.retain, pinned);
    const auto goes = [&](const Attempt* a) { return a->key.AttemptId() == id; };
    if (std::ranges::none_of(retirable, goes)) continue;
    GiveUpDrain(id, "memory was needed for a newer step, and the store was in trouble: " + drain.last.message());
    return true;
  }
  return false;
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
  std::vector<Id128> stored;  // Newest first.
  for (const Attempt* a : catalog_.Attempts(ns)) {
    if (a->durable && !catalog_.IsHeld(*a)) stored.push_back(a->key.AttemptId());
  }
  for (size_t i = kStoredKept; i < stored.size(); ++i) {
    Commit(ledger::Tombstone{ns.uid, ns.ns, stored[i], ledger::TombstoneWhy::kRetired, "forgotten here; the store still has it"});
  }
}

bool NodeCore::Impl::NeedsListing(const NamespaceKey& ns) const {
  return !config_.store.empty() && !listed_ && !catalog_.CurrentGeneration(ns) && !SP_PLANTED(store_not_asked);
}

Status NodeCore::Impl::AnswerLater(ConnectionId c, const Frame& f) {
  if (!listing_failed_.ok()) {
    const Status why = listing_failed_;
    if (!listing_ && now_ >= list_again_at_) {
      listing_ = true;
      actions_.push_back(action::ListStore{});
    }
    return Status(StatusCode::kUnavailable, "this namespace is not in the daemon's memory, and the durable tier could not be asked whether it has steps of it: " +
                                                why.message());
  }
  if (unanswered_.size() >= kUnansweredMax) return Status(StatusCode::kLimit, "too many calls wait for the durable tier to be listed");
  unanswered_.emplace_back(c, f);
  return Status();
}

void NodeCore::Impl::On(const event::StoreListed& e) {
  listing_ = false;
  listing_failed_ = e.status;
  if (e.status.ok()) {
    listed_ = true;
    std::set<NamespaceKey> known;  // Before: what memory knows is newer than what the store knows.
    for (const NamespaceKey& ns : catalog_.Namespaces()) {
      if (catalog_.CurrentGeneration(ns)) known.insert(ns);
    }
    size_t found = 0;
    for (const StoredStep& step : e.steps) {
      const AttemptKey& key = step.records.front().key;
      if (known.contains({key.uid, key.ns})) continue;
      for (const ledger::Generation& g : step.lineage) Commit(g);
      ledger::StoredManifest manifest;
      manifest.record.bytes = ManifestRecord(step.records, MakeManifest(step.records)).Encode();
      Commit(manifest);
      for (const SealRecord& record : step.records) {
        ledger::StoredShard shard;
        shard.record.bytes = record.Encode();
        shard.read_back = true;  // Whatever it was when it was written: nothing is read from it unverified.
        Commit(shard);
      }
      ++found;
    }
    Log(Severity::kInfo, "store_listed", {{"store", config_.store}, {"steps", std::to_string(e.steps.size())}, {"not_in_memory", std::to_string(found)}});
  } else {
    list_again_at_ = now_ + kRetryFirst;
    if (list_told_at_ == 0 || now_ >= list_told_at_ + kTellEvery) {
      list_told_at_ = now_;
      Log(Severity::kWarning, "store_not_listed", {{"store", config_.store}, {"why", e.status.ToString()}});
    }
  }
  std::vector<std::pair<ConnectionId, Frame>> waiting;
  waiting.swap(unanswered_);
  for (auto& [connection, frame] : waiting) On(event::Received{connection, std::move(frame)});
}

void NodeCore::Impl::EndIfDrained() {
  if (!stopping_ || exit_asked_ || !drains_.empty()) return;
  exit_asked_ = true;
  actions_.push_back(action::ExitDaemon{"asked to stop"});
}

}  // namespace sp
