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
constexpr Nanos kStalled = 30 * kNanosPerSecond;  // Nothing arrives for so long: the store is in trouble, whatever it says later.
constexpr uint32_t kMismatchesMax = 3;            // In a row: it is not what happened on the way.
constexpr size_t kListingsKept = 256;  // Of one user.
constexpr Nanos kListingHolds = kNanosPerSecond;     // For the ranks that ask at the same time.
constexpr Nanos kAnswerWithin = 20 * kNanosPerSecond;  // Clients give up after 30 s.

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

std::string NodeCore::Impl::PolicyFor(const NamespaceKey& ns, const Attempt& attempt) const {
  if (config_.store.empty()) return "";
  if (config_.durable_every > 0 && attempt.key.step % config_.durable_every == 0) return "every " + std::to_string(config_.durable_every) + " steps";
  const auto last = durable_at_.find(ns);
  const bool due = config_.durable_interval > 0 && (last == durable_at_.end() || now_ >= last->second + config_.durable_interval);
  return due ? "every " + std::to_string(config_.durable_interval / kNanosPerSecond) + " s" : "";
}

void NodeCore::Impl::ApplyPolicy(const NamespaceKey& ns, const Attempt& completed) {
  if (config_.store.empty()) return;
  if (const std::string why = PolicyFor(ns, completed); !why.empty()) WantDurable(ns, completed.key.AttemptId(), why);
  if (completed.WantsDurable()) durable_at_[ns] = now_;
}

void NodeCore::Impl::AddDrain(const NamespaceKey& ns, const Attempt& attempt) {
  if (config_.store.empty()) return;  // It was configured when the wish was made.
  auto [it, inserted] = drains_.try_emplace(attempt.key.AttemptId());
  if (!inserted) return;
  it->second.ns = ns;
  it->second.began = it->second.progressed_at = now_;
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
    const bool whole = attempt && attempt->manifest && !attempt->tombstone && !attempt->conflicting && attempt->records.size() == attempt->world_size;
    if (!whole || attempt->durable || !std::ranges::all_of(attempt->records, there)) {
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
    if (drain.retry_at > now_) continue;
    drain.retry_at = 0;
    if (drain.manifest_under_way) continue;
    for (const auto& [rank, record] : attempt->records) {
      if (under_way >= config_.drains_max) break;
      if (attempt->stored.contains(rank) || drain.under_way.contains(rank)) continue;
      drain.under_way[rank] = 0;
      drain.progressed_at = now_;
      ++under_way;
      actions_.push_back(action::StoreShard{record, pool_.FindSlot(sealed_.at({id, rank}).slot)->entry.extents});
    }
    const bool confirmed = attempt->stored.size() == attempt->world_size && drain.under_way.empty();
    if (!confirmed && !SP_PLANTED(manifest_before_shards)) continue;
    drain.manifest_under_way = true;
    drain.progressed_at = now_;
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
  const auto rank = drain->second.under_way.find(shard->second.second);
  if (rank == drain->second.under_way.end() || (rank->second == e.bytes && !e.alive)) return;
  rank->second = e.bytes;
  drain->second.progressed_at = now_;
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
  drain.failures = drain.mismatches = 0;
  drain.retry_at = 0;
  drain.progressed_at = now_;
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
  if (e.status.code() == StatusCode::kIncomplete) {  // What was confirmed is gone, deleted by somebody: it is not sent a second time.
    GiveUpDrain(e.attempt, "the manifest: " + e.status.message());
    return PumpDrains();
  }
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
  WantRetention(ns);
  PumpRetention();
  PumpDrains();
}

void NodeCore::Impl::DrainFailed(const Id128& id, const std::string& what, const Status& why) {
  Drain& drain = drains_.at(id);
  ++counters_.drain_failures;
  ++drain.failures;
  drain.last = why;
  // What was damaged on its way is mended by sending it again. What is damaged in memory or in the store is not, and nothing is ever overwritten.
  drain.mismatches = why.code() == StatusCode::kCorrupt ? drain.mismatches + 1 : 0;
  if (drain.mismatches >= kMismatchesMax) return GiveUpDrain(id, what + ": " + why.message());
  drain.retry_at = now_ + RetryDelay(id, drain.failures);
  if (drain_told_at_ != 0 && now_ < drain_told_at_ + kTellEvery) return;
  drain_told_at_ = now_;
  const Attempt* attempt = catalog_.FindAttempt(drain.ns, id);
  Log(Severity::kWarning, "drain_in_trouble",
      {{"namespace", drain.ns.ns}, {"step", std::to_string(attempt->key.step)}, {"what", what}, {"store", config_.store}, {"why", why.ToString()},
       {"failures", std::to_string(drain.failures)}, {"again_in_ms", std::to_string((drain.retry_at - now_) / kNanosPerMilli)},
       {"steps_waiting", std::to_string(drains_.size())}});
}

void NodeCore::Impl::GiveUpDrain(Id128 id, const std::string& why) {
  const NamespaceKey ns = drains_.at(id).ns;
  drains_.erase(id);
  const Attempt* attempt = catalog_.FindAttempt(ns, id);
  Evidence(Severity::kError, "durable_given_up", attempt->key, {{"why", why}});
  Commit(ledger::DurableWish{ns.uid, ns.ns, id, false, why.substr(0, 400)});
  busy_at_ = now_;
  AnswerWaiters(ns, id);
  RetireOld(ns);
}

bool NodeCore::Impl::IsInTrouble(const Drain& drain, Nanos now) const {
  const bool sent = !drain.under_way.empty() || drain.manifest_under_way;
  return drain.failures > 0 || (sent && now >= drain.progressed_at + kStalled);
}

std::string NodeCore::Impl::TroubleOf(const Drain& drain, Nanos now) const {
  if (!drain.last.ok()) return drain.last.ToString();
  if (!IsInTrouble(drain, now)) return "";
  return "nothing has arrived there for " + std::to_string((now - drain.progressed_at) / kNanosPerSecond) + " s";
}

// The memory of this attempt is, or would be, something that the session can have: its own, or that of the dead (I-10).
bool NodeCore::Impl::MemoryHelps(const Id128& attempt, const SessionKey& session) const {
  for (auto it = sealed_.lower_bound({attempt, 0}); it != sealed_.end() && it->first.first == attempt; ++it) {
    const Id128& owner = pool_.FindSlot(it->second.slot)->entry.session.session;
    if (owner == session.session || !IsAlive(owner)) return true;
  }
  return false;
}

// A save that finds no memory because steps wait for a store that does not take them: the save goes first (I-22). While the store takes them, the
// step on its way there does (F70), which lasts a bounded time. Of a shard that is being sent every block is compared before it goes, so its memory may
// be used for something else meanwhile.
bool NodeCore::Impl::DrainGivesWay(const SessionKey& session) {
  for (const auto& [waiting, drain] : drains_) {
    if (drain.ns.uid != session.uid || !IsInTrouble(drain, now_) || SP_PLANTED(save_waits_for_store)) continue;
    const NamespaceKey ns = drain.ns;  // Copies: the entry goes.
    const Id128 id = waiting;
    const auto retirable = catalog_.Retirable(ns, config_.retain, AttemptsBeingRead(ns));
    const auto goes = [&](const Attempt* a) { return a->key.AttemptId() == id; };
    if (!MemoryHelps(id, session) || std::ranges::none_of(retirable, goes)) continue;
    GiveUpDrain(id, "memory was needed for a newer step, and the store was in trouble: " + TroubleOf(drain, now_));
    Retire(ns, id);  // Also where retain_every or retain_for would spare it.
    return true;
  }
  return false;
}

bool NodeCore::Impl::IsMine(const NamespaceKey& ns) const {
  const auto attempts = catalog_.Attempts(ns);
  // Tombstones tell, too: of what the store told alone there are none but those of steps that are listed no more.
  return std::ranges::any_of(attempts, [&](const Attempt* a) { return !a->durable || HasMemory(a->key.AttemptId()); });
}

bool NodeCore::Impl::NeedsListing(const NamespaceKey& ns) const {
  if (config_.store.empty() || IsMine(ns) || SP_PLANTED(store_not_asked)) return false;
  const auto listing = listings_.find(ns);
  if (listing == listings_.end() || listing->second.under_way) return true;
  return !listing->second.status.ok() || now_ >= listing->second.done_at + kListingHolds;
}

Status NodeCore::Impl::AnswerLater(ConnectionId c, const Frame& f, const NamespaceKey& ns) {
  if (stopping_) return Status(StatusCode::kUnavailable, "the daemon is stopping");
  const auto same_uid = [&](const auto& l) { return l.first.uid == ns.uid; };
  if (!listings_.contains(ns) && static_cast<size_t>(std::ranges::count_if(listings_, same_uid)) >= kListingsKept) {
    std::erase_if(listings_, [&](const auto& l) { return same_uid(l) && !l.second.under_way; });
  }
  Listing& listing = listings_[ns];
  if (!listing.under_way && !listing.status.ok() && now_ < listing.done_at + kListingHolds) {
    return Status(StatusCode::kUnavailable, "this namespace is not in the daemon's memory, and the durable tier could not be asked whether it has steps of "
                                            "it: " + listing.status.message());
  }
  const auto of_uid = std::ranges::count_if(unanswered_, [&](const Unanswered& u) { return u.ns.uid == ns.uid; });
  if (static_cast<uint32_t>(of_uid) >= config_.connections_per_uid_max) {
    return Status(StatusCode::kLimit, "too many calls wait for the durable tier to be listed");
  }
  unanswered_.push_back({c, f, ns, now_ + kAnswerWithin});
  if (!listing.under_way) {
    listing.under_way = true;
    actions_.push_back(action::ListStore{ns.uid, ns.ns});
  }
  return Status();
}

void NodeCore::Impl::AnswerLate() {
  for (size_t i = 0; i < unanswered_.size();) {
    if (unanswered_[i].deadline > now_) {
      ++i;
      continue;
    }
    const Unanswered late = std::move(unanswered_[i]);
    unanswered_.erase(unanswered_.begin() + static_cast<ptrdiff_t>(i));
    SendError(late.connection, late.frame.type, late.frame.request_id,
              Status(StatusCode::kUnavailable, "the durable tier is still being asked what it has of namespace " + late.ns.ns + ": try again"));
  }
}

// An older step is taken only by whoever asks for it (F68).
Status NodeCore::Impl::NewestDamaged(const NamespaceKey& ns) const {
  const auto listing = listings_.find(ns);
  return listing == listings_.end() || IsMine(ns) ? Status() : listing->second.newest;
}

// What the store tells is added to what is known: after a kill in between the next listing adds the rest (I-25).
void NodeCore::Impl::On(const event::StoreListed& e) {
  const NamespaceKey ns{e.uid, e.ns};
  Listing& listing = listings_[ns];
  listing = Listing{false, now_, e.status, e.newest};
  if (e.status.ok() && !IsMine(ns)) {
    size_t found = 0;
    for (const StoredStep& step : e.steps) {
      const SealRecord& first = step.records.front();
      const Attempt* known = catalog_.FindAttempt(ns, first.attempt);
      if (first.key.uid != ns.uid || first.key.ns != ns.ns || (known && (known->tombstone || known->stored.size() == known->world_size))) continue;
      for (const ledger::Generation& g : step.lineage) {
        const auto have = catalog_.Generations(ns);
        const bool have_it = std::ranges::any_of(have, [&](const auto& h) { return h.generation == g.generation; });
        if (!have_it && !SP_PLANTED(lineage_not_taken_over)) Commit(g);
      }
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
    if (found > 0) {
      Log(Severity::kInfo, "store_listed",
          {{"namespace", ns.ns}, {"store", config_.store}, {"steps", std::to_string(e.steps.size())}, {"not_known_before", std::to_string(found)}});
    }
  }
  const Status& trouble = e.status.ok() ? e.newest : e.status;
  if (!trouble.ok() && (list_told_at_ == 0 || now_ >= list_told_at_ + kTellEvery)) {
    list_told_at_ = now_;
    Log(Severity::kWarning, e.status.ok() ? "stored_step_damaged" : "store_not_listed",
        {{"namespace", ns.ns}, {"store", config_.store}, {"why", trouble.ToString()}});
  }
  std::vector<Unanswered> waiting, others;
  for (Unanswered& u : unanswered_) (u.ns == ns ? waiting : others).push_back(std::move(u));
  unanswered_ = std::move(others);
  for (Unanswered& u : waiting) On(event::Received{u.connection, std::move(u.frame)});
}

bool NodeCore::Impl::AwaitsDurable() const {
  if (config_.store.empty()) return false;
  for (const NamespaceKey& ns : catalog_.Namespaces()) {
    for (const Attempt* attempt : catalog_.OpenAttempts(ns)) {
      if (!attempt->WantsDurable() && PolicyFor(ns, *attempt).empty()) continue;
      const std::vector<uint32_t> ranks = RanksOf(*attempt);  // No new one begins any more.
      if (std::set<uint32_t>(ranks.begin(), ranks.end()).size() == attempt->world_size) return true;
    }
  }
  return false;
}

void NodeCore::Impl::EndIfDrained() {
  if (exit_asked_ || (IsDraining() && !SP_PLANTED(ends_undrained))) return;
  exit_asked_ = true;
  actions_.push_back(action::ExitDaemon{"asked to stop"});
}

}  // namespace sp
