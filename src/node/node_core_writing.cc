// Generations, leases and seals.
//
// A save, and what a SIGKILL of this worker leaves behind between any two steps:
//   Reserve   Slot (if new) and Lease are in the ledger before the reply: the restarted worker knows who may write where.
//   copy      in the client; nothing here.
//   Seal      Sealed is in the ledger before the reply: from here the shard survives trainer and worker. Before: the client repeats the request.
//   complete  Manifest follows the last Sealed at once; a restarted worker that finds W records makes the identical manifest.
//   retire    Tombstone first (out of every listing), then the slots go back.
#include <algorithm>
#include <tuple>

#include "base/plant.h"
#include "format/names.h"
#include "node/node_core_impl.h"

namespace sp {

using Severity = action::Log::Severity;

namespace {
constexpr uint32_t kRanksPerSessionMax = 256;

bool SameShard(const ReserveRequest& a, const ReserveRequest& b) {
  return std::tie(a.ns, a.generation, a.nonce, a.step, a.try_number, a.rank) == std::tie(b.ns, b.generation, b.nonce, b.step, b.try_number, b.rank);
}
}  // namespace

bool NodeCore::Impl::WasFenced(const NamespaceKey& ns, const Attempt& attempt) const {
  const ledger::Generation* current = catalog_.CurrentGeneration(ns);
  // After a restart only the id of an attempt may be left, beside its tombstone.
  return current && !attempt.key.ns.empty() && attempt.key.generation < current->generation;
}

Status NodeCore::Impl::CheckWriter(const NamespaceKey& ns, uint64_t generation, const Id128& nonce) const {
  const ledger::Generation* current = catalog_.CurrentGeneration(ns);
  if (!current) return Status(StatusCode::kClosed, "namespace " + ns.ns + " has no open generation: this daemon lost its memory, open a new one");
  if ((current->generation == generation && current->nonce == nonce) || SP_PLANTED(fencing_unchecked)) return Status();
  return Status(StatusCode::kFenced, "generation " + std::to_string(generation) + " of namespace " + ns.ns + " was superseded by generation " +
                                         std::to_string(current->generation) + ", opened by a later launch: this job must stop");
}

Status NodeCore::Impl::NoteWriter(const NamespaceKey& ns, uint64_t generation, uint32_t rank, const Id128& session) {
  const WriterKey key{ns, generation, rank};
  const auto known = writers_.find(key);
  if (known == writers_.end()) {
    const auto ranks = std::count_if(writers_.begin(), writers_.end(), [&](const auto& w) { return w.second == session; });
    if (static_cast<uint32_t>(ranks) >= kRanksPerSessionMax) {
      return Status(StatusCode::kLimit, "one session acts for " + std::to_string(ranks) + " ranks already; every rank has a process of its own");
    }
  }
  writers_[key] = session;
  return Status();
}

Status NodeCore::Impl::OpenGeneration(ConnectionId c, const Frame& f) {
  SP_ASSIGN_OR_RETURN(auto r, Decode<OpenGenerationRequest>(f.body));
  SP_RETURN_IF_ERROR(CheckNamespace(r.ns));
  if (stopping_) return Status(StatusCode::kUnavailable, "the daemon is stopping");
  if (r.world_size == 0 || r.world_size > kWorldSizeMax || r.rank >= r.world_size || r.nonce.is_zero()) {
    return Status(StatusCode::kInvalidArgument, "rank " + std::to_string(r.rank) + " of world size " + std::to_string(r.world_size) +
                                                    " (at most " + std::to_string(kWorldSizeMax) + "), and the nonce must not be zero");
  }
  const Session& session = *SessionOf(c);
  const NamespaceKey ns{session.key.uid, r.ns};
  if (NeedsListing(ns)) return AnswerLater(c, f, ns);
  const ledger::Generation* current = catalog_.CurrentGeneration(ns);
  const ledger::Generation* same = catalog_.FindGenerationByNonce(ns, r.nonce);
  if (same && same != current) return CheckWriter(ns, same->generation, r.nonce);
  if (!same) {
    if (!current) {
      const auto names = catalog_.Namespaces();
      const auto of_uid = std::count_if(names.begin(), names.end(), [&](const NamespaceKey& k) { return k.uid == ns.uid; });
      if (static_cast<uint32_t>(of_uid) >= config_.namespaces_per_uid_max) {
        return Status(StatusCode::kLimit, "uid " + std::to_string(ns.uid) + " has " + std::to_string(of_uid) + " namespaces already");
      }
    }
    if (catalog_.CountGenerations(ns.uid) >= config_.generations_per_uid_max) {
      return Status(StatusCode::kLimit, "uid " + std::to_string(ns.uid) + " has opened " + std::to_string(config_.generations_per_uid_max) +
                                            " generations since this daemon's memory began; restart the daemon when its steps are not needed any more");
    }
    ledger::Generation g;
    g.uid = ns.uid;
    g.ns = ns.ns;
    g.generation = current ? current->generation + 1 : 1;
    g.nonce = r.nonce;
    g.world_size = r.world_size;
    g.fresh = r.parent_mode == ParentMode::kFresh;
    const Attempt* parent = nullptr;
    if (r.parent_mode == ParentMode::kLatest) {
      SP_RETURN_IF_ERROR(NewestDamaged(ns));
      const auto lineage = catalog_.Lineage(ns, Level::kMemory);
      if (!lineage.empty()) parent = lineage.front();
    } else if (r.parent_mode == ParentMode::kAttempt) {
      parent = catalog_.FindAttempt(ns, r.parent);
      if (!parent || catalog_.StateOf(*parent) != AttemptState::kComplete) {
        return Status(StatusCode::kNotFound, "the attempt that namespace " + ns.ns + " is to continue from is not complete (any more)");
      }
    }
    if (parent) {
      g.has_parent = true;
      g.parent = parent->key.AttemptId();
      g.parent_generation = parent->key.generation;
      g.parent_step = parent->key.step;
    }
    // The launch that was opened fresh died before its first step: its successor continues that nothing.
    g.fresh |= r.parent_mode == ParentMode::kLatest && !parent && catalog_.LineageBeginsFresh(ns) && !catalog_.LineageEverComplete(ns);
    Commit(g);
    actions_.push_back(action::Log{
        Severity::kInfo, "generation_opened",
        {{"namespace", ns.ns}, {"uid", std::to_string(ns.uid)}, {"generation", std::to_string(g.generation)}, {"nonce", g.nonce.ToHex()},
         {"world_size", std::to_string(g.world_size)}, {"parent_step", parent ? std::to_string(g.parent_step) : "none"},
         {"parent", parent ? g.parent.ToHex() : "none"}},
        true});
    // Fence: what an older launch still has open can never be acknowledged (I-21).
    for (const Attempt* a : catalog_.OpenAttempts(ns)) {
      CloseAttempt(ns, a->key.AttemptId(), "generation " + std::to_string(a->key.generation) + " was superseded by generation " +
                                               std::to_string(g.generation));
    }
    std::erase_if(writers_, [&](const auto& w) { return std::get<0>(w.first) == ns && std::get<1>(w.first) < g.generation; });
    current = catalog_.CurrentGeneration(ns);
  } else if (same->world_size != r.world_size) {
    return Status(StatusCode::kInvalidArgument, "this launch opened namespace " + ns.ns + " with world size " + std::to_string(same->world_size) +
                                                    ", rank " + std::to_string(r.rank) + " says " + std::to_string(r.world_size));
  } else if (r.parent_mode == ParentMode::kAttempt && (!same->has_parent || same->parent != r.parent)) {
    return Status(StatusCode::kInvalidArgument, "rank " + std::to_string(r.rank) + " continues from another step than the launch's generation " +
                                                    std::to_string(same->generation) + ": restore the same step on all ranks");
  } else if (r.parent_mode == ParentMode::kFresh && !same->fresh) {
    return Status(StatusCode::kInvalidArgument, "rank " + std::to_string(r.rank) + " asked for a fresh lineage, but the launch's generation " +
                                                    std::to_string(same->generation) + " was opened without: pass fresh=True on all ranks");
  }
  SP_RETURN_IF_ERROR(NoteWriter(ns, current->generation, r.rank, session.key.session));
  OpenGenerationReply reply;
  reply.generation = current->generation;
  reply.has_parent = current->has_parent;
  reply.parent = current->parent;
  reply.parent_step = current->parent_step;
  return Reply(c, f, reply);
}

Status NodeCore::Impl::Reserve(ConnectionId c, const Frame& f) {
  SP_ASSIGN_OR_RETURN(auto r, Decode<ReserveRequest>(f.body));
  SP_RETURN_IF_ERROR(CheckNamespace(r.ns));
  if (stopping_) return Status(StatusCode::kUnavailable, "the daemon is stopping");
  const SessionKey session = SessionOf(c)->key;
  const NamespaceKey ns{session.uid, r.ns};
  SP_RETURN_IF_ERROR(CheckWriter(ns, r.generation, r.nonce));
  const ledger::Generation& generation = *catalog_.CurrentGeneration(ns);
  if (r.world_size != generation.world_size || r.rank >= r.world_size || r.step > kStepMax || r.bytes == 0 || r.bytes > kShardBytesMax) {
    return Status(StatusCode::kInvalidArgument, "rank " + std::to_string(r.rank) + " of " + std::to_string(r.world_size) + ", step " +
                                                    std::to_string(r.step) + ", " + std::to_string(r.bytes) + " bytes: outside the limits, or not " +
                                                    "the generation's world size " + std::to_string(generation.world_size));
  }
  const AttemptKey key{ns.uid, ns.ns, r.generation, r.nonce, r.step, r.try_number};
  const Id128 id = key.AttemptId();
  const ShardKey shard{id, r.rank};
  const Attempt* attempt = catalog_.FindAttempt(ns, id);
  if (attempt && attempt->tombstone) {
    return Status(StatusCode::kClosed, StepText(key) + " is closed: " + attempt->tombstone->reason);
  }
  if (attempt && attempt->manifest && !sealed_.contains(shard)) return Status(StatusCode::kClosed, StepText(key) + " is complete already");
  if (!attempt && catalog_.WasForgotten(ns, id)) {  // By a rank that is far ahead: it will not come back for it.
    return Status(StatusCode::kClosed, StepText(key) + " was closed long ago");
  }
  if (sealed_.contains(shard)) return Status(StatusCode::kClosed, StepText(key) + ": rank " + std::to_string(r.rank) + " has sealed it already");
  if (auto open = lease_of_.find(shard); open != lease_of_.end() && !SP_PLANTED(repeat_gets_a_second_lease)) {
    OpenLease& lease = leases_.at(open->second);
    if (lease.session != session.session) {
      return Status(StatusCode::kInvalidArgument, StepText(key) + ": rank " + std::to_string(r.rank) + " is being written by another process");
    }
    lease.expires = now_ + config_.lease_ns;  // The reply was lost: the same answer again.
    const PoolSlot& slot = *pool_.FindSlot(lease.entry.slot);
    return Reply(c, f, ReserveReply{lease.entry.lease, lease.entry.slot, static_cast<uint32_t>(slot.entry.extents.size()), id,
                                    static_cast<uint64_t>(config_.lease_ns), {}});
  }
  for (auto& [build_id, build] : builds_) {
    if (!build.reserve || !SameShard(*build.reserve, r) || build.session.uid != session.uid) continue;
    if (build.session != session) {
      return Status(StatusCode::kInvalidArgument, StepText(key) + ": rank " + std::to_string(r.rank) + " is being written by another process");
    }
    build.connection = c;  // A repeat while the extents are being made: the answer goes to the new request.
    build.request_id = f.request_id;
    return Status();
  }
  if (const Status status = CheckTries(ns, r); !status.ok()) {
    GiveUpTry(session, r, status);
    return status;
  }
  if (!attempt && catalog_.OpenAttempts(ns).size() >= config_.open_attempts_max) {
    const Status status(StatusCode::kLimit, "namespace " + ns.ns + " has " + std::to_string(config_.open_attempts_max) + " open attempts already");
    GiveUpTry(session, r, status);
    return status;
  }
  SP_RETURN_IF_ERROR(NoteWriter(ns, r.generation, r.rank, session.session));
  const uint32_t extents = ExtentsFor(r.bytes);
  if (auto slot = IdleSlotFor(session, extents)) {
    GrantLease(c, f.request_id, session, r, *slot, {});
    return Status();
  }
  Build build;
  build.session = session;
  build.connection = c;
  build.request_id = f.request_id;
  build.deadline = Until(now_, r.timeout_ns);
  build.reserve = r;
  Status status = StartBuild(extents, build);
  while (status.code() == StatusCode::kNoSpace && DrainGivesWay(session)) {
    // Memory of this process's own retired steps is an idle slot now; anything else is free.
    if (auto slot = IdleSlotFor(session, extents)) {
      GrantLease(c, f.request_id, session, r, *slot, {});
      return Status();
    }
    status = StartBuild(extents, build);
  }
  if (!status.ok()) GiveUpTry(session, r, status);
  return status;
}

std::vector<uint32_t> NodeCore::Impl::RanksOf(const Attempt& attempt) const {
  std::vector<uint32_t> ranks;
  for (const auto& [rank, record] : attempt.records) ranks.push_back(rank);
  const Id128 id = attempt.key.AttemptId();
  for (auto it = lease_of_.lower_bound({id, 0}); it != lease_of_.end() && it->first.first == id; ++it) ranks.push_back(it->first.second);
  for (const auto& [build_id, build] : builds_) {
    const auto& r = build.reserve;
    if (r && AttemptKey{build.session.uid, r->ns, r->generation, r->nonce, r->step, r->try_number} == attempt.key) ranks.push_back(r->rank);
  }
  return ranks;
}

// A rank that saves a step once more takes no part in its earlier tries any more: whoever still does would wait for it in vain, and hears that
// now. Where the others save the step once more, too, that later try is as good as any.
Status NodeCore::Impl::CheckTries(const NamespaceKey& ns, const ReserveRequest& r) {
  const auto nth = [](uint32_t rank, uint32_t tries) { return "rank " + std::to_string(rank) + " for time " + std::to_string(tries); };
  const AttemptKey key{ns.uid, ns.ns, r.generation, r.nonce, r.step, r.try_number};
  const Attempt* own = catalog_.FindAttempt(ns, key.AttemptId());
  const std::vector<uint32_t> here = own ? RanksOf(*own) : std::vector<uint32_t>();
  std::vector<std::pair<Id128, std::string>> hopeless;
  for (const Attempt* other : catalog_.OpenAttempts(ns)) {
    if (other->key.generation != key.generation || other->key.step != key.step || other->key.try_number == key.try_number) continue;
    for (const uint32_t rank : RanksOf(*other)) {
      if (other->key.try_number < key.try_number) {
        const std::vector<uint32_t> there = RanksOf(*other);
        if (std::ranges::find(there, r.rank) != there.end()) break;
        hopeless.emplace_back(other->key.AttemptId(), nth(rank, other->key.try_number) + ", " + nth(r.rank, r.try_number));
        break;
      }
      if (std::ranges::find(here, rank) != here.end()) continue;
      return Status(StatusCode::kClosed, "the ranks differ in how often they have saved step " + std::to_string(r.step) + ": " + nth(r.rank, r.try_number) +
                                             ", " + nth(rank, other->key.try_number));
    }
  }
  for (const auto& [id, who] : hopeless) {
    CloseAttempt(ns, id, "the ranks differ in how often they have saved step " + std::to_string(r.step) + ": " + who);
  }
  return Status();
}

// This rank has used up its try: without it the attempt can never be whole, and the others should hear that now.
void NodeCore::Impl::GiveUpTry(const SessionKey& session, const ReserveRequest& r, const Status& why) {
  const AttemptKey key{session.uid, r.ns, r.generation, r.nonce, r.step, r.try_number};
  catalog_.AddAttempt(key, r.world_size);
  CloseAttempt({session.uid, r.ns}, key.AttemptId(), "rank " + std::to_string(r.rank) + ": " + why.ToString());
}

void NodeCore::Impl::GrantLease(ConnectionId c, uint64_t request_id, const SessionKey& session, const ReserveRequest& r, uint64_t slot,
                                std::vector<uint64_t> gone) {
  const NamespaceKey ns{session.uid, r.ns};
  // Between the request and now its generation may have been fenced or its attempt closed.
  const AttemptKey key{ns.uid, ns.ns, r.generation, r.nonce, r.step, r.try_number};
  const Id128 id = key.AttemptId();
  Status status = CheckWriter(ns, r.generation, r.nonce);
  if (const Attempt* attempt = catalog_.FindAttempt(ns, id); status.ok() && attempt && attempt->tombstone) {
    status = Status(StatusCode::kClosed, StepText(key) + " is closed: " + attempt->tombstone->reason);
  }
  if (status.ok() && lease_of_.contains({id, r.rank}) && !SP_PLANTED(repeat_gets_a_second_lease)) status = Status(StatusCode::kInvalidArgument, "this shard is being written already");
  if (status.ok() && sealed_.contains({id, r.rank})) status = Status(StatusCode::kClosed, StepText(key) + ": rank " + std::to_string(r.rank) + " has sealed it already");
  if (!status.ok()) return SendError(c, MessageType::kReserve, request_id, status);
  const ledger::Lease entry{NewId(), slot, key, r.world_size, r.rank};
  Commit(entry);
  leases_.at(entry.lease).expires = now_ + config_.lease_ns;
  Evidence(Severity::kInfo, "lease_granted", key,
           {{"rank", std::to_string(r.rank)}, {"lease", std::to_string(entry.lease)}, {"slot", std::to_string(slot)}, {"bytes", std::to_string(r.bytes)}});
  Send(c, MakeFrame(MessageType::kReserve, request_id,
                    ReserveReply{entry.lease, slot, static_cast<uint32_t>(pool_.FindSlot(slot)->entry.extents.size()), id,
                                 static_cast<uint64_t>(config_.lease_ns), std::move(gone)}));
}

void NodeCore::Impl::EndLease(uint64_t lease, bool writer_may_write) {
  auto it = leases_.find(lease);
  if (it == leases_.end()) return;
  const OpenLease old = it->second;
  Commit(ledger::LeaseEnded{lease, old.entry.slot, writer_may_write});
  if (old.checking) {
    SendError(old.seal_connection, MessageType::kSeal, old.seal_request,
              Status(StatusCode::kClosed, "the lease ended while the seal was being checked"));
  }
  ReleaseSlot(old.entry.slot);
}

Status NodeCore::Impl::Abort(ConnectionId c, const Frame& f) {
  SP_ASSIGN_OR_RETURN(auto r, Decode<LeaseRequest>(f.body));
  const Id128 session = SessionOf(c)->key.session;
  if (auto z = zombies_.find(r.lease); z != zombies_.end()) {
    if (pool_.FindSlot(z->second.slot)->entry.session.session != session) return Status(StatusCode::kDenied, "this lease is not yours");
    const uint64_t slot = z->second.slot;
    Commit(ledger::LeaseEnded{r.lease, slot, false});
    ReleaseSlot(slot);
  } else if (auto it = leases_.find(r.lease); it != leases_.end()) {
    if (it->second.session != session) return Status(StatusCode::kDenied, "this lease is not yours");
    const OpenLease lease = it->second;
    EndLease(r.lease, false);
    CloseAttempt({lease.entry.key.uid, lease.entry.key.ns}, lease.attempt, "rank " + std::to_string(lease.entry.rank) + " gave up: " + r.reason);
  }
  return Reply(c, f, Empty{});  // An unknown lease has ended already.
}

Status NodeCore::Impl::Renew(ConnectionId c, const Frame& f) {
  SP_ASSIGN_OR_RETURN(auto r, Decode<LeaseRequest>(f.body));
  if (auto z = zombies_.find(r.lease); z != zombies_.end()) {
    const Attempt* attempt = catalog_.FindAttempt(z->second.ns, z->second.attempt);
    return Status(attempt && WasFenced(z->second.ns, *attempt) ? StatusCode::kFenced : StatusCode::kClosed,
                  "the lease has ended: " + (attempt && attempt->tombstone ? attempt->tombstone->reason : std::string("its attempt was closed")));
  }
  auto it = leases_.find(r.lease);
  if (it == leases_.end()) return Status(StatusCode::kClosed, "no such lease");
  if (it->second.session != SessionOf(c)->key.session) return Status(StatusCode::kDenied, "this lease is not yours");
  it->second.expires = now_ + config_.lease_ns;
  return Reply(c, f, Empty{});
}

Status NodeCore::Impl::Seal(ConnectionId c, const Frame& f) {
  SP_ASSIGN_OR_RETURN(auto r, Decode<SealRequest>(f.body));
  const Id128 session = SessionOf(c)->key.session;
  auto it = leases_.find(r.lease);
  if (it == leases_.end()) {
    for (const auto& [shard, sealed] : sealed_) {
      if (sealed.lease != r.lease) continue;
      const PoolSlot* slot = pool_.FindSlot(sealed.slot);
      if (!slot || slot->entry.session.session != session) return Status(StatusCode::kDenied, "this lease is not yours");
      for (const NamespaceKey& ns : catalog_.Namespaces()) {  // The reply was lost: the same answer again, or a refusal to change it.
        const Attempt* attempt = catalog_.FindAttempt(ns, shard.first);
        if (!attempt || ns.uid != slot->entry.session.uid) continue;
        const SealRecord& record = attempt->records.at(shard.second);
        if (record.block_root != r.block_root || record.length_bytes != r.length_bytes || record.structure != r.structure) {
          return Status(StatusCode::kInvalidArgument, "the shard is sealed already, with other bytes");
        }
        return Reply(c, f, SealReply{sealed.record, catalog_.StateOf(*attempt) == AttemptState::kComplete});
      }
    }
    Status why = Status(StatusCode::kClosed, "no such lease: it ended, or the daemon was restarted without its memory");
    if (auto z = zombies_.find(r.lease); z != zombies_.end()) {
      const Attempt* attempt = catalog_.FindAttempt(z->second.ns, z->second.attempt);
      const bool fenced = z->second.expired || (attempt && WasFenced(z->second.ns, *attempt));
      why = Status(fenced ? StatusCode::kFenced : StatusCode::kClosed, "too late to seal: " + (attempt && attempt->tombstone ? attempt->tombstone->reason
                                                                                             : std::string("the lease has ended")));
    }
    return why;
  }
  OpenLease& lease = it->second;
  if (lease.session != session) return Status(StatusCode::kDenied, "this lease is not yours");
  const uint64_t capacity = pool_.CapacityOf(lease.entry.slot);
  if (r.length_bytes == 0 || r.length_bytes > kShardBytesMax || LeaseBytes(r.length_bytes) > capacity || r.header_bytes > r.length_bytes ||
      r.header_bytes > kHeaderBytesMax || r.static_offset >= r.header_bytes) {
    return Status(StatusCode::kInvalidArgument, "seal of " + std::to_string(r.length_bytes) + " bytes (header " + std::to_string(r.header_bytes) +
                                                    ", static part from " + std::to_string(r.static_offset) + ") does not fit its lease of " +
                                                    std::to_string(capacity) + " bytes");
  }
  if (r.header_bytes > config_.header_max) return Status(StatusCode::kLimit, HeaderTooLarge(r.header_bytes, config_.header_max));
  if (lease.checking) {
    if (Encode(lease.seal) != Encode(r)) return Status(StatusCode::kInvalidArgument, "the shard is being sealed already, with other bytes");
    // A repeat after a lost connection: the answer goes to the new one.
    lease.seal_connection = c;
    lease.seal_request = f.request_id;
    return Status();
  }
  lease.checking = true;
  lease.seal = r;
  lease.seal_connection = c;
  lease.seal_request = f.request_id;
  lease.expires = now_ + config_.lease_ns;
  lease.structure_wanted = !catalog_.StructureDataBytes(lease.entry.key.uid, r.structure);
  StartSealCheck(lease);
  return Status();
}

void NodeCore::Impl::StartSealCheck(const OpenLease& lease) {
  const SealRequest& r = lease.seal;
  action::CheckSeal check;
  check.lease = r.lease;
  check.extents = pool_.FindSlot(lease.entry.slot)->entry.extents;
  check.length_bytes = r.length_bytes;
  check.header_bytes = r.header_bytes;
  check.static_offset = r.static_offset;
  check.block_root = r.block_root;
  check.structure = r.structure;
  check.whole_crc = r.whole_crc;
  check.want_structure = lease.structure_wanted;
  actions_.push_back(std::move(check));
}

// What was read just now, or is known from another shard, must make the shard's length; what is new must have room.
Status NodeCore::Impl::CheckStructure(const ledger::Lease& lease, const SealRequest& seal, const std::shared_ptr<PackedIndex>& read) {
  const std::optional<uint64_t> known = catalog_.StructureDataBytes(lease.key.uid, seal.structure);
  if (!read && !known) return Status(StatusCode::kProtocol, "the structure of the shard could not be read");
  const uint64_t data_bytes = read ? read->data_bytes : *known;
  if (seal.header_bytes + data_bytes != seal.length_bytes) {
    return Status(StatusCode::kCorrupt, "a header of " + std::to_string(seal.header_bytes) + " bytes and " + std::to_string(data_bytes) +
                                            " bytes of tensors do not make " + std::to_string(seal.length_bytes));
  }
  return read ? catalog_.AddStructure(lease.key.uid, seal.structure, read) : Status();
}

void NodeCore::Impl::On(const event::SealChecked& e) {
  auto it = leases_.find(e.lease);
  if (it == leases_.end() || !it->second.checking) return;
  OpenLease& lease = it->second;
  if (e.status.ok() && !lease.structure_wanted && !catalog_.StructureDataBytes(lease.entry.key.uid, lease.seal.structure)) {
    lease.structure_wanted = true;  // Known when the check began, and gone with the last attempt that had it.
    return StartSealCheck(lease);
  }
  lease.checking = false;
  const ledger::Lease entry = lease.entry;
  const NamespaceKey ns{entry.key.uid, entry.key.ns};
  const Id128 attempt = lease.attempt;
  const ConnectionId connection = lease.seal_connection;
  const uint64_t request = lease.seal_request;
  const SealRequest seal = lease.seal;
  Status status = e.status;
  if (status.ok()) status = CheckStructure(entry, seal, e.structure);
  if (!status.ok() && !SP_PLANTED(seal_check_ignored)) {
    // Nothing was sealed; this try is over (F8).
    EndLease(e.lease, false);
    CloseAttempt(ns, attempt, "the seal of rank " + std::to_string(entry.rank) + " was refused: " + status.message());
    return SendError(connection, MessageType::kSeal, request, status);
  }
  SealRecord record;
  record.key = entry.key;
  record.attempt = attempt;
  record.world_size = entry.world_size;
  record.rank = entry.rank;
  record.length_bytes = seal.length_bytes;
  record.block_root = seal.block_root;
  record.whole_crc = seal.whole_crc;
  record.header_bytes = seal.header_bytes;
  record.static_offset = seal.static_offset;
  record.structure = seal.structure;
  ledger::Sealed sealed{e.lease, entry.slot, {}};
  sealed.record.bytes = record.Encode();
  Commit(sealed);
  ++counters_.seals;
  Evidence(Severity::kInfo, "shard_sealed", entry.key,
           {{"rank", std::to_string(entry.rank)}, {"lease", std::to_string(e.lease)}, {"bytes", std::to_string(record.length_bytes)},
            {"record", record.Identity().ToHex()}, {"block_root", record.block_root.ToHex()}});
  TryComplete(ns, attempt);
  const Attempt* a = catalog_.FindAttempt(ns, attempt);
  if (a && a->tombstone && catalog_.StateOf(*a) == AttemptState::kClosed) {
    return SendError(connection, MessageType::kSeal, request, Status(StatusCode::kClosed, a->tombstone->reason));
  }
  Send(connection, MakeFrame(MessageType::kSeal, request,
                             SealReply{record.Identity(), a && catalog_.StateOf(*a) == AttemptState::kComplete}));
}

}  // namespace sp
