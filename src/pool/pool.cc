#include "pool/pool.h"

#include <algorithm>

#include "base/check.h"
#include "base/plant.h"

namespace sp {
namespace {
std::string Mib(uint64_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }
bool SameProcess(const SessionKey& a, const SessionKey& b) {
  return a.uid == b.uid && a.pid != 0 && a.pid == b.pid && a.start_time != 0 && a.start_time == b.start_time;
}
bool IsInherited(const SessionKey& owner, const SessionKey& heir, const std::set<Id128>& ended) {
  return owner.session != heir.session && ended.contains(owner.session) && SameProcess(owner, heir);
}
}  // namespace

// Never lent, or this uid's own. A process of this uid that still maps it sees nothing that is not its uid's.
bool Pool::Usable(const Extent& extent, const SessionKey& session) {
  if (extent.state != ExtentState::kFree) return false;
  // A slot that was dissolved just before a SIGKILL leaves free extents whose writer lives.
  const SessionKey& writer = extent.writer;
  if (!writer.session.is_zero() && writer.session != session.session && !SameProcess(writer, session)) return false;
  return !extent.uid || *extent.uid == session.uid || SP_PLANTED(lent_across_uids);
}

// While a process that we know of holds it, its memory would not be freed: more than the pool may have (I-27).
bool Pool::Replaceable(const Extent& extent, const SessionKey& session) {
  return extent.state == ExtentState::kFree && !Usable(extent, session) && (extent.lent_to.empty() || SP_PLANTED(replaced_while_lent));
}

Result<Pool::Plan> Pool::PlanSlot(const SessionKey& session, uint32_t wanted, const std::set<Id128>& ended) const {
  Plan plan;
  uint64_t have = 0;
  for (const auto& [id, slot] : slots_) {
    if (have >= wanted) break;
    const bool own = slot.entry.session.session == session.session && slot.entry.extents.size() < wanted;
    if (slot.state != SlotState::kIdle || !(own || IsInherited(slot.entry.session, session, ended))) continue;
    plan.dissolve.push_back(id);
    have += slot.entry.extents.size();
  }
  for (const auto& [id, extent] : extents_) {
    if (have >= wanted) break;
    if (Usable(extent, session)) plan.ready.push_back(id), ++have;
  }
  if (have < wanted) {
    const uint64_t missing = wanted - have;
    const uint64_t most = extents_max_ + (SP_PLANTED(one_extent_too_many) ? 1 : 0);
    uint64_t room = most > extents_.size() ? most - extents_.size() : 0;
    for (const auto& [id, extent] : extents_) {
      if (room >= missing) break;
      if (Replaceable(extent, session)) plan.replace.push_back(id), ++room;
    }
    if (missing > room) {
      const Totals t = totals();
      return Error(StatusCode::kNoSpace,
                   "a shard of " + Mib(wanted * extent_bytes_) + " does not fit: pool " + Mib(extents_max_ * extent_bytes_) + ", sealed " +
                       Mib(t.sealed * extent_bytes_) + ", being written " + Mib((t.leased + t.pending) * extent_bytes_) + ", idle slots " +
                       Mib(t.idle * extent_bytes_) + ", held by writers that lost their lease " + Mib(t.zombie * extent_bytes_) +
                       ", usable now " + Mib((have + room) * extent_bytes_) + "; raise the setting `pool` or lower `retain`");
    }
    plan.create = static_cast<uint32_t>(missing);
  }
  return plan;
}

std::optional<uint64_t> Pool::FindIdleSlot(const Id128& session, uint32_t extents) const {
  std::optional<uint64_t> best;
  size_t best_size = 0;
  for (const auto& [id, slot] : slots_) {
    const size_t size = slot.entry.extents.size();
    if (slot.state != SlotState::kIdle || slot.entry.session.session != session || size < extents) continue;
    if (!best || size < best_size) best = id, best_size = size;
  }
  return best;
}

std::optional<uint64_t> Pool::FindAdoptableSlot(const SessionKey& session, uint32_t extents, const std::set<Id128>& ended) const {
  for (const auto& [id, slot] : slots_) {
    if (slot.state == SlotState::kIdle && slot.entry.extents.size() >= extents && IsInherited(slot.entry.session, session, ended)) return id;
  }
  return std::nullopt;
}

void Pool::AddExtent(uint32_t id) {
  Extent& extent = extents_[id];
  extent.state = ExtentState::kFree;
  next_extent_ = std::max(next_extent_, id + 1);
}

void Pool::BeginCreate(uint32_t id) {
  SP_CHECK(!extents_.contains(id) && (extents_.size() < extents_max_ || SP_PLANTED(one_extent_too_many)));
  extents_[id].state = ExtentState::kCreating;
  next_extent_ = std::max(next_extent_, id + 1);
}

void Pool::RemoveExtent(uint32_t id) { extents_.erase(id); }
void Pool::SetPending(uint32_t id) { extents_.at(id).state = ExtentState::kPending; }

void Pool::ReturnPending(uint32_t id) {
  if (auto it = extents_.find(id); it != extents_.end() && it->second.state == ExtentState::kPending) it->second.state = ExtentState::kFree;
}

void Pool::Lend(const std::vector<uint32_t>& ids, const Id128& session) {
  for (uint32_t id : ids) {
    if (auto it = extents_.find(id); it != extents_.end()) it->second.lent_to.insert(session);
  }
}

void Pool::Forget(const Id128& session) {
  for (auto& [id, extent] : extents_) {
    extent.lent_to.erase(session);
    if (extent.writer.session == session) extent.writer = {};
  }
}

std::vector<uint32_t> Pool::Abandon(const Id128& session) {
  std::vector<uint32_t> dropped;
  for (auto& [id, extent] : extents_) {
    if (extent.state == ExtentState::kFree && extent.writer.session == session) dropped.push_back(id);
    extent.lent_to.erase(session);
  }
  for (uint32_t id : dropped) RemoveExtent(id);
  return dropped;
}

void Pool::MarkLent(const ledger::Slot& slot) {
  for (uint32_t id : slot.extents) {
    auto it = extents_.find(id);
    if (it != extents_.end() && it->second.state == ExtentState::kFree) Lent(it->second, slot.session);
  }
}

void Pool::Lent(Extent& extent, const SessionKey& session) {
  extent.uid = session.uid;
  extent.writer = session;
  if (!session.session.is_zero()) extent.lent_to.insert(session.session);  // Zero: a snapshot's word for "of this uid, lent to nobody".
}

std::vector<uint64_t> Pool::SlotsWith(const std::vector<uint32_t>& extents) const {
  const std::set<uint32_t> wanted(extents.begin(), extents.end());
  std::vector<uint64_t> found;
  for (const auto& [id, slot] : slots_) {
    const auto& of = slot.entry.extents;
    if (std::any_of(of.begin(), of.end(), [&](uint32_t e) { return wanted.contains(e); })) found.push_back(id);
  }
  return found;
}

void Pool::TransferLent(const Id128& from, const Id128& to) {
  for (auto& [id, extent] : extents_) {
    if (extent.lent_to.erase(from)) extent.lent_to.insert(to);
    if (extent.writer.session == from) extent.writer.session = to;
  }
}

bool Pool::HoldsLent(const Id128& session) const {
  return std::any_of(extents_.begin(), extents_.end(), [&](const auto& e) { return e.second.lent_to.contains(session); });
}

const Extent* Pool::FindExtent(uint32_t id) const {
  auto it = extents_.find(id);
  return it == extents_.end() ? nullptr : &it->second;
}

std::vector<uint32_t> Pool::NeverLent() const {
  std::vector<uint32_t> ids;
  for (const auto& [id, extent] : extents_) {
    if (extent.state == ExtentState::kFree && !extent.uid) ids.push_back(id);
  }
  return ids;
}

std::vector<ledger::Slot> Pool::FreeAsLent() const {
  std::map<std::pair<uint32_t, Id128>, ledger::Slot> by_writer;
  for (const auto& [id, extent] : extents_) {
    if (extent.state == ExtentState::kInSlot || !extent.uid) continue;
    const SessionKey writer = extent.writer.session.is_zero() ? SessionKey{{}, *extent.uid, 0, 0} : extent.writer;
    by_writer.try_emplace({*extent.uid, writer.session}, ledger::Slot{1, writer, {}}).first->second.extents.push_back(id);
  }
  std::vector<ledger::Slot> slots;
  for (auto& [writer, slot] : by_writer) slots.push_back(std::move(slot));
  return slots;
}

bool Pool::AddSlot(const ledger::Slot& entry) {
  if (slots_.contains(entry.slot)) return false;
  std::set<uint32_t> distinct(entry.extents.begin(), entry.extents.end());
  if (distinct.size() != entry.extents.size()) return false;
  for (uint32_t id : entry.extents) {
    const Extent* extent = FindExtent(id);
    if (!extent || extent->state == ExtentState::kInSlot || extent->state == ExtentState::kCreating) return false;
  }
  for (uint32_t id : entry.extents) {
    Extent& extent = extents_.at(id);
    extent.state = ExtentState::kInSlot;
    Lent(extent, entry.session);
  }
  slots_.emplace(entry.slot, PoolSlot{entry, SlotState::kIdle});
  return true;
}

void Pool::RemoveSlot(uint64_t slot) {
  auto it = slots_.find(slot);
  if (it == slots_.end()) return;
  for (uint32_t id : it->second.entry.extents) {
    if (auto e = extents_.find(id); e != extents_.end()) e->second.state = ExtentState::kFree;
  }
  slots_.erase(it);
}

void Pool::SetSlotState(uint64_t slot, SlotState state) {
  if (auto it = slots_.find(slot); it != slots_.end()) it->second.state = state;
}

const PoolSlot* Pool::FindSlot(uint64_t slot) const {
  auto it = slots_.find(slot);
  return it == slots_.end() ? nullptr : &it->second;
}

std::vector<uint64_t> Pool::SlotsOf(const Id128& session) const {
  std::vector<uint64_t> ids;
  for (const auto& [id, slot] : slots_) {
    if (slot.entry.session.session == session) ids.push_back(id);
  }
  return ids;
}

Pool::Totals Pool::totals() const {
  Totals t;
  t.extents = static_cast<uint32_t>(extents_.size());
  for (const auto& [id, extent] : extents_) {
    switch (extent.state) {
      case ExtentState::kCreating: ++t.creating; break;
      case ExtentState::kFree: ++t.free; break;
      case ExtentState::kPending: ++t.pending; break;
      case ExtentState::kInSlot: break;
    }
  }
  for (const auto& [id, slot] : slots_) {
    const auto n = static_cast<uint32_t>(slot.entry.extents.size());
    switch (slot.state) {
      case SlotState::kIdle: t.idle += n; break;
      case SlotState::kPending: t.pending += n; break;
      case SlotState::kLeased: t.leased += n; break;
      case SlotState::kSealed: t.sealed += n; break;
      case SlotState::kZombie: t.zombie += n; break;
    }
  }
  return t;
}

uint64_t Pool::CapacityOf(uint64_t slot) const {
  const PoolSlot* s = FindSlot(slot);
  return s ? s->entry.extents.size() * extent_bytes_ : 0;
}

Status Pool::CheckInvariants() const {
  if (extents_.size() > extents_max_) return Status(StatusCode::kInternal, "more extents than extents_max");
  std::set<uint32_t> in_slots;
  for (const auto& [id, slot] : slots_) {
    for (uint32_t e : slot.entry.extents) {
      if (!in_slots.insert(e).second) return Status(StatusCode::kInternal, "extent " + std::to_string(e) + " is in two slots");
      const Extent* extent = FindExtent(e);
      if (!extent || extent->state != ExtentState::kInSlot) {
        return Status(StatusCode::kInternal, "extent " + std::to_string(e) + " of slot " + std::to_string(id) + " is not in use");
      }
    }
  }
  for (const auto& [id, extent] : extents_) {
    if ((extent.state == ExtentState::kInSlot) != in_slots.contains(id)) {
      return Status(StatusCode::kInternal, "extent " + std::to_string(id) + " is in use by no slot");
    }
    if (id >= next_extent_) return Status(StatusCode::kInternal, "extent id beyond next_extent");
  }
  return Status();
}

}  // namespace sp
