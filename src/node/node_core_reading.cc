// Queries, read pins and corrupt shards.
#include <algorithm>

#include "base/plant.h"
#include "format/names.h"
#include "node/node_core_impl.h"

namespace sp {

using Severity = action::Log::Severity;

namespace {
constexpr uint32_t kPageBytes = 48u << 10;  // Body bytes that a page of a listing may fill.
constexpr uint32_t kPinsPerUid = 4;         // Times the limit of one namespace.
}

// Why there is nothing to resume from: never a complete step, or none left, or nobody knows (I-31).
Status NodeCore::Impl::NothingComplete(const NamespaceKey& ns) const {
  const std::string name = "namespace " + ns.ns;
  const bool fresh = catalog_.LineageBeginsFresh(ns);
  if (catalog_.LineageEverComplete(ns) || (markers_.contains(MarkerOf(ns.uid, ns.ns)) && !fresh)) {
    std::string why = "the daemon's memory was lost or replaced";
    for (const Attempt* a : catalog_.Attempts(ns)) {
      if (catalog_.StateOf(*a) == AttemptState::kCorrupt) why = StepText(a->key) + ": " + catalog_.InfoOf(*a).reason;
    }
    return Status(SP_PLANTED(lost_as_not_found) ? StatusCode::kNotFound : StatusCode::kLost, name + " had complete steps and none is left: " + why +
                                         "; pass fresh=True to begin anew, or restore from another tier");
  }
  if (!config_.markers_known && !fresh) {
    return Status(StatusCode::kUnavailable, name + " is unknown here, and the daemon's state directory, which would say whether it ever had a "
                                                   "complete step, cannot be read");
  }
  return Status(StatusCode::kNotFound, name + " never had a complete step");
}

Status NodeCore::Impl::Latest(ConnectionId c, const Frame& f) {
  SP_ASSIGN_OR_RETURN(auto r, Decode<NamespaceRequest>(f.body));
  SP_RETURN_IF_ERROR(CheckNamespace(r.ns));
  const NamespaceKey ns{SessionOf(c)->key.uid, r.ns};
  if (NeedsListing(ns)) return AnswerLater(c, f, ns);
  const auto lineage = catalog_.Lineage(ns, std::max(r.level, Level::kMemory));
  if (lineage.empty() && r.level > Level::kMemory && !catalog_.Lineage(ns, Level::kMemory).empty()) {
    return Status(StatusCode::kNotFound, "namespace " + ns.ns + " has no step that is " + std::string(LevelName(r.level)));
  }
  SP_RETURN_IF_ERROR(NewestDamaged(ns));
  if (lineage.empty()) return NothingComplete(ns);
  return Reply(c, f, catalog_.InfoOf(*lineage.front()));
}

Status NodeCore::Impl::ListSteps(ConnectionId c, const Frame& f) {
  SP_ASSIGN_OR_RETURN(auto r, Decode<NamespaceRequest>(f.body));
  SP_RETURN_IF_ERROR(CheckNamespace(r.ns));
  const NamespaceKey ns{SessionOf(c)->key.uid, r.ns};
  if (NeedsListing(ns)) return AnswerLater(c, f, ns);
  std::vector<const Attempt*> all = catalog_.Lineage(ns, Level::kMemory);
  for (const Attempt* a : catalog_.Attempts(ns)) {
    const AttemptState state = catalog_.StateOf(*a);
    if (state == AttemptState::kClosed || state == AttemptState::kRetired) continue;
    if (std::find(all.begin(), all.end(), a) == all.end()) all.push_back(a);
  }
  ListStepsReply reply;
  reply.total = static_cast<uint32_t>(all.size());
  const std::set<Id128> pinned = PinnedAttempts(ns);
  uint64_t bytes = 0;
  for (size_t i = r.first; i < all.size() && bytes < kPageBytes; ++i) {
    AttemptInfo info = catalog_.InfoOf(*all[i]);
    info.pinned |= pinned.contains(info.attempt);
    bytes += Encode(info).size();
    reply.attempts.push_back(std::move(info));
  }
  return Reply(c, f, reply);
}

Status NodeCore::Impl::ListNamespaces(ConnectionId c, const Frame& f) {
  SP_ASSIGN_OR_RETURN(auto r, Decode<NamespaceRequest>(f.body));
  const uint32_t uid = SessionOf(c)->key.uid;
  ListNamespacesReply reply;
  uint64_t bytes = 0;
  for (const NamespaceKey& ns : catalog_.Namespaces()) {
    const ledger::Generation* g = catalog_.CurrentGeneration(ns);
    if (ns.uid != uid || !g) continue;
    if (reply.total++ < r.first || bytes >= kPageBytes) continue;
    NamespaceInfo info;
    info.ns = ns.ns;
    info.generation = g->generation;
    for (const Attempt* a : catalog_.Attempts(ns)) {
      if (a->tombstone) continue;
      info.bytes += catalog_.InfoOf(*a).bytes;
      info.complete_steps += catalog_.StateOf(*a) == AttemptState::kComplete;
    }
    bytes += info.ns.size() + 24;
    reply.namespaces.push_back(std::move(info));
  }
  return Reply(c, f, reply);
}

Result<const Attempt*> NodeCore::Impl::Choose(const NamespaceKey& ns, const OpenReadRequest& r) const {
  const auto lineage = catalog_.Lineage(ns, Level::kMemory);
  if (r.choice == ReadChoice::kLatest) {
    SP_RETURN_IF_ERROR(NewestDamaged(ns));
    if (lineage.empty()) return std::unexpected(NothingComplete(ns));
    return lineage.front();
  }
  const Attempt* found = nullptr;
  if (r.choice == ReadChoice::kAttempt) {
    found = catalog_.FindAttempt(ns, r.attempt);
  } else {
    for (const Attempt* a : lineage) {
      if (!found && a->key.step == r.step) found = a;
    }
    for (const Attempt* a : catalog_.Attempts(ns)) {  // Newest first; complete ones of abandoned branches, then whatever is known of it.
      if (a->key.step == r.step && !found && catalog_.StateOf(*a) == AttemptState::kComplete) found = a;
    }
    for (const Attempt* a : catalog_.Attempts(ns)) {
      if (a->key.step == r.step && !found && !a->tombstone) found = a;
    }
  }
  const std::string what = r.choice == ReadChoice::kStep ? "step " + std::to_string(r.step) : "attempt " + r.attempt.ToHex();
  if (found && catalog_.StateOf(*found) == AttemptState::kComplete) return found;
  if (found && catalog_.StateOf(*found) == AttemptState::kCorrupt) {
    return Error(StatusCode::kCorrupt, what + " of namespace " + ns.ns + ": " + catalog_.InfoOf(*found).reason);
  }
  if (lineage.empty()) {
    if (Status nothing = NothingComplete(ns); nothing.code() != StatusCode::kNotFound) return std::unexpected(nothing);
  }
  std::string have;
  for (const Attempt* a : lineage) have += (have.empty() ? "" : ", ") + std::to_string(a->key.step);
  return Error(StatusCode::kNotFound, what + " of namespace " + ns.ns + " is not there" + (found && !found->tombstone ? " yet (it is incomplete)" : "") +
                                          "; complete steps: " + (have.empty() ? "none" : have.substr(0, 200)));
}

Status NodeCore::Impl::OpenRead(ConnectionId c, const Frame& f) {
  SP_ASSIGN_OR_RETURN(auto r, Decode<OpenReadRequest>(f.body));
  SP_RETURN_IF_ERROR(CheckNamespace(r.ns));
  const SessionKey session = SessionOf(c)->key;
  const NamespaceKey ns{session.uid, r.ns};
  if (NeedsListing(ns)) return AnswerLater(c, f, ns);
  const auto of_ns = std::count_if(pins_.begin(), pins_.end(), [&](const auto& p) { return p.second.ns == ns; });
  const auto groups_of_ns = std::count_if(groups_.begin(), groups_.end(), [&](const auto& g) { return std::get<0>(g.first) == ns; });
  const auto of_uid = std::count_if(pins_.begin(), pins_.end(), [&](const auto& p) { return p.second.ns.uid == ns.uid; });
  if (static_cast<uint64_t>(of_uid) >= uint64_t{kPinsPerUid} * config_.pins_max) {  // They are in the log of facts, which all users share.
    return Status(StatusCode::kLimit, "uid " + std::to_string(ns.uid) + " has " + std::to_string(of_uid) + " restores in progress");
  }
  if (static_cast<uint32_t>(std::max(of_ns, groups_of_ns)) >= config_.pins_max) {
    return Status(StatusCode::kLimit, "namespace " + r.ns + " has " + std::to_string(of_ns) + " restores in progress");
  }
  const GroupKey group{ns, r.nonce, r.sequence};
  OpenReadRequest asked = r;
  if (auto g = groups_.find(group); !r.nonce.is_zero() && g != groups_.end() && !SP_PLANTED(group_choice_ignored)) {
    asked.choice = ReadChoice::kAttempt;  // A rank of the same launch has chosen already (I-7).
    asked.attempt = g->second.attempt;
  }
  SP_ASSIGN_OR_RETURN(const Attempt* attempt, Choose(ns, asked));
  if (r.choice == ReadChoice::kStep && attempt->key.step != r.step) {
    return Status(StatusCode::kInvalidArgument, "another rank of this launch restores step " + std::to_string(attempt->key.step) +
                                                    ", this one asked for step " + std::to_string(r.step));
  }
  const Id128 id = attempt->key.AttemptId();
  if (r.choice == ReadChoice::kAttempt && id != r.attempt) {
    return Status(StatusCode::kInvalidArgument, "another rank of this launch restores " + StepText(attempt->key) + ", this one asked for another attempt");
  }
  if (!r.nonce.is_zero()) groups_[group] = GroupChoice{id, now_ + config_.pin_ns};
  const ledger::ReadPin entry{NewId(), session, ns.ns, id, true};
  Commit(entry);
  Evidence(Severity::kInfo, "read_pinned", attempt->key, {{"pin", std::to_string(entry.pin)}, {"pid", std::to_string(session.pid)}});
  OpenReadReply reply;
  reply.pin = entry.pin;
  reply.pin_ns = static_cast<uint64_t>(config_.pin_ns);
  reply.info = catalog_.InfoOf(*attempt);
  reply.store = config_.store;  // Also of a step that may become durable, and lose its memory, while it is being read.
  return Reply(c, f, reply);
}

Result<const NodeCore::Impl::Pin*> NodeCore::Impl::FindPin(ConnectionId c, uint64_t id) const {
  auto it = pins_.find(id);
  const auto& connection = connections_.at(c);
  if (it == pins_.end() || it->second.entry.session.session != connection.session) {
    return Error(StatusCode::kClosed, "this restore's pin has ended (it lasts " + std::to_string(config_.pin_ns / kNanosPerSecond) +
                                          " s after its last use): open it again");
  }
  return &it->second;
}

Status NodeCore::Impl::ShardInfo(ConnectionId c, const Frame& f) {
  SP_ASSIGN_OR_RETURN(auto r, Decode<ShardRequest>(f.body));
  SP_ASSIGN_OR_RETURN(const Pin* pin, FindPin(c, r.pin));
  pins_.at(r.pin).expires = now_ + config_.pin_ns;
  const Attempt* attempt = catalog_.FindAttempt(pin->ns, pin->entry.attempt);
  auto sealed = sealed_.find({pin->entry.attempt, r.rank});
  const bool here = sealed != sealed_.end() && !catalog_.quarantined().contains(sealed->second.record);
  if (attempt && attempt->durable && !here && attempt->records.contains(r.rank)) {
    ShardInfoReply stored;
    stored.record.bytes = attempt->records.at(r.rank).Encode();
    return Reply(c, f, stored);
  }
  if (!attempt || sealed == sealed_.end()) {
    return Status(StatusCode::kNotFound, "the attempt has no shard of rank " + std::to_string(r.rank));
  }
  if (!here) {
    return Status(StatusCode::kCorrupt, StepText(attempt->key) + ": the shard of rank " + std::to_string(r.rank) + " is corrupt");
  }
  ShardInfoReply reply;
  reply.record.bytes = attempt->records.at(r.rank).Encode();
  reply.extents = static_cast<uint32_t>(pool_.FindSlot(sealed->second.slot)->entry.extents.size());
  return Reply(c, f, reply);
}

Status NodeCore::Impl::FetchExtents(ConnectionId c, const Frame& f) {
  SP_ASSIGN_OR_RETURN(auto r, Decode<FetchExtentsRequest>(f.body));
  const Id128 session = SessionOf(c)->key.session;
  uint64_t slot = r.slot;
  if (r.read_only) {
    SP_ASSIGN_OR_RETURN(const Pin* pin, FindPin(c, r.pin));
    auto sealed = sealed_.find({pin->entry.attempt, r.rank});
    if (sealed == sealed_.end()) return Status(StatusCode::kNotFound, "the attempt has no shard of rank " + std::to_string(r.rank));
    slot = sealed->second.slot;
  }
  const PoolSlot* s = pool_.FindSlot(slot);
  if (!s || (!r.read_only && s->entry.session.session != session)) return Status(StatusCode::kDenied, "this slot is not yours");
  const auto& all = s->entry.extents;
  if (r.first >= all.size()) return Status(StatusCode::kInvalidArgument, "the slot has " + std::to_string(all.size()) + " extents");
  const size_t count = std::min<size_t>(kDescriptorsPerFrameMax, all.size() - r.first);
  const auto begin = all.begin() + static_cast<ptrdiff_t>(r.first);
  const std::vector<uint32_t> batch(begin, begin + static_cast<ptrdiff_t>(count));
  pool_.Lend(batch, session);
  const FetchExtentsReply reply{r.first, static_cast<uint32_t>(count), static_cast<uint32_t>(all.size())};
  actions_.push_back(action::Send{c, MakeFrame(f.type, f.request_id, reply), batch, r.read_only});
  return Status();
}

Status NodeCore::Impl::Unpin(ConnectionId c, const Frame& f) {
  SP_ASSIGN_OR_RETURN(auto r, Decode<PinRequest>(f.body));
  if (FindPin(c, r.pin)) DropPin(r.pin);  // One that has ended already is as good as given back.
  return Reply(c, f, Empty{});
}

void NodeCore::Impl::DropPin(uint64_t id) {
  auto it = pins_.find(id);
  if (it == pins_.end()) return;
  ledger::ReadPin entry = it->second.entry;
  const NamespaceKey ns = it->second.ns;
  entry.on = false;
  Commit(entry);
  if (const Attempt* attempt = catalog_.FindAttempt(ns, entry.attempt)) {
    Evidence(Severity::kInfo, "read_unpinned", attempt->key, {{"pin", std::to_string(entry.pin)}});
  }
  RetireOld(ns);
}

std::set<Id128> NodeCore::Impl::AttemptsBeingRead(const NamespaceKey& ns) const {
  std::set<Id128> read;
  if (SP_PLANTED(pins_ignored)) return read;
  for (const auto& [id, pin] : pins_) {
    if (pin.ns == ns) read.insert(pin.entry.attempt);
  }
  for (const auto& [key, group] : groups_) {
    if (std::get<0>(key) == ns) read.insert(group.attempt);
  }
  return read;
}

std::set<Id128> NodeCore::Impl::PinnedAttempts(const NamespaceKey& ns) const {
  std::set<Id128> pinned = AttemptsBeingRead(ns);
  for (const auto& [id, drain] : drains_) {  // F70: not before the store has it.
    if (drain.ns == ns && !SP_PLANTED(retired_while_draining)) pinned.insert(id);
  }
  return pinned;
}

Status NodeCore::Impl::PinStep(ConnectionId c, const Frame& f) {
  SP_ASSIGN_OR_RETURN(auto r, Decode<PinStepRequest>(f.body));
  SP_RETURN_IF_ERROR(CheckNamespace(r.ns));
  const NamespaceKey ns{SessionOf(c)->key.uid, r.ns};
  const Attempt* attempt = catalog_.FindAttempt(ns, r.attempt);
  if (!attempt || (r.on && catalog_.StateOf(*attempt) != AttemptState::kComplete)) {  // A pin can be taken from a corrupt one.
    return Status(StatusCode::kNotFound, "namespace " + r.ns + " has no such complete attempt");
  }
  if (attempt->operator_pin != r.on) {
    const auto all = catalog_.Attempts(ns);
    const auto pinned = std::count_if(all.begin(), all.end(), [](const Attempt* a) { return a->operator_pin; });
    if (r.on && static_cast<uint32_t>(pinned) >= 16) return Status(StatusCode::kLimit, "namespace " + r.ns + " has 16 pinned steps already");
    Commit(ledger::OperatorPin{ns.uid, ns.ns, r.attempt, r.on});
    Evidence(Severity::kInfo, r.on ? "step_pinned" : "step_unpinned", attempt->key, {});
    if (!r.on) RetireOld(ns);
  }
  return Reply(c, f, Empty{});
}

Status NodeCore::Impl::ReportCorrupt(ConnectionId c, const Frame& f) {
  SP_ASSIGN_OR_RETURN(auto r, Decode<ShardRequest>(f.body));
  SP_ASSIGN_OR_RETURN(const Pin* pin, FindPin(c, r.pin));
  auto sealed = sealed_.find({pin->entry.attempt, r.rank});
  const Attempt* attempt = catalog_.FindAttempt(pin->ns, pin->entry.attempt);
  if (attempt && attempt->durable && sealed == sealed_.end()) return Reply(c, f, ReportCorruptReply{false});  // Not this node's copy.
  if (!attempt || sealed == sealed_.end()) return Status(StatusCode::kNotFound, "the attempt has no shard of rank " + std::to_string(r.rank));
  const SealRecord& record = attempt->records.at(r.rank);
  if (catalog_.quarantined().contains(sealed->second.record)) return Reply(c, f, ReportCorruptReply{true});
  if (r.block >= BlockCount(record.length_bytes)) {
    return Status(StatusCode::kInvalidArgument, "the shard has " + std::to_string(BlockCount(record.length_bytes)) + " blocks");
  }
  const auto of_uid = std::count_if(block_checks_.begin(), block_checks_.end(), [&](const auto& b) { return b.second.ns.uid == pin->ns.uid; });
  if (static_cast<uint32_t>(of_uid) >= config_.connections_per_uid_max * 4) return Status(StatusCode::kLimit, "too many blocks are being checked");
  const uint64_t token = NewId();
  block_checks_[token] =
      BlockCheck{c, f.request_id, pin->ns, pin->entry.attempt, sealed->second.record, r.rank, r.block};
  actions_.push_back(action::CheckBlock{token, pool_.FindSlot(sealed->second.slot)->entry.extents, record.length_bytes, r.block, record.block_root});
  return Status();
}

void NodeCore::Impl::On(const event::BlockChecked& e) {
  auto it = block_checks_.find(e.token);
  if (it == block_checks_.end()) return;
  const BlockCheck check = it->second;
  block_checks_.erase(it);
  const bool corrupt = e.status.code() == StatusCode::kCorrupt;
  if (!corrupt && !e.status.ok()) return SendError(check.connection, MessageType::kReportCorrupt, check.request_id, e.status);
  const Attempt* attempt = catalog_.FindAttempt(check.ns, check.attempt);
  // Retired while it was being read: its extents may hold something else by now, which proves nothing.
  if (corrupt && attempt && !attempt->tombstone && sealed_.contains({check.attempt, check.rank})) {
    if (!catalog_.quarantined().contains(check.record)) {
      Commit(ledger::Quarantine{check.record, check.block});
      ++counters_.quarantined;
      Evidence(Severity::kError, "shard_corrupt", attempt->key,
               {{"rank", std::to_string(check.rank)}, {"record", check.record.ToHex()}, {"block", std::to_string(check.block)}, {"why", e.status.message()}});
      AnswerWaiters(check.ns, check.attempt);
    }
    Send(check.connection, MakeFrame(MessageType::kReportCorrupt, check.request_id, ReportCorruptReply{true}));
  } else {
    Send(check.connection, MakeFrame(MessageType::kReportCorrupt, check.request_id, ReportCorruptReply{false}));
  }
}

}  // namespace sp
