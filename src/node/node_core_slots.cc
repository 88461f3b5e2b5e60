// Slots: found, built from extents that may have to be created first, released.
#include <algorithm>

#include "base/plant.h"
#include "format/names.h"
#include "node/node_core_impl.h"

namespace sp {

using Severity = action::Log::Severity;

std::set<Id128> NodeCore::Impl::EndedSessions() const {
  std::set<Id128> ended;
  for (const auto& [id, s] : sessions_) {
    if (s.ended) ended.insert(id);
  }
  return ended;
}

std::optional<uint64_t> NodeCore::Impl::IdleSlotFor(const SessionKey& session, uint32_t extents) {
  if (auto slot = pool_.FindIdleSlot(session.session, extents)) return slot;
  auto adopt = pool_.FindAdoptableSlot(session, extents, EndedSessions());
  if (!adopt) return std::nullopt;
  const ledger::Slot old = pool_.FindSlot(*adopt)->entry;
  Commit(ledger::SlotGone{old.slot});
  const uint64_t slot = MakeSlot(session, old.extents);
  DropSessionIfUnused(old.session.session);
  return slot;
}

uint64_t NodeCore::Impl::MakeSlot(const SessionKey& session, const std::vector<uint32_t>& extents) {
  const uint64_t id = NewId();
  Commit(ledger::Slot{id, session, extents});
  return id;
}

// The ledger does not say who had said goodbye. After a restart those of the process that have not come back may have; where there is no room
// without theirs, they did. Idle slots have no lease, so one that is only late loses nothing but the slot.
Result<Pool::Plan> NodeCore::Impl::PlanSlot(const SessionKey& session, uint32_t extents) const {
  std::set<Id128> ended = EndedSessions();
  auto plan = pool_.PlanSlot(session, extents, ended);
  if (plan) return plan;
  for (const auto& [id, s] : sessions_) {
    if (s.connections.empty()) ended.insert(id);
  }
  return pool_.PlanSlot(session, extents, ended);
}

Status NodeCore::Impl::StartBuild(uint32_t extents, Build build) {
  SP_ASSIGN_OR_RETURN(Pool::Plan plan, PlanSlot(build.session, extents));
  build.dissolve = plan.dissolve;
  for (uint64_t slot : plan.dissolve) pool_.SetSlotState(slot, SlotState::kPending);
  for (uint32_t e : plan.ready) {
    pool_.SetPending(e);
    build.extents.push_back(e);
  }
  if (!plan.replace.empty()) {
    for (uint32_t e : plan.replace) {
      dropped_.push_back(ledger::Slot{1, SessionKey{{}, pool_.FindExtent(e)->uid.value_or(0), 0, 0}, {e}});
      pool_.RemoveExtent(e);
    }
    actions_.push_back(action::DropExtents{plan.replace});
  }
  if (plan.create > 0) {
    const uint32_t first = pool_.next_extent();
    for (uint32_t i = 0; i < plan.create; ++i) {
      pool_.BeginCreate(first + i);
      build.extents.push_back(first + i);
      build.waiting.insert(first + i);
    }
    actions_.push_back(action::CreateExtents{first, plan.create});
  }
  if (build.waiting.empty()) FinishBuild(std::move(build));
  else builds_.emplace(NewId(), std::move(build));
  return Status();
}

void NodeCore::Impl::FinishBuild(Build build) {
  std::vector<uint32_t> extents;
  std::set<Id128> owners;
  for (uint64_t slot : build.dissolve) {
    const ledger::Slot old = pool_.FindSlot(slot)->entry;
    extents.insert(extents.end(), old.extents.begin(), old.extents.end());
    owners.insert(old.session.session);
    Commit(ledger::SlotGone{slot});
  }
  extents.insert(extents.end(), build.extents.begin(), build.extents.end());
  const uint64_t slot = MakeSlot(build.session, extents);
  for (const Id128& owner : owners) {
    if (auto s = sessions_.find(owner); s != sessions_.end() && s->second.ended) DropSessionIfUnused(owner);
    if (pool_.SlotsOf(owner).empty()) unwatchable_gone_.erase(owner);
  }
  if (build.reserve) {
    GrantLease(build.connection, build.request_id, build.session, *build.reserve, slot, build.dissolve);
  } else if (auto p = prepares_.find(build.prepare); p != prepares_.end()) {
    p->second.slots.push_back({slot, static_cast<uint32_t>(extents.size())});
    if (--p->second.builds == 0) FinishPrepare(build.prepare);
  }
}

void NodeCore::Impl::CancelBuild(uint64_t id, const Status& why) {
  auto it = builds_.find(id);
  if (it == builds_.end()) return;
  const Build build = std::move(it->second);
  builds_.erase(it);
  for (uint64_t slot : build.dissolve) {
    pool_.SetSlotState(slot, SlotState::kIdle);
    ReleaseSlot(slot);  // Where the session that had it has died meanwhile.
  }
  for (uint32_t e : build.extents) {
    if (!build.waiting.contains(e)) pool_.ReturnPending(e);  // What still waits becomes free when its event comes.
  }
  if (build.reserve) {
    if (why.code() == StatusCode::kNoSpace || why.code() == StatusCode::kDeadline) GiveUpTry(build.session, *build.reserve, why);
    SendError(build.connection, MessageType::kReserve, build.request_id, why);
  } else if (auto p = prepares_.find(build.prepare); p != prepares_.end() && --p->second.builds == 0) {
    FinishPrepare(build.prepare);
  }
}

void NodeCore::Impl::AdvanceBuilds(uint32_t extent) {
  for (auto it = builds_.begin(); it != builds_.end(); ++it) {
    if (it->second.waiting.erase(extent) == 0) continue;
    pool_.SetPending(extent);
    if (it->second.waiting.empty()) {
      Build build = std::move(it->second);
      builds_.erase(it);
      FinishBuild(std::move(build));
    }
    return;
  }
}

void NodeCore::Impl::On(const event::ExtentCreated& e) {
  const Extent* extent = pool_.FindExtent(e.extent);
  if (extent && extent->state != ExtentState::kCreating) return;
  // One that nobody asked for here is of the keeper's start.
  if (!extent && pool_.totals().extents >= config_.extents_max) return;
  pool_.AddExtent(e.extent);
  AdvanceBuilds(e.extent);
}

void NodeCore::Impl::On(const event::ExtentFailed& e) {
  const Extent* extent = pool_.FindExtent(e.extent);
  if (!extent || extent->state != ExtentState::kCreating) return;
  pool_.RemoveExtent(e.extent);
  Log(Severity::kError, "extent_not_created", {{"extent", std::to_string(e.extent)}, {"why", e.status.message()}});
  for (const auto& [id, build] : builds_) {
    if (!build.waiting.contains(e.extent)) continue;
    CancelBuild(id, Status(StatusCode::kNoSpace, "the machine has no memory for another extent: " + e.status.message()));
    return;
  }
}

void NodeCore::Impl::DropExtents(const SessionKey& owner, std::vector<uint32_t> extents) {
  dropped_.push_back(ledger::Slot{1, owner, extents});
  actions_.push_back(action::DropExtents{std::move(extents)});
}

void NodeCore::Impl::ReleaseSlot(uint64_t slot) {
  const PoolSlot* s = pool_.FindSlot(slot);
  if (!s || s->state != SlotState::kIdle || (IsAlive(s->entry.session.session) && !SP_PLANTED(slot_of_the_living_reused))) return;
  const ledger::Slot entry = s->entry;
  const bool drop = unwatchable_gone_.contains(entry.session.session);
  // Dropped before the ledger says that the slot is gone: a SIGKILL in between must not leave extents that look unused.
  if (drop) DropExtents(entry.session, entry.extents);
  Commit(ledger::SlotGone{slot});
  if (!drop) return;
  for (uint32_t e : entry.extents) pool_.RemoveExtent(e);
  if (pool_.SlotsOf(entry.session.session).empty()) unwatchable_gone_.erase(entry.session.session);
}

Status NodeCore::Impl::PrepareSlots(ConnectionId c, const Frame& f) {
  SP_ASSIGN_OR_RETURN(auto r, Decode<PrepareSlotsRequest>(f.body));
  SP_RETURN_IF_ERROR(CheckNamespace(r.ns));
  if (stopping_) return Status(StatusCode::kUnavailable, "the daemon is stopping");
  if (r.bytes == 0 || r.bytes > kShardBytesMax || r.count == 0 || r.count > 64) {
    return Status(StatusCode::kInvalidArgument, "1 to 64 slots of 1 byte to 1 TiB can be prepared");
  }
  const SessionKey session = SessionOf(c)->key;
  const uint32_t extents = ExtentsFor(r.bytes);
  const uint64_t id = NewId();
  Prepare& prepare = prepares_[id];
  prepare = Prepare{c, f.request_id, 1, {}};  // One for ourselves, so that it cannot finish in the loop.
  for (const auto& [slot, s] : pool_.slots()) {
    if (prepare.slots.size() == r.count) break;
    if (s.state == SlotState::kIdle && s.entry.session.session == session.session && s.entry.extents.size() >= extents) {
      prepare.slots.push_back({slot, static_cast<uint32_t>(s.entry.extents.size())});
    }
  }
  Status refused;
  for (auto have = static_cast<uint32_t>(prepare.slots.size()); have < r.count && refused.ok(); ++have) {
    Build build;
    build.session = session;
    build.connection = c;
    build.request_id = f.request_id;
    build.deadline = Until(now_, r.timeout_ns);
    build.prepare = id;
    ++prepare.builds;
    refused = StartBuild(extents, std::move(build));
    if (!refused.ok()) --prepare.builds;
  }
  if (!refused.ok() && prepare.slots.empty() && prepare.builds == 1) {
    prepares_.erase(id);
    return refused;
  }
  if (--prepare.builds == 0) FinishPrepare(id);
  return Status();
}

void NodeCore::Impl::FinishPrepare(uint64_t id) {
  auto it = prepares_.find(id);
  PrepareSlotsReply reply;
  reply.slots = it->second.slots;
  Send(it->second.connection, MakeFrame(MessageType::kPrepareSlots, it->second.request_id, reply));
  prepares_.erase(it);
}

}  // namespace sp
